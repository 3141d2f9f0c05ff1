"""docs/packed_format.md, the golden files, the Python reference and the operators say the same."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loop_singular_bit import ops, reference
from loop_singular_bit.packed_weight import FORMAT_VERSION, TENSOR_NAMES, PackedLayout, PackedWeight

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = (Path(__file__).parent.parent / "docs" / "packed_format.md").read_text()
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "packed_format_v1.json").read_text())


def golden_weight(name: str) -> PackedWeight:
    stored = load_file(GOLDEN / "packed_format_v1.safetensors")
    tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    return PackedWeight.from_tensors(tensors, EXPECTED[name]["out_features"], EXPECTED[name]["in_features"])


@pytest.mark.parametrize("name", EXPECTED)
def test_reference_reads_the_golden_bytes(name: str) -> None:
    packed = golden_weight(name)
    packed.validate()
    weight = reference.dequantize(*packed.op_tensors(), packed.out_features, packed.in_features, dtype=torch.float64)
    assert torch.equal(weight, torch.tensor(EXPECTED[name]["expected"], dtype=torch.float64))
    input = torch.tensor(EXPECTED[name]["input"], dtype=torch.float64)
    output = reference.linear(input, *packed.op_tensors(), None, packed.out_features)
    torch.testing.assert_close(output, torch.tensor(EXPECTED[name]["output"], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", EXPECTED)
def test_operators_read_the_golden_bytes(name: str, isa: str) -> None:
    packed = golden_weight(name)
    expected = torch.tensor(EXPECTED[name]["expected"], dtype=torch.float64)
    torch.testing.assert_close(packed.dequantize().double(), expected, rtol=3e-7, atol=1e-8)
    embedded = ops.packed_embedding(
        torch.arange(packed.out_features), *packed.op_tensors(), packed.out_features, packed.in_features
    )
    assert torch.equal(embedded, packed.dequantize())
    input = torch.tensor(EXPECTED[name]["input"], dtype=torch.float32)
    output = torch.tensor(EXPECTED[name]["output"], dtype=torch.float64)
    for rows in (1, 40):
        given = packed.linear(input.expand(rows, -1), activation_precision="exact")
        torch.testing.assert_close(given.double(), output.expand(rows, -1), rtol=1e-5, atol=1e-4)


def test_golden_files_are_what_the_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert specification is not None and specification.loader is not None
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    generator.main()
    written = sorted(tmp_path.iterdir())
    assert [path.suffix for path in written] == [".json", ".safetensors", ".txt"]
    for path in written:
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes(), path.name


def test_text_and_safetensors_hold_the_same_bytes() -> None:
    name, seen = "", set()
    for line in (GOLDEN / "packed_format_v1.txt").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == "weight":
            name = value
            tensors = golden_weight(name).tensors()
        elif key in TENSOR_NAMES:
            assert bytes.fromhex(value) == tensors[key].numpy().tobytes(), (name, key)
            seen.add((name, key))
    assert seen == {(name, tensor) for name in EXPECTED for tensor in golden_weight(name).tensors()}


def test_document_shows_the_bytes_of_the_worked_example() -> None:
    packed = golden_weight("worked_example")
    shown = {name: torch.zeros_like(tensor).view(torch.uint8).numpy() for name, tensor in packed.tensors().items()}
    lane_bytes = {name: tensor.dtype.itemsize for name, tensor in packed.tensors().items()}
    lane = r"`([0-9a-f ]+)`[^|]*"
    row = re.compile(rf"^\| `(\w+)` \| tile 0((?:, \w+ \d)*) \| {lane}\| {lane}\|$", re.MULTILINE)
    found = row.findall(DOCUMENT)
    assert len(found) == 9
    for name, where, *lanes in found:
        index = (0, *(int(part.rsplit(" ", 1)[1]) for part in where.split(", ")[1:]))
        for position, text in enumerate(lanes):
            data = bytes.fromhex(text)
            assert len(data) == lane_bytes[name]
            shown[name][index][position * len(data) : (position + 1) * len(data)] = list(data)
    columns = r"for (?:each of the 40 columns|column (\d+))"
    one, *special = re.findall(rf"`([0-9a-f]{{2}} [0-9a-f]{{2}})` \([\d.]+\) {columns}", DOCUMENT)
    column_scales = bytearray(bytes.fromhex(one[0]) * 40)
    for text, column in special:
        column_scales[2 * int(column) : 2 * int(column) + 2] = bytes.fromhex(text)
    shown["column_scales"][:] = list(column_scales)
    for name, tensor in packed.tensors().items():
        assert shown[name].tobytes() == tensor.numpy().tobytes(), name


def test_document_shows_the_numbers_of_the_worked_example() -> None:
    block = re.search(r"```\n(row 0.*?)```", DOCUMENT, re.DOTALL)
    assert block is not None
    rows = [[float(number) for number in text.split()] for text in re.split(r"row \d", block[1])[1:]]
    assert rows == EXPECTED["worked_example"]["expected"]
    assert f"It takes {golden_weight('worked_example').nbytes} bytes, 800 of them" in DOCUMENT


def test_document_states_the_sizes_that_layouts_have() -> None:
    stated = re.findall(r"^\| ([1-8]) \| ([\d,]+) \| ([\d.]+) \|$", DOCUMENT, re.MULTILINE)
    assert [int(planes) for planes, _, _ in stated] == [1, 2, 3, 4]
    for planes, nbytes, bits in stated:
        layout = PackedLayout(4096, 4096, int(planes), 32)
        assert f"{layout.nbytes:,}" == nbytes
        assert f"{layout.bits_per_weight:.4f}" == bits


def test_document_lists_the_tensors_and_the_version() -> None:
    table = DOCUMENT.partition("## 2. Tensors")[2].partition("### Bit order")[0]
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| `\[(.*?)\]`", table, re.MULTILINE)
    sizes = {"T": 2, "P": 3, "W": 4, "O": 5, "K": 100, "32": 32}
    layout = PackedLayout(33, 100, planes=3, outliers=5, column_scales=True, means=True)
    assert {
        name: (getattr(torch, dtype), tuple(sizes[size] for size in shape.split(", "))) for name, dtype, shape in listed
    } == layout.tensors()
    assert DOCUMENT.startswith(f"# The packed format, version {FORMAT_VERSION}\n")


def test_configuration_in_the_document_is_one_that_layouts_accept() -> None:
    block = re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert block is not None
    config = json.loads(block[1])
    assert config["quant_method"] == "loop_singular_bit" and config["format_version"] == FORMAT_VERSION
    for fields in config["modules"].values():
        PackedLayout.from_dict(fields)
