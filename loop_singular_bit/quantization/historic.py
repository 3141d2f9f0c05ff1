"""The scheme of the old documents in today's format: sign of w - mean, standard deviation as the scale, 2 % outliers.

Kept so that old and new can be compared, not because it is good: the standard deviation is not the least-squares scale,
and outliers by magnitude are not where the planes leave the largest error.

What differs from the old code: mean, scale and outlier count are per row, not per tensor (so that rows can be quantized
one block at a time), and outliers are int8 times one scale per row, not float16.
"""

from __future__ import annotations

import torch

from loop_singular_bit import reference
from loop_singular_bit.packed_weight import PackedWeight

# Rows at once: the float64 copy and the sort need about 40 bytes per weight.
_BLOCK_ROWS = 256


def quantize_historic(weight: torch.Tensor, outliers: int) -> PackedWeight:
    """Packs [out_features, in_features] with one plane, means and `outliers` largest magnitudes per row.

    Blocks of a multiple of 32 rows give the bytes of the whole weight.

    Raises:
        ValueError: NaN or infinity in the weight, naming row and column.
    """
    first_rows = range(0, weight.shape[0], _BLOCK_ROWS)
    blocks = [_quantize_rows(weight[row : row + _BLOCK_ROWS], outliers, row) for row in first_rows]
    tensors = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return PackedWeight.from_tensors(tensors, weight.shape[0], weight.shape[1])


def _quantize_rows(weight: torch.Tensor, outliers: int, first_row: int) -> dict[str, torch.Tensor]:
    rows = weight.double()
    if not torch.isfinite(rows).all():
        row, column = (~torch.isfinite(rows)).nonzero()[0].tolist()
        value = rows[row, column].item()
        raise ValueError(f"weight: expected finite values, got {value} at row {first_row + row}, column {column}")
    # A stable sort: equal magnitudes are taken from the left, whatever the block or the machine.
    columns = rows.abs().sort(dim=1, descending=True, stable=True).indices[:, :outliers].sort(dim=1).values
    is_normal = torch.ones_like(rows, dtype=torch.bool).scatter_(1, columns, False)
    count = is_normal.sum(dim=1, keepdim=True).clamp_min(1)
    mean = rows.where(is_normal, 0.0).sum(dim=1, keepdim=True) / count
    variance = (rows - mean).square().where(is_normal, 0.0).sum(dim=1, keepdim=True) / count
    scale = variance.sqrt()
    is_positive = rows >= mean

    mean, scale = mean.half(), scale.half()
    planes = mean.double() + torch.where(is_positive, scale.double(), -scale.double())
    residual = (rows - planes).gather(1, columns)
    outlier_scale = (residual.abs().amax(dim=1, keepdim=True) / 127).half()
    # A scale that underflows float16 stands for deltas of nothing.
    unit = outlier_scale.double()
    deltas = torch.where(unit > 0, residual / unit.where(unit > 0, 1.0), 0.0).round().clamp(-127, 127)
    return {
        "signs": reference.pack_signs(is_positive.unsqueeze(0)),
        "scales": _tiles(scale),
        "outlier_columns": _tiles(columns.to(torch.int32)).to(torch.uint16),
        "outlier_deltas": _tiles(deltas.to(torch.int8)),
        "outlier_scales": _tiles(outlier_scale).squeeze(1),
        "means": _tiles(mean).squeeze(1),
    }


def _tiles(by_row: torch.Tensor) -> torch.Tensor:
    """[rows, X] -> [row_tiles, X, 32], padded with zeros."""
    rows, width = by_row.shape
    padded = by_row.new_zeros((-(-rows // 32) * 32, width))
    padded[:rows] = by_row
    return padded.reshape(-1, 32, width).transpose(1, 2).contiguous()
