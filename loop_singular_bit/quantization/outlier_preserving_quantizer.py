"""One tensor in, a dictionary of sizes, errors and packed data out: the interface that users of the old API know."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.presets import DEFAULT_PRESET, Preset, find_preset, outlier_count
from loop_singular_bit.quantization.quantize_weight import quantize_weight
from loop_singular_bit.quantization.weight_errors import measure_weight_errors


class OutlierPreservingQuantizer:
    """Packs weights into sign planes and keeps in each row the weights that the planes represent worst.

    Made to be subclassed: override `quantize_weight` to pack in another way; `quantize`, `dequantize` and
    `LoopCompressor` then use it.

    Args:
        outlier_ratio: outliers over weights in a row, 0 to 1, at least one per row; None means the preset's 1/128.
        preset: name of a preset or a `Preset`: planes, column scales, means.

    Raises:
        ValueError: outlier_ratio or preset out of range.
    """

    calibration = "none"
    """What the quantizer knows about the inputs of the weights; "none" makes presets warn that need to know."""

    layouts: Mapping[str, tuple[int, int]] = MappingProxyType({})
    """Planes and outliers per row of the linears that do not get the preset's, by name of module."""

    def __init__(self, outlier_ratio: float | None = None, preset: str | Preset = DEFAULT_PRESET) -> None:
        self.preset = find_preset(preset)
        self.outlier_ratio = self.preset.outlier_fraction if outlier_ratio is None else outlier_ratio
        outlier_count(1, self.outlier_ratio)

    def quantize_weight(self, weight: torch.Tensor, name: str) -> PackedWeight:
        """Packs one weight [out_features, in_features]; the hook for subclasses.

        Raises:
            ValueError, TypeError: see `loop_singular_bit.quantize_weight`.
        """
        return quantize_weight(weight, self.preset, outlier_fraction=self.outlier_ratio)

    def quantize(self, tensor: torch.Tensor, weight_name: str = "weight") -> dict[str, Any]:
        """Packs a weight of any size and float dtype and measures what it costs and what it loses.

        Returns:
            weight_name, original_shape, original_dtype: of the tensor.
            compression_ratio: original bytes (in the tensor's own dtype) over stored bytes.
            quality_metrics: mse_error, mae_error, relative_error_percent (100 x Frobenius norm of the error over that
                of the weight), snr_db (signal to quantization noise), mae_over_range_percent (what the old documents
                called quality error: 100 x mean absolute error over the range of the weights).
            quality_error_percent: relative_error_percent again. It is the error of the weights, not of a model.
            outlier_statistics: outlier_count, outliers_per_row, outlier_ratio (stored outliers over weights).
            size_analysis: original_size_bytes, compressed_size_bytes, bits_per_weight (everything that is stored) and
                part_bytes (stored bytes of each packed tensor).
            compressed_data: the `PackedWeight`.

        Raises:
            ValueError: not two dimensions, empty, too wide, NaN or infinity; the message begins with the name.
            TypeError: not a floating-point tensor.
        """
        try:
            packed_weight = self.quantize_weight(tensor, weight_name)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{weight_name}: {error}") from error
        errors = measure_weight_errors(tensor, packed_weight)
        relative_error_percent = 100 * errors.relative_error
        layout = packed_weight.layout
        kept = packed_weight.out_features * packed_weight.outliers
        return {
            "weight_name": weight_name,
            "original_shape": tuple(tensor.shape),
            "original_dtype": tensor.dtype,
            "compression_ratio": tensor.nbytes / layout.nbytes,
            "quality_metrics": {
                "mse_error": errors.mse_error,
                "mae_error": errors.mae_error,
                "relative_error_percent": relative_error_percent,
                "snr_db": errors.sqnr_db,
                "mae_over_range_percent": errors.mae_over_range_percent,
            },
            "quality_error_percent": relative_error_percent,
            "outlier_statistics": {
                "outlier_count": kept,
                "outliers_per_row": packed_weight.outliers,
                "outlier_ratio": kept / tensor.numel(),
            },
            "size_analysis": {
                "original_size_bytes": tensor.nbytes,
                "compressed_size_bytes": layout.nbytes,
                "bits_per_weight": layout.bits_per_weight,
                "part_bytes": layout.part_nbytes(),
            },
            "compressed_data": packed_weight,
        }

    def dequantize(self, result: dict[str, Any]) -> torch.Tensor:
        """The dense weight that a result of `quantize` stands for, in the shape and dtype of the original."""
        packed_weight: PackedWeight = result["compressed_data"]
        dtype: torch.dtype = result["original_dtype"]
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            return packed_weight.dequantize(dtype)
        return packed_weight.dequantize(torch.float32).to(dtype)
