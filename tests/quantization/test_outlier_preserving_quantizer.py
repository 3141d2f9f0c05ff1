"""OutlierPreservingQuantizer: the keys that users of the old API index, with honest values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loop_singular_bit import OutlierPreservingQuantizer, PackedWeight, quantize_weight
from loop_singular_bit.quantization.presets import PRESETS


def test_result_has_the_keys_of_the_old_api_and_they_are_true() -> None:
    weight = torch.randn(96, 500) * 0.02
    quantizer = OutlierPreservingQuantizer(0.02)
    result = quantizer.quantize(weight, "model.layers.0.self_attn.q_proj.weight")
    dense = quantizer.dequantize(result)
    error = dense - weight
    packed = result["compressed_data"]
    assert isinstance(packed, PackedWeight) and packed.outliers == 10
    assert result["weight_name"] == "model.layers.0.self_attn.q_proj.weight"
    assert result["original_shape"] == (96, 500) and result["original_dtype"] == torch.float32
    stored = sum(tensor.nbytes for tensor in packed.tensors().values())
    assert result["compression_ratio"] == pytest.approx(96 * 500 * 4 / stored)
    metrics = result["quality_metrics"]
    relative = (error.norm() / weight.norm()).item()
    assert metrics["mse_error"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert metrics["mae_error"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert metrics["relative_error_percent"] == pytest.approx(100 * relative, rel=1e-5)
    assert metrics["snr_db"] == pytest.approx(-20 * math.log10(relative), rel=1e-5)
    spread = (weight.max() - weight.min()).item()
    assert metrics["mae_over_range_percent"] == pytest.approx(100 * error.abs().mean().item() / spread, rel=1e-5)
    assert result["quality_error_percent"] == metrics["relative_error_percent"]
    assert result["outlier_statistics"] == {"outlier_count": 960, "outliers_per_row": 10, "outlier_ratio": 0.02}
    assert result["size_analysis"] == {
        "original_size_bytes": 96 * 500 * 4,
        "compressed_size_bytes": stored,
        "bits_per_weight": packed.bits_per_weight,
        "part_bytes": {name: tensor.nbytes for name, tensor in packed.tensors().items()},
    }


def test_without_a_ratio_the_preset_decides() -> None:
    quantizer = OutlierPreservingQuantizer(None, preset="b4")
    assert quantizer.outlier_ratio == PRESETS["b4"].outlier_fraction
    result = quantizer.quantize(torch.randn(40, 256), "w")
    assert result["compressed_data"].planes == 4
    assert result["outlier_statistics"]["outliers_per_row"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_dequantize_gives_shape_and_dtype_of_the_original(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    quantizer = OutlierPreservingQuantizer(0.02)
    result = quantizer.quantize(weight, "w")
    dense = quantizer.dequantize(result)
    assert dense.shape == weight.shape and dense.dtype == dtype
    assert result["size_analysis"]["original_size_bytes"] == 40 * 64 * dtype.itemsize


def test_a_weight_of_more_than_2_to_the_24_elements() -> None:
    """torch.quantile, which the old code used, ends there."""
    weight = torch.randn(4100, 4096).bfloat16()
    assert weight.numel() > 2**24
    result = OutlierPreservingQuantizer().quantize(weight, "mlp.gate_proj.weight")
    # 4100 rows are stored as 4128.
    assert result["compression_ratio"] == pytest.approx(16 / 2.2031 * 4100 / 4128, rel=1e-3)
    assert 9 < result["quality_metrics"]["snr_db"] < 11


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), ()])
def test_refuses_what_is_no_matrix_and_names_it(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^model\.norm\.weight: weight: expected 2 dimensions"):
        OutlierPreservingQuantizer(0.02).quantize(torch.randn(shape), "model.norm.weight")


def test_refuses_other_dtypes_and_values_and_names_the_weight() -> None:
    with pytest.raises(TypeError, match=r"^ids: weight: expected a floating-point tensor, got torch.int64"):
        OutlierPreservingQuantizer(0.02).quantize(torch.zeros(4, 4, dtype=torch.int64), "ids")
    weight = torch.randn(40, 64)
    weight[5, 6] = float("inf")
    with pytest.raises(ValueError, match=r"^up_proj: .*row 5.*column 6"):
        OutlierPreservingQuantizer(0.02).quantize(weight, "up_proj")


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_refuses_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        OutlierPreservingQuantizer(ratio)


def test_a_subclass_decides_how_weights_are_packed() -> None:
    class MorePlanesForDownProjections(OutlierPreservingQuantizer):
        def quantize_weight(self, weight: torch.Tensor, name: str) -> PackedWeight:
            return quantize_weight(weight, planes=4 if "down_proj" in name else 2)

    quantizer = MorePlanesForDownProjections()
    results: dict[str, dict[str, Any]] = {
        name: quantizer.quantize(torch.randn(64, 96), name) for name in ("up_proj", "down_proj")
    }
    assert {name: result["compressed_data"].planes for name, result in results.items()} == {
        "up_proj": 2,
        "down_proj": 4,
    }
    errors = {name: result["quality_error_percent"] for name, result in results.items()}
    assert errors["down_proj"] < 0.5 * errors["up_proj"]
