"""Packed weights made of random numbers, independent of the quantizer."""

from __future__ import annotations

from functools import lru_cache

import torch

from loop_singular_bit import reference
from loop_singular_bit.packed_weight import PackedLayout, PackedWeight


@lru_cache(maxsize=32)
def random_packed_weight(
    out_features: int,
    in_features: int,
    planes: int = 2,
    outliers: int = 3,
    column_scales: bool = True,
    means: bool = False,
    seed: int = 0,
    *,
    free_scales: bool = False,
) -> PackedWeight:
    """A valid packed weight with weights of about 1 / sqrt(in_features), so that products are of order 1.

    It is shared by all tests that ask for the same: never write to it.

    `free_scales` breaks the rules of docs/packed_format.md section 5 for plane scales.
    """
    random = torch.Generator().manual_seed(seed)
    layout = PackedLayout(out_features, in_features, planes, min(outliers, in_features), column_scales, means)
    rows, tiled = out_features, -(-out_features // 32) * 32
    size = in_features**-0.5

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64) * (high - low) + low

    def tiles(by_row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        padded = torch.zeros(tiled, *by_row.shape[1:], dtype=by_row.dtype)
        padded[:rows] = by_row
        return padded.reshape(tiled // 32, 32, *by_row.shape[1:]).movedim(1, -1).contiguous().to(dtype)

    if free_scales:
        scales = uniform(rows, planes, low=0.1, high=1.0).sort(dim=1, descending=True).values * size
    elif planes > 4:
        scales = uniform(rows, 1, low=0.5, high=1.0).half().double() * 2.0 ** -torch.arange(1, planes + 1) * size
    else:
        shares = uniform(rows, planes, low=1.0, high=2.0) * 2.0 ** -torch.arange(planes)
        levels = (126 * shares / shares.sum(dim=1, keepdim=True)).floor()
        levels[:, 0] += 126 - levels.sum(dim=1)
        scales = levels * uniform(rows, 1, low=0.5, high=1.0) * size / 126
    columns = torch.rand(rows, in_features, generator=random).topk(layout.outliers).indices.sort(dim=1).values
    tensors = {
        "signs": reference.pack_signs(torch.rand(planes, rows, in_features, generator=random) < 0.5),
        "scales": tiles(scales, torch.float16),
        "outlier_columns": tiles(columns.int(), torch.int32).to(torch.uint16),
        "outlier_deltas": tiles(torch.randint(-127, 128, (rows, layout.outliers), generator=random), torch.int8),
        "outlier_scales": tiles(uniform(rows, low=0.01, high=0.05) * size, torch.float16),
    }
    if column_scales:
        tensors["column_scales"] = uniform(in_features, low=0.5, high=2.0).half()
    if means:
        tensors["means"] = tiles(uniform(rows, low=-0.1, high=0.1) * size, torch.float16)
    return PackedWeight.from_tensors(tensors, out_features, in_features)


def random_bytes_packed_weight(layout: PackedLayout, seed: int = 0) -> PackedWeight:
    """Right shapes and dtypes, any content: NaN and infinite scales, columns up to 65,535, bits in the padding."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in layout.tensors().items():
        count = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=random).view(dtype).reshape(shape)
    return PackedWeight.from_tensors(tensors, layout.out_features, layout.in_features)


@lru_cache(maxsize=32)
def reference_dequantize(packed_weight: PackedWeight, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return reference.dequantize(
        *packed_weight.op_tensors(), packed_weight.out_features, packed_weight.in_features, dtype=dtype
    )
