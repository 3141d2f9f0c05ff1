"""Safetensors files as streams: row ranges read into a reused buffer, tensors written piece by piece.

The safetensors package maps a file (its pages count as resident) and sorts tensors by name when it writes, with all of
them in memory. Here reads are `pread`s, and a file is written header first, since every size is known before the data.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
PARTIAL_SUFFIX = ".partial"

_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_HASH_CHUNK_BYTES = 1 << 20
_MAX_DIMENSIONS = 16  # bounds the work on a hostile header


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors headers use, such as "BF16"."""
    return _DTYPE_NAMES[dtype]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        dtype: the header's name of it, such as "BF16".
        offset: of the first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ValueError where torch has no dtype of that name that this package reads."""
        if self.dtype not in _TORCH_DTYPES:
            raise ValueError(f"tensor {self.name}: dtype {self.dtype} is not supported")
        return _TORCH_DTYPES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0


class ReadBuffer:
    """Page-aligned memory outside of malloc's heap that many reads share, one after the other."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(nbytes, mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, self.nbytes)
        self.view = memoryview(self._memory)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The first bytes as a tensor; it changes with the next read."""
        count = _product(shape)
        if count * dtype.itemsize > self.nbytes:
            raise ValueError(f"buffer of {self.nbytes} bytes: {list(shape)} of {dtype} does not fit")
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).view(tuple(shape))


class SafetensorsReader:
    """Reads the tensors of one safetensors file with `pread`; nothing is mapped.

    Everything that the header says is checked against the file here: names, dtypes, shapes, and that the tensors lie
    in the file without overlap or hole.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or not a safetensors file; names file and tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{self.path}: expected a regular file")
            self.file_bytes = status.st_size
            self.header_bytes, header = self._read_header()
            self.metadata, self.entries = self._parse_header(header)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self.entries[name]

    def read_into(self, entry: TensorEntry, start: int, target: memoryview) -> None:
        """Fills `target` with the tensor's bytes from byte `start` on.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        if start < 0 or start + target.nbytes > entry.nbytes:
            raise ValueError(
                f"tensor {entry.name}: bytes {start} to {start + target.nbytes} asked for, it has {entry.nbytes}"
            )
        done = 0
        while done < target.nbytes:
            try:
                count = os.preadv(self._descriptor, [target[done:]], entry.offset + start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {entry.name}: cannot be read at byte {entry.offset + start + done}: "
                    f"{error.strerror}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: tensor {entry.name}: the file ends at byte {entry.offset + start + done}, "
                    f"{target.nbytes - done} bytes early; it was {self.file_bytes} bytes long when it was opened"
                )
            done += count

    def read_rows(self, name: str, first: int, rows: int, buffer: ReadBuffer | None = None) -> torch.Tensor:
        """Rows `first` to `first + rows` of a tensor, [rows, ...].

        With a buffer the result lies in it and lasts until its next use.
        """
        entry = self.entry(name)
        nbytes = rows * entry.row_nbytes
        buffer = buffer or ReadBuffer(nbytes)
        self.read_into(entry, first * entry.row_nbytes, buffer.view[:nbytes])
        return buffer.tensor(self._torch_dtype(entry), (rows, *entry.shape[1:]))

    def read_selected_rows(self, name: str, rows: Sequence[int], buffer: ReadBuffer | None = None) -> torch.Tensor:
        """The rows of the given indices, [len(rows), ...]; neighbours are read together."""
        entry = self.entry(name)
        row_nbytes = entry.row_nbytes
        buffer = buffer or ReadBuffer(len(rows) * row_nbytes)
        position = 0
        while position < len(rows):
            count = 1
            while position + count < len(rows) and rows[position + count] == rows[position] + count:
                count += 1
            target = buffer.view[position * row_nbytes : (position + count) * row_nbytes]
            self.read_into(entry, rows[position] * row_nbytes, target)
            position += count
        return buffer.tensor(self._torch_dtype(entry), (len(rows), *entry.shape[1:]))

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor in memory of its own."""
        entry = self.entry(name)
        buffer = ReadBuffer(entry.nbytes)
        self.read_into(entry, 0, buffer.view[: entry.nbytes])
        return buffer.tensor(self._torch_dtype(entry), entry.shape)

    def prefetch(self, entry: TensorEntry) -> None:
        """Asks the kernel to read a tensor into its page cache in the background."""
        os.posix_fadvise(self._descriptor, entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def _torch_dtype(self, entry: TensorEntry) -> torch.dtype:
        try:
            return entry.torch_dtype
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        length_field = os.pread(self._descriptor, 8, 0)
        if len(length_field) < 8:
            raise CheckpointError(f"{self.path}: {self.file_bytes} bytes are too short for a safetensors file")
        length = int.from_bytes(length_field, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: a header of {length} bytes is declared, at most {MAX_HEADER_BYTES} are allowed; "
                "this is not a safetensors file"
            )
        if 8 + length > self.file_bytes:
            raise CheckpointError(
                f"{self.path}: truncated: the header needs {8 + length} bytes, the file has {self.file_bytes}"
            )
        text = os.pread(self._descriptor, length, 8)
        try:
            header = json.loads(text, object_pairs_hook=_refuse_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is not a JSON object")
        return 8 + length, header

    def _parse_header(self, header: dict[str, Any]) -> tuple[dict[str, str], dict[str, TensorEntry]]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{self.path}: __metadata__ is not a JSON object")
        entries = [self._parse_entry(name, fields) for name, fields in header.items()]
        position = self.header_bytes
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
            if entry.offset + entry.nbytes > self.file_bytes:
                raise CheckpointError(
                    f"{self.path}: truncated: tensor {entry.name} ends at byte {entry.offset + entry.nbytes}, "
                    f"the file has {self.file_bytes}"
                )
            if entry.offset != position:
                raise CheckpointError(
                    f"{self.path}: tensor {entry.name} starts at byte {entry.offset}, expected {position}: "
                    "tensors overlap or leave a hole"
                )
            position += entry.nbytes
        if position != self.file_bytes:
            raise CheckpointError(f"{self.path}: the tensors end at byte {position}, the file has {self.file_bytes}")
        return {str(key): str(value) for key, value in metadata.items()}, {entry.name: entry for entry in entries}

    def _parse_entry(self, name: str, fields: Any) -> TensorEntry:
        where = f"{self.path}: tensor {name}"
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}: expected the keys dtype, shape and data_offsets, got {fields!r:.200}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if dtype not in _ITEM_BYTES:
            raise CheckpointError(f"{where}: dtype {dtype!r} is not supported")
        if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise CheckpointError(f"{where}: shape {shape!r:.200} is not a list of sizes")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(f"{where}: data_offsets {offsets!r:.200} are not two ascending offsets")
        nbytes = _ITEM_BYTES[dtype] * _product(shape)
        if nbytes != offsets[1] - offsets[0]:
            raise CheckpointError(
                f"{where}: {dtype} {shape} needs {nbytes} bytes, data_offsets hold {offsets[1] - offsets[0]}"
            )
        return TensorEntry(name, dtype, tuple(shape), self.header_bytes + offsets[0], nbytes)


class SafetensorsWriter:
    """Writes one safetensors file as a stream: the header first, then bytes of any tensor in any order.

    The file is `<path>.partial` until `finish` has flushed it to the disk and renamed it. Its whole size is reserved at
    the start, so that a full disk shows before the work and not after it.

    Args:
        tensors: (name, safetensors dtype, shape) in the order of the file.
        resume: continue a `<path>.partial` with the same header instead of starting over.

    Raises:
        OSError: the disk is full or the file cannot be written; names the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Sequence[tuple[str, str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        header = safetensors_header(tensors, metadata)
        self.header_bytes = len(header)
        self.entries = _lay_out(tensors, len(header))
        self.file_bytes = len(header) + sum(entry.nbytes for entry in self.entries.values())
        self._sha256 = hashlib.sha256()
        self._hashed_bytes = 0
        mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_TRUNC)
        self._descriptor = os.open(self.partial_path, mode, 0o644)
        try:
            if os.pread(self._descriptor, len(header), 0) != header:
                os.ftruncate(self._descriptor, 0)
                self._reserve()
                self._write_at(header, 0)
            elif os.fstat(self._descriptor).st_size != self.file_bytes:
                self._reserve()
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, name: str, start: int, data: memoryview | bytes) -> None:
        """Writes bytes of a tensor from its byte `start` on."""
        entry = self.entries[name]
        nbytes = len(data) if isinstance(data, bytes) else data.nbytes
        if start < 0 or start + nbytes > entry.nbytes:
            raise ValueError(f"tensor {name}: bytes {start} to {start + nbytes} written, it has {entry.nbytes}")
        self._write_at(data, entry.offset + start)

    def write_tensor(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Writes a contiguous tensor's bytes from the stored tensor's byte `start` on."""
        self.write(name, start, tensor_bytes(tensor))

    def absorb(self, end: int, expected: int | None = None) -> int | None:
        """Takes the file's bytes up to `end` into its SHA-256, in order; the CRC-32 of the bytes that were new.

        With an `expected` CRC-32 that the bytes do not have, nothing is taken and the result is None.
        """
        sha256, position, checksum = self._sha256.copy(), self._hashed_bytes, 0
        while position < end:
            data = os.pread(self._descriptor, min(_HASH_CHUNK_BYTES, end - position), position)
            if not data:
                raise OSError(f"{self.partial_path}: ends at byte {position}, expected {end} bytes")
            sha256.update(data)
            checksum = zlib.crc32(data, checksum)
            position += len(data)
        if expected is not None and checksum != expected:
            return None
        self._sha256, self._hashed_bytes = sha256, position
        return checksum

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        os.fdatasync(self._descriptor)

    def digest(self) -> str:
        """The SHA-256 of the file, in hexadecimal, once everything is written."""
        self.absorb(self.file_bytes)
        return self._sha256.hexdigest()

    def finish(self) -> None:
        """Flushes, renames to the final name and closes."""
        os.fsync(self._descriptor)
        self.close()
        os.rename(self.partial_path, self.path)
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Closes the file and leaves it under its `.partial` name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, self.file_bytes)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}: {self.file_bytes} bytes were needed", str(self.partial_path)
            ) from error

    def _write_at(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < view.nbytes:
            try:
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.partial_path)) from error


def safetensors_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length field and JSON header of a file that holds the tensors in this order, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in _lay_out(tensors, 0).values():
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy and without numpy; it must outlive the view."""
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()}")
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_HASH_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside the old one, flushes it and renames it: a reader sees the old or the new, never half.

    Raises:
        OSError: the disk is full or cannot be written; names the file.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(partial)) from error
    os.rename(partial, path)


def sync_directory(path: Path) -> None:
    """Returns when names created, renamed or removed in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lay_out(tensors: Sequence[tuple[str, str, Sequence[int]]], start: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    offset = start
    for name, dtype, shape in tensors:
        if name in entries:
            raise ValueError(f"tensor {name} is listed twice")
        entries[name] = TensorEntry(name, dtype, tuple(shape), offset, _ITEM_BYTES[dtype] * _product(shape))
        offset += entries[name].nbytes
    return entries


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"duplicate key {name!r:.200}")
        fields[name] = value
    return fields


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
