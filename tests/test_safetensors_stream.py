"""The streaming reader and writer against the safetensors package, and against files made to hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_singular_bit.errors import CheckpointError
from loop_singular_bit.safetensors_stream import (
    ReadBuffer,
    SafetensorsReader,
    SafetensorsWriter,
    file_sha256,
    safetensors_header,
    tensor_bytes,
)

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16)
DTYPES += (torch.int32, torch.float32, torch.int64, torch.float64)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.randn(shape) * 50).to(torch.int32).remainder(2 if dtype == torch.bool else 100).to(dtype)


def test_reads_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    tensors = {f"t{number}": random_tensor(dtype, (7, 5)) for number, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert reader.metadata == {"format": "pt"}
        assert reader.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor), name
            assert reader.entry(name).torch_dtype == tensor.dtype


def test_rows_are_read_into_a_reused_buffer(tmp_path: Path) -> None:
    weight = torch.randn(50, 6).bfloat16()
    safetensors.torch.save_file({"w": weight}, tmp_path / "a.safetensors")
    buffer = ReadBuffer(50 * 6 * 2)
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        first = reader.read_rows("w", 0, 20, buffer)
        assert torch.equal(first, weight[:20])
        second = reader.read_rows("w", 30, 20, buffer)
        assert torch.equal(second, weight[30:])
        assert first.data_ptr() == second.data_ptr()
        rows = [0, 1, 2, 7, 30, 31, 49]
        assert torch.equal(reader.read_selected_rows("w", rows, buffer), weight[rows])
        with pytest.raises(ValueError, match="bytes 600 to 612"):
            reader.read_rows("w", 50, 1)


def test_the_safetensors_package_reads_what_was_written_even_unaligned(tmp_path: Path) -> None:
    tensors = {
        "z.odd": torch.randn(33).half(),
        "a.words": torch.arange(7, dtype=torch.int32),
        "b.deltas": torch.arange(3, dtype=torch.int8),
        "c.columns": torch.arange(5).to(torch.uint16),
        "d.norm": torch.randn(4),
    }
    names = {torch.float16: "F16", torch.int32: "I32", torch.int8: "I8", torch.uint16: "U16", torch.float32: "F32"}
    writer = SafetensorsWriter(
        tmp_path / "a.safetensors", [(name, names[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    )
    assert writer.entries["a.words"].offset % 4 == 2
    for name in reversed(tensors):
        half = tensors[name].numel() // 2
        writer.write_tensor(name, half * tensors[name].element_size(), tensors[name][half:])
        writer.write_tensor(name, 0, tensors[name][:half])
    assert not (tmp_path / "a.safetensors").exists()
    digest = writer.digest()
    writer.finish()
    assert digest == file_sha256(tmp_path / "a.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    assert list(SafetensorsReader(tmp_path / "a.safetensors").entries) == list(tensors)


def test_a_resumed_writer_keeps_data_under_the_same_header_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = SafetensorsWriter(path, [("w", "U8", (8,))])
    first.write("w", 0, b"12345678")
    end = first.file_bytes
    checksum = first.absorb(end)
    first.close()

    same = SafetensorsWriter(path, [("w", "U8", (8,))], resume=True)
    assert same.absorb(end, expected=1) is None
    assert same.absorb(end, expected=checksum) == checksum
    same.close()

    other = SafetensorsWriter(path, [("v", "U8", (8,))], resume=True)
    other.finish()
    assert path.read_bytes().endswith(b"\0" * 8)


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"[1]", b"", "not a JSON object"),
        (b'{"a":1,"a":2}', b"", "duplicate key 'a'"),
        ({"__metadata__": 3}, b"", "__metadata__"),
        ({"w": 3}, b"", "tensor w: expected the keys"),
        ({"w": entry(dtype="F33")}, b"\0" * 8, "tensor w: dtype 'F33' is not supported"),
        ({"w": entry(shape=[-2])}, b"\0" * 8, "tensor w: shape"),
        ({"w": entry(shape=[2.0])}, b"\0" * 8, "tensor w: shape"),
        ({"w": entry(shape=[True, 2])}, b"\0" * 8, "tensor w: shape"),
        ({"w": entry(shape=[1] * 17)}, b"\0" * 8, "tensor w: shape"),
        ({"w": entry(shape=[2**62, 4])}, b"\0" * 8, "tensor w: F32 .* needs 73786976294838206464 bytes"),
        ({"w": entry(offsets=[8, 0])}, b"\0" * 8, "tensor w: data_offsets"),
        ({"w": entry(offsets=[0, 8, 8])}, b"\0" * 8, "tensor w: data_offsets"),
        ({"w": entry(shape=[3])}, b"\0" * 8, "tensor w: F32 .* needs 12 bytes, data_offsets hold 8"),
        ({"w": entry()}, b"\0" * 7, "truncated: tensor w ends"),
        ({"w": entry()}, b"\0" * 9, "the tensors end at"),
        ({"w": entry(offsets=[8, 16])}, b"\0" * 16, "tensor w starts .* overlap or leave a hole"),
        ({"v": entry(), "w": entry(offsets=[4, 12])}, b"\0" * 12, "tensor w starts .* overlap or leave a hole"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = header_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsReader(path)
    assert str(path) in str(caught.value)


def test_lying_lengths_and_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsReader(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="regular file"):
        SafetensorsReader(tmp_path)
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="3 bytes are too short"):
        SafetensorsReader(tmp_path / "short")
    with pytest.raises(CheckpointError, match="at most 100000000 are allowed"):
        SafetensorsReader(header_file(tmp_path / "huge", {}, length=2**63))
    with pytest.raises(CheckpointError, match="truncated: the header needs"):
        SafetensorsReader(header_file(tmp_path / "cut", {}, length=1000))


def test_a_file_that_shrinks_after_it_was_opened_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.randn(100)}, path)
    with SafetensorsReader(path) as reader:
        os.truncate(path, reader.file_bytes - 40)
        with pytest.raises(CheckpointError, match=r"tensor w: the file ends at byte .*, 40 bytes early"):
            reader.read("w")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_no_mutation_of_a_file_does_more_than_raise(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    content = bytearray(safetensors_header([("w", "BF16", (4, 3)), ("v", "F32", (2,))]) + bytes(32))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        with SafetensorsReader(path) as reader:
            for found in reader.entries.values():
                assert 0 <= found.offset <= found.offset + found.nbytes <= len(content)
                reader.read(found.name)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_a_file_that_does_not_fit_is_refused_before_the_work_and_named(tmp_path: Path) -> None:
    program = f"""
import resource
from loop_singular_bit.safetensors_stream import SafetensorsWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    SafetensorsWriter({str(tmp_path / "a.safetensors")!r}, [("w", "U8", (20_000,))])
except OSError as error:
    assert error.filename.endswith("a.safetensors.partial") and "20" in str(error), error
    print("refused")
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout == "refused\n"
    assert not (tmp_path / "a.safetensors").exists()


def test_tensor_bytes_refuses_strides() -> None:
    assert bytes(tensor_bytes(torch.tensor([1, 2], dtype=torch.uint8))) == b"\1\2"
    assert bytes(tensor_bytes(torch.empty(0))) == b""
    with pytest.raises(ValueError, match="contiguous"):
        tensor_bytes(torch.zeros(4, 4).t()[1:])
