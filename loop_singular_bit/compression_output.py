"""The directory that a compression grows: shards written by a thread, a journal to resume from, the rename at the end.

Everything lies in `<output>.partial` until the last file is on the disk; only then it gets its name. A process killed
at any moment therefore leaves no directory that loads. Of what the journal says is written, each tensor's CRC-32 is
checked against the file before it is trusted, so that the journal needs no order with the data.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CHECKSUM_FILE, is_packed_checkpoint
from .checkpoint_directory import INDEX_FILE
from .compression_plan import SHARD_METADATA, CompressionPlan, Shard, Unit
from .errors import CheckpointError, OutputExistsError
from .safetensors_stream import PARTIAL_SUFFIX, SafetensorsWriter, replace_file, sync_directory, tensor_bytes

JOURNAL_FILE = "compression_journal.jsonl"
REPORT_FILE = "compression_report.json"

# Bounds what a power cut costs, and keeps the kernel from stalling on gigabytes of dirty pages at the end.
_SYNC_INTERVAL_BYTES = 256 << 20
# Packed blocks that may wait for the disk; `LoopCompressor` budgets for them.
QUEUED_WRITES = 2


def partial_directory(output: Path) -> Path:
    return output.with_name(output.name + PARTIAL_SUFFIX)


class Journal:
    """What is finished, one JSON object per line, in a file that is locked while a compression runs.

    The first line describes the work. A journal of other work is never continued.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise OutputExistsError(f"{path.parent}: another process is compressing into it") from error
        try:
            self.records = self._read(dict(description))
        except BaseException:
            self.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, description: dict[str, Any]) -> list[dict[str, Any]]:
        text = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        lines = text.split(b"\n")[:-1]  # what follows the last newline was cut off by a kill
        kept = sum(len(line) + 1 for line in lines)
        os.ftruncate(self._descriptor, kept)
        os.lseek(self._descriptor, kept, os.SEEK_SET)
        if not lines:
            self.append(description)
            return []
        try:
            found, *records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise CheckpointError(f"{self.path}: damaged: {error}; overwrite {self.path.parent}") from error
        if found != description:
            keys = found.keys() | description.keys()
            different = sorted(key for key in keys if found.get(key) != description.get(key))
            raise OutputExistsError(
                f"{self.path.parent}: was started with another {', '.join(different)}; resume with the same, "
                "or overwrite it"
            )
        return records


class OutputDirectory:
    """Takes the packed tensors unit by unit, in the order of the plan, and writes them in a thread of its own.

    Args:
        output: the final directory; it must not exist, be empty, or `overwrite` must be set.
        description: identity of the work; see `Journal`.
        resume: continue what a killed process left.
        overwrite: replace what is there.

    Raises:
        OutputExistsError: there is something already, and neither `resume` nor `overwrite` was asked for.
    """

    def __init__(
        self,
        output: Path,
        plan: CompressionPlan,
        description: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.output = output
        self.directory = partial_directory(output)
        self._plan = plan
        self._prepare(resume, overwrite)
        self._journal = Journal(self.directory / JOURNAL_FILE, description)
        self._finished: list[dict[str, Any]] = []
        self._shard_digests: dict[str, str] = {}
        self._writer: SafetensorsWriter | None = None
        self._shard_index = 0
        self._units_in_shard = 0
        self._unsynced_bytes = 0
        self._failure: BaseException | None = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=QUEUED_WRITES)
        try:
            self._restore()
        except BaseException:
            self._close_files()
            raise
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def finished_records(self) -> list[dict[str, Any]]:
        """Records of the units that are written already, in order: what a resumed run need not do again."""
        return list(self._finished)

    def write(self, parts: Sequence[tuple[str, int, torch.Tensor]], release: Callable[[], None] | None = None) -> None:
        """Queues pieces of stored tensors: (name, first byte in the stored tensor, contiguous tensor with the bytes).

        Args:
            release: called when they are written.

        Raises:
            OSError: an earlier write failed; names the file.
        """

        def work() -> None:
            writer = self._open_writer()
            for name, start, tensor in parts:
                writer.write(name, start, tensor_bytes(tensor))
                self._unsynced_bytes += tensor.nbytes
            if release is not None:
                release()

        self._enqueue(work)

    def finish_unit(self, unit: Unit, record: Mapping[str, Any]) -> None:
        """Queues the end of a unit: from here on a resumed run skips it."""
        self._enqueue(lambda: self._finish_unit(unit, record))

    def close(self) -> None:
        """Writes what is queued, then stops; what is finished stays resumable."""
        self._stop()
        self._close_files()

    def complete(self, companions: Mapping[str, Path], files: Callable[[], Mapping[str, bytes]]) -> None:
        """Waits for the shards, adds the other files and gives the directory its name.

        Args:
            companions: name to path of files copied from the source.
            files: called when all else is written; name to content of files made here, in the order of writing.

        Raises:
            OSError: a write failed; names the file.
        """
        self._stop()
        try:
            if self._failure is not None:
                raise self._failure
            for name, path in companions.items():
                self._write_file(name, path.read_bytes())
            if len(self._plan.shards) > 1:
                self._write_file(INDEX_FILE, self._index())
            self._write_file(CHECKSUM_FILE, self._checksums())
            for name, content in files().items():
                self._write_file(name, content)
            sync_directory(self.directory)
            self._rename()
        finally:
            self._close_files()

    def _prepare(self, resume: bool, overwrite: bool) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise OutputExistsError(f"{self.output}: exists and is not a directory")
        if self.output.is_dir() and any(self.output.iterdir()):
            if not overwrite:
                raise OutputExistsError(
                    f"{self.output}: exists and is not empty; pass overwrite=True (--overwrite) to replace it"
                )
            if not is_packed_checkpoint(self.output):
                raise OutputExistsError(f"{self.output}: is not a packed checkpoint, and will not be overwritten")
        if self.directory.exists() and not resume:
            if not overwrite:
                raise OutputExistsError(
                    f"{self.directory}: left by a compression that did not finish; pass resume=True (--resume) to "
                    "continue it or overwrite=True (--overwrite) to start over"
                )
            _check_unlocked(self.directory / JOURNAL_FILE)
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def _restore(self) -> None:
        """Finds the longest prefix of units that the journal knows and the files really hold."""
        records = self._journal.records
        unit_records = {record["unit"]: record for record in records if "unit" in record}
        digests = {record["shard"]: record["sha256"] for record in records if "shard" in record}
        for shard in self._plan.shards:
            complete = shard.file_name in digests and all(unit.name in unit_records for unit in shard.units)
            if complete and (self.directory / shard.file_name).is_file():
                self._shard_digests[shard.file_name] = digests[shard.file_name]
                self._finished += [unit_records[unit.name] for unit in shard.units]
                self._shard_index += 1
                continue
            if (self.directory / (shard.file_name + PARTIAL_SUFFIX)).is_file():
                self._restore_units(shard, unit_records)
            return

    def _restore_units(self, shard: Shard, unit_records: Mapping[str, dict[str, Any]]) -> None:
        writer = self._open_writer()
        for unit in shard.units:
            record = unit_records.get(unit.name)
            if record is None or writer.absorb(self._unit_end(unit), expected=record["crc32"]) is None:
                return
            self._finished.append(record)
            self._units_in_shard += 1
        self._finish_shard()

    def _open_writer(self) -> SafetensorsWriter:
        if self._writer is None:
            shard = self._plan.shards[self._shard_index]
            self._writer = SafetensorsWriter(
                self.directory / shard.file_name, shard.stored_tensors(), SHARD_METADATA, resume=True
            )
            self._writer.absorb(self._writer.header_bytes)
        return self._writer

    def _unit_end(self, unit: Unit) -> int:
        last = self._open_writer().entries[unit.stored_tensors()[-1][0]]
        return last.offset + last.nbytes

    def _finish_unit(self, unit: Unit, record: Mapping[str, Any]) -> None:
        writer = self._open_writer()
        finished = {"unit": unit.name, "crc32": writer.absorb(self._unit_end(unit)), **record}
        self._journal.append(finished)
        self._finished.append(finished)
        self._units_in_shard += 1
        if self._unsynced_bytes > _SYNC_INTERVAL_BYTES:
            writer.sync()
            self._unsynced_bytes = 0
        if self._units_in_shard == len(self._plan.shards[self._shard_index].units):
            self._finish_shard()

    def _finish_shard(self) -> None:
        shard = self._plan.shards[self._shard_index]
        writer = self._open_writer()
        digest = writer.digest()
        self._shard_digests[shard.file_name] = digest
        self._journal.append({"shard": shard.file_name, "sha256": digest})
        writer.finish()
        self._writer = None
        self._shard_index += 1
        self._units_in_shard = 0
        self._unsynced_bytes = 0

    def _enqueue(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        self._queue.put(work)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    work()
                except BaseException as error:  # handed to the thread that queues
                    self._failure = error

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _close_files(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._journal.close()

    def _index(self) -> bytes:
        weight_map = {name: shard.file_name for shard in self._plan.shards for name, _, _ in shard.stored_tensors()}
        total = sum(unit.nbytes for unit in self._plan.units)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"

    def _checksums(self) -> bytes:
        """In the format of sha256sum: `sha256sum -c checksums.sha256` checks it without this package."""
        digests = dict(self._shard_digests)
        if len(self._plan.shards) > 1:
            digests[INDEX_FILE] = hashlib.sha256(self._index()).hexdigest()
        return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()

    def _write_file(self, name: str, content: bytes) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)

    def _rename(self) -> None:
        replaced: Path | None = None
        if self.output.is_dir() and any(self.output.iterdir()):
            replaced = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.replaced.", dir=self.output.parent))
            os.rename(self.output, replaced)
        os.rename(self.directory, self.output)
        sync_directory(self.output.parent)
        (self.output / JOURNAL_FILE).unlink()
        if replaced is not None:
            shutil.rmtree(replaced)


def _check_unlocked(journal: Path) -> None:
    if not journal.exists():
        return
    descriptor = os.open(journal, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputExistsError(f"{journal.parent}: another process is compressing into it") from error
    finally:
        os.close(descriptor)
