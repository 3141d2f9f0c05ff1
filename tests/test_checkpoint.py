"""Packed checkpoints: read back, inspected, and every kind of damage found by verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from source_checkpoints import llama_tensors, write_llama

from loop_singular_bit.checkpoint import is_packed_checkpoint, read_packed_checkpoint
from loop_singular_bit.checkpoint_inspection import inspect_checkpoint
from loop_singular_bit.checkpoint_verification import verify_checkpoint
from loop_singular_bit.compressor import LoopCompressor
from loop_singular_bit.errors import CheckpointError
from loop_singular_bit.quantization.quantize_weight import quantize_weight
from loop_singular_bit.safetensors_stream import SafetensorsReader, file_sha256

pytestmark = pytest.mark.filterwarnings("ignore::loop_singular_bit.quantization.presets.UncalibratedWarning")

DOWN = "model.layers.0.mlp.down_proj"  # 136 columns: 24 padding bits in the last word
GATE = "model.layers.0.mlp.gate_proj"  # 136 rows: 24 padding rows in the last tile


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", tied=True)


@pytest.fixture
def packed(tmp_path: Path, source: Path) -> Path:
    LoopCompressor(target_ram_mb=None, max_shard_gb=100e-6).compress_model(source, tmp_path / "packed")
    return tmp_path / "packed"


def shard_of(packed: Path, tensor: str) -> Path:
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    return packed / index["weight_map"][tensor]


def change(packed: Path, tensor: str, edit: Callable[[torch.Tensor], None], *, hashed: bool = True) -> None:
    """Edits a stored tensor in place and brings the checksums up to date."""
    path = shard_of(packed, tensor)
    with SafetensorsReader(path) as reader:
        values, entry = reader.read(tensor), reader.entry(tensor)
    edit(values)
    content = bytearray(path.read_bytes())
    content[entry.offset : entry.offset + entry.nbytes] = bytes(
        values.contiguous().view(torch.uint8).flatten().tolist()
    )
    old = file_sha256(path)
    path.write_bytes(content)
    if hashed:
        sums = packed / "checksums.sha256"
        sums.write_text(sums.read_text().replace(old, file_sha256(path)))


def test_modules_are_read_whole_and_by_rows(packed: Path) -> None:
    expected = quantize_weight(llama_tensors(tied=True)[f"{GATE}.weight"])
    with read_packed_checkpoint(packed) as checkpoint:
        whole = checkpoint.packed_weight(GATE)
        last = checkpoint.packed_rows(GATE, 96, 40)
        assert checkpoint.tied_modules == {"lm_head": "model.embed_tokens"}
        assert checkpoint.kept_tensors == [
            *("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
            *("model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
            "model.norm.weight",
        ]
        for first, rows in ((1, 32), (128, 9), (0, 0), (-32, 32)):
            with pytest.raises(ValueError, match="multiple of 32"):
                checkpoint.packed_rows(GATE, first, rows)
        with pytest.raises(KeyError, match=r"model\.norm"):
            checkpoint.packed_weight("model.norm")
    assert torch.equal(whole.dequantize(), expected.dequantize())
    assert torch.equal(last.dequantize(), expected.dequantize()[96:])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("quantization_config"), "not packed"),
        (lambda config: config["quantization_config"].update(quant_method="gptq"), "not packed"),
        (
            lambda config: config["quantization_config"].update(format_version=2),
            "format_version 2: this package reads 1",
        ),
        (lambda config: config["quantization_config"].update(modules=[]), "modules: expected an object"),
        (lambda config: config["quantization_config"]["modules"].update(x=3), "module x: expected an object with kind"),
        (lambda config: config["quantization_config"]["modules"][GATE].update(planes=9), f"module {GATE}: planes"),
        (lambda config: config["quantization_config"]["modules"][GATE].update(planes="2"), f"module {GATE}: planes"),
        (lambda config: config["quantization_config"]["modules"][GATE].pop("outliers"), f"module {GATE}: .*missing"),
        (
            lambda config: config["quantization_config"]["modules"][GATE].update(planes=3),
            r"gate_proj\.signs: expected I32",
        ),
        (
            lambda config: config["quantization_config"]["modules"][GATE].update(out_features=2**39),
            r"gate_proj\.signs: expected I32",
        ),
        (
            lambda config: config["quantization_config"]["modules"].update(
                gone=config["quantization_config"]["modules"][GATE]
            ),
            r"tensor gone\.signs is missing",
        ),
    ],
)
def test_configurations_that_disagree_with_the_shards_are_refused(
    packed: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_packed_checkpoint(packed)
    assert str(packed) in str(caught.value)


def test_is_packed_checkpoint(tmp_path: Path, source: Path, packed: Path) -> None:
    assert is_packed_checkpoint(packed)
    assert not is_packed_checkpoint(source)
    assert not is_packed_checkpoint(tmp_path / "nowhere")


def test_inspection_counts_every_byte(packed: Path) -> None:
    facts = inspect_checkpoint(packed)
    shards = list(packed.glob("*.safetensors"))
    stored = [entry.nbytes for shard in shards for entry in SafetensorsReader(shard).entries.values()]
    assert facts["bytes"] == sum(stored) == sum(facts["part_bytes"].values())
    assert facts["shards"] == {shard.name: shard.stat().st_size for shard in shards}
    assert facts["parameters"] == sum(tensor.numel() for tensor in llama_tensors(tied=True).values())
    assert facts["bits_per_parameter"] == pytest.approx(8 * sum(stored) / facts["parameters"])
    assert sum(facts["shares"].values()) == pytest.approx(1)
    assert facts["shares"]["signs"] == pytest.approx(facts["part_bytes"]["signs"] / facts["bytes"])
    bits = facts["bits_per_weight"]
    assert 2 < bits["linears"] < bits["all"] < bits["embeddings"] < 9
    gate = next(module for module in facts["modules"] if module["name"] == GATE)
    assert gate["bits_per_weight"] == pytest.approx(8 * gate["bytes"] / (136 * 64))


def test_an_undamaged_checkpoint_passes_and_its_errors_are_those_of_the_report(source: Path, packed: Path) -> None:
    alone = verify_checkpoint(packed)
    assert alone["passed"] and alone["relative_error"] is None
    calls: list[tuple[str, int, int]] = []
    results = verify_checkpoint(packed, source, lambda *call: calls.append(call))
    assert results["passed"], results["problems"]
    assert set(results["checksums"].values()) == {"match"}
    report = json.loads((packed / "compression_report.json").read_text())
    expected = {layer["name"]: layer["relative_error"] for layer in report["layer_results"]}
    assert {error["name"]: error["relative_error"] for error in results["errors"]} == pytest.approx(expected)
    assert results["relative_error"] == pytest.approx(report["compression_summary"]["relative_error"])
    assert calls[-1] == ("", 15, 15)


def set_value(index: tuple[Any, ...], value: float) -> Callable[[torch.Tensor], None]:
    def edit(values: torch.Tensor) -> None:
        if values.dtype == torch.uint16:
            values.view(torch.int16)[index] = int(value)
        else:
            values[index] = value

    return edit


def swap_planes(values: torch.Tensor) -> None:
    values[0, :, 3] = values[0, :, 3].flip(0)


@pytest.mark.parametrize(
    ("tensor", "edit", "problem"),
    [
        (f"{DOWN}.outlier_columns", set_value((1, 1, 7), 136), "below in_features = 136, got 136 at row 39"),
        (f"{DOWN}.outlier_columns", set_value((0, 0, 0), 135), "ascending"),
        (f"{DOWN}.scales", set_value((0, 1, 2), float("nan")), "scales"),
        (f"{DOWN}.scales", set_value((0, 1, 2), -1.0), "scales: expected >= 0"),
        (f"{DOWN}.scales", swap_planes, "largest plane first"),
        (f"{DOWN}.outlier_scales", set_value((0, 4), float("inf")), "outlier_scales"),
        (f"{DOWN}.column_scales", set_value((5,), float("inf")), "column_scales"),
        (f"{DOWN}.column_scales", set_value((5,), 0.0), "column_scales: expected > 0"),
        (f"{DOWN}.signs", set_value((0, 0, 4, 0), -1), "padding columns"),
        (f"{GATE}.signs", set_value((4, 0, 0, 31), 1), "signs: expected zeros in the 24 padding rows"),
        (f"{GATE}.outlier_deltas", set_value((4, 0, 8), 1), "outlier_deltas: expected zeros in the 24 padding rows"),
        (f"{GATE}.scales", set_value((4, 0, 8), 1), "scales: expected zeros in the 24 padding rows"),
    ],
)
def test_verify_finds_values_that_break_the_format(
    packed: Path, tensor: str, edit: Callable[[torch.Tensor], None], problem: str
) -> None:
    change(packed, tensor, edit)
    results = verify_checkpoint(packed)
    assert not results["passed"]
    assert [found["where"] for found in results["problems"]] == [tensor.rpartition(".")[0]]
    assert problem in results["problems"][0]["problem"]


def test_verify_finds_flipped_bits_by_their_hash(packed: Path) -> None:
    def flip(signs: torch.Tensor) -> None:
        signs[0, 0, 0, 0] ^= 1

    change(packed, f"{DOWN}.signs", flip, hashed=False)
    results = verify_checkpoint(packed)
    shard = shard_of(packed, f"{DOWN}.signs").name
    assert results["problems"] == [{"where": shard, "problem": "SHA-256 differs"}]
    assert results["checksums"][shard] == "mismatch"
    (packed / "checksums.sha256").unlink()
    assert {found["problem"] for found in verify_checkpoint(packed)["problems"]} == {"not listed in checksums.sha256"}


def test_verify_against_finds_what_was_changed_added_or_lost(tmp_path: Path, source: Path, packed: Path) -> None:
    change(packed, "model.norm.weight", lambda norm: norm.mul_(2))
    problems = verify_checkpoint(packed, source)["problems"]
    assert [found["where"] for found in problems] == ["model.norm.weight"]
    assert "differs from the original" in problems[0]["problem"]
    other = write_llama(tmp_path / "other", layers=3)
    problems = {found["where"]: found["problem"] for found in verify_checkpoint(packed, other)["problems"]}
    assert problems["model.layers.2.mlp.up_proj.weight"] == "missing; the original has it"
    fewer = write_llama(tmp_path / "fewer", layers=1)
    problems = {found["where"]: found["problem"] for found in verify_checkpoint(packed, fewer)["problems"]}
    assert problems["model.layers.1.mlp.up_proj.weight"] == "not in the original"


def test_verify_finds_broken_ties(packed: Path) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["tied_modules"] = {"lm_head": "nowhere", DOWN: "model.embed_tokens"}
    path.write_text(json.dumps(config))
    problems = {found["where"]: found["problem"] for found in verify_checkpoint(packed)["problems"]}
    assert problems == {
        "lm_head": "tied to nowhere, which is not a packed module",
        DOWN: "tied to model.embed_tokens, but has a weight of its own",
    }
