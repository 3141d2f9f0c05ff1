"""One dense weight to a PackedWeight, from the weight alone or with the importance of its columns."""

from __future__ import annotations

import torch

from loop_singular_bit import ops
from loop_singular_bit.packed_weight import MAX_IN_FEATURES, PackedWeight
from loop_singular_bit.quantization.historic import quantize_historic
from loop_singular_bit.quantization.presets import DEFAULT_PRESET, Preset, find_preset, outlier_count

# Enough: on 4096 x 4096 Student-t weights with loud columns, two planes leave a relative error of 0.31892 with 1024
# rows and 0.31873 with all. And small: a stream holds these rows, 29 MB for 14,336 columns of bfloat16, not 117.
MAX_COLUMN_SCALE_ROWS = 1024

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def column_scale_rows(out_features: int) -> torch.Tensor:
    """int64 indices of the rows that column scales are fitted on: all of them up to 1024, else 1024 evenly spread."""
    count = min(out_features, MAX_COLUMN_SCALE_ROWS)
    return torch.arange(count, dtype=torch.int64) * out_features // count


def quantize_weight(
    weight: torch.Tensor,
    preset: str | Preset = DEFAULT_PRESET,
    *,
    planes: int | None = None,
    outlier_fraction: float | None = None,
    column_importance: torch.Tensor | None = None,
    column_scales: bool | torch.Tensor = True,
) -> PackedWeight:
    """Packs a weight [out_features, in_features] of any float dtype.

    Blocks of a multiple of 32 rows give the bytes of the whole weight when they are given the column scales that
    `fit_column_scales(weight[column_scale_rows(out_features)])` gives for it.

    Args:
        preset: name or `Preset`: where planes, outlier_fraction, column scales and means come from.
        planes: 1 to 8 sign planes instead of the preset's.
        outlier_fraction: outliers of a row over its columns instead of the preset's; at least one per row.
        column_importance: [in_features], >= 0: weight of each column's squared error, such as the mean square of the
            activations that meet it. None weighs them alike.
        column_scales: False for none; a float16 tensor [in_features] of given ones; True for what the preset says.

    Raises:
        ValueError: not two dimensions, empty, too wide, NaN or infinity in the weight, or an option out of range.
        TypeError: not a floating-point tensor.
    """
    chosen = find_preset(preset)
    _check_weight(weight)
    if weight.dtype not in _FLOAT_DTYPES:
        weight = weight.float()
    weight = weight.detach()
    out_features, in_features = weight.shape
    fraction = chosen.outlier_fraction if outlier_fraction is None else outlier_fraction
    outliers = outlier_count(in_features, fraction)
    if chosen.name == "historic":
        if column_importance is not None or planes not in (None, 1):
            raise ValueError("preset 'historic' has one plane and takes no column importance")
        return quantize_historic(weight, outliers)

    if column_importance is not None:
        column_importance = column_importance.detach().float().contiguous()
    scales: torch.Tensor | None = None
    if isinstance(column_scales, torch.Tensor):
        scales = column_scales
    elif column_scales and chosen.column_scales:
        rows = weight if out_features <= MAX_COLUMN_SCALE_ROWS else weight[column_scale_rows(out_features)]
        scales = ops.fit_column_scales(rows, column_importance)
    signs, row_scales, outlier_columns, outlier_deltas, outlier_scales, means = ops.quantize(
        weight, chosen.planes if planes is None else planes, outliers, scales, column_importance, chosen.means
    )
    return PackedWeight(
        signs,
        row_scales,
        outlier_columns,
        outlier_deltas,
        outlier_scales,
        out_features=out_features,
        in_features=in_features,
        column_scales=scales,
        means=means if chosen.means else None,
    )


def quantize_embedding_weight(
    weight: torch.Tensor, preset: str | Preset = DEFAULT_PRESET, *, outlier_fraction: float | None = None
) -> PackedWeight:
    """Packs the weight [num_embeddings, embedding_dim] of an embedding or an output head.

    With the preset's `embedding_planes` and without column scales: the bundled model's tied embedding loses 39 % less
    KL divergence at 6 planes, and 36 % less at 8, than with. `historic` says nothing about embeddings and heads; they
    are packed as `b2` packs them.

    Raises:
        ValueError, TypeError: see `quantize_weight`.
    """
    chosen = find_preset(preset)
    base = find_preset(DEFAULT_PRESET) if chosen.name == "historic" else chosen
    return quantize_weight(
        weight, base, planes=chosen.embedding_planes, outlier_fraction=outlier_fraction, column_scales=False
    )


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a floating-point tensor, got {kind}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions [out_features, in_features], got shape {list(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one row and one column, got shape {list(weight.shape)}")
    if weight.shape[1] > MAX_IN_FEATURES:
        raise ValueError(f"weight: expected at most {MAX_IN_FEATURES} columns, got shape {list(weight.shape)}")
