"""Targets of bits and bytes without a text: met, as well as errors of weights allow, and refused when impossible."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from loop_singular_bit import LoopCompressor, OutlierPreservingQuantizer
from loop_singular_bit.errors import QualityRefusedError
from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.presets import UncalibratedWarning

sys.path.insert(0, str(Path(__file__).parent))

from source_checkpoints import llama_config, llama_tensors, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), llama_config(3), llama_tensors(3))


def compress(source: Path, output: Path | None = None, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)
        return LoopCompressor(target_ram_mb=None, **options).compress_model(source, output)


def planes_of(results: dict[str, Any]) -> dict[str, int]:
    return {layer["name"]: layer["planes"] for layer in results["layer_results"] if "proj" in layer["name"]}


def bits_of(results: dict[str, Any]) -> float:
    return float(results["compression_summary"]["bits_per_weight_linears"])


def test_bits_between_two_presets_are_filled_and_used(source: Path) -> None:
    uniform = compress(source)
    mixed = compress(source, target_bits=bits_of(uniform) + 0.6)
    assert set(planes_of(uniform).values()) == {2}
    assert set(planes_of(mixed).values()) == {2, 3}
    assert bits_of(uniform) + 0.4 < bits_of(mixed) <= bits_of(uniform) + 0.6
    assert mixed["compression_summary"]["relative_error"] < uniform["compression_summary"]["relative_error"]
    assert mixed["options"]["layouts"]


@pytest.mark.parametrize("max_shard_gb", [5.0, 60e-6])
def test_bytes_of_the_whole_checkpoint(source: Path, tmp_path: Path, max_shard_gb: float) -> None:
    smaller, larger = (
        compress(source, preset=preset)["compression_summary"]["output_bytes"] for preset in ("b2", "b3")
    )
    target = (smaller + larger) // 2
    results = compress(source, tmp_path / "packed", target_storage_gb=target / 1e9, max_shard_gb=max_shard_gb)
    stored = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert results["compression_summary"]["output_bytes"] == stored
    assert 0.98 * target < stored <= target
    again = compress(source, tmp_path / "again", target_storage_gb=target / 1e9, max_shard_gb=max_shard_gb, threads=1)
    assert again["options"]["layouts"] == results["options"]["layouts"]


def test_more_than_enough_buys_planes_and_outliers(source: Path) -> None:
    results = compress(source, target_storage_gb=1.0)
    assert set(planes_of(results).values()) == {4}
    assert {layer["outliers"] for layer in results["layer_results"] if "down_proj" in layer["name"]} == {5}


def test_only_checked_when_layouts_are_uniform(source: Path) -> None:
    compressor = LoopCompressor(target_ram_mb=None, target_storage_gb=1.0, adaptive_precision=False, preset="b4")
    assert set(planes_of(compressor.compress_model(source)).values()) == {4}
    assert compressor.validate_compression()["storage"]["status"] == "pass"
    historic = LoopCompressor(target_ram_mb=None, target_storage_gb=1.0, preset="historic")
    with pytest.warns(UncalibratedWarning):
        assert set(planes_of(historic.compress_model(source)).values()) == {1}


def test_as_many_bits_as_the_preset_takes(source: Path) -> None:
    uniform, adaptive = (compress(source, adaptive_precision=adapts) for adapts in (None, True))
    assert bits_of(adaptive) <= bits_of(uniform)
    assert planes_of(adaptive)


def test_targets_that_cannot_be_met_say_what_can(source: Path) -> None:
    with pytest.raises(
        ValueError, match=r"target_bits: 0\.5 bits .* the smallest layouts need [1-2]\.\d+, the largest"
    ):
        compress(source, target_bits=0.5, force=True)
    with pytest.raises(
        ValueError, match=r"1e-06 GB cannot be met: (0\.\d+) GB is the least, .* of embeddings"
    ) as error:
        compress(source, target_storage_gb=1e-6, force=True)
    least = float(str(error.value).split("cannot be met: ")[1].split(" GB")[0])
    results = compress(source, target_storage_gb=least, force=True)
    assert results["compression_summary"]["output_bytes"] <= least * 1e9
    with pytest.raises(ValueError, match="cannot be met"):
        compress(source, target_storage_gb=least - 2e-9, force=True)


def test_few_bits_need_force_whatever_the_preset(source: Path) -> None:
    with pytest.raises(QualityRefusedError, match=r"a target that leaves 1\.\d+ planes per weight .* unusable"):
        compress(source, preset="b4", target_bits=2.5)
    with pytest.warns(UncalibratedWarning):
        LoopCompressor(target_ram_mb=None, target_bits=4.5).compress_model(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncalibratedWarning)
        LoopCompressor(target_ram_mb=None, target_bits=8.0).compress_model(source)


def test_what_does_not_go_together(source: Path) -> None:
    class Mine(OutlierPreservingQuantizer):
        def quantize_weight(self, weight: torch.Tensor, name: str) -> PackedWeight:
            return super().quantize_weight(weight, name)

    for options, message in (
        ({"target_bits": 3.0, "target_storage_gb": 1.0}, "got both"),
        ({"target_bits": -1.0}, "expected a positive number"),
        ({"target_bits": 3.0, "adaptive_precision": False}, "acts through adaptive_precision"),
        ({"adaptive_precision": True, "preset": "historic"}, "are fixed"),
        ({"target_bits": 3.0, "quantizer": Mine()}, "with Mine are fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            LoopCompressor(**options)
    with pytest.raises(ValueError, match="error_compensation: needs calibration_texts"):
        compress(source, error_compensation=True)
    with pytest.raises(TypeError, match="got one string"):
        LoopCompressor().compress_model(source, calibration_texts="text")
