"""The packed format in plain PyTorch: slow, obvious, what kernels are tested against. Layout: docs/packed_format.md."""

from __future__ import annotations

import math

import torch


def pack_signs(is_positive: torch.Tensor) -> torch.Tensor:
    """Packs booleans [planes, out_features, in_features] into int32 [row_tiles, planes, words, 32].

    Element [t, p, w, r] holds columns 32w .. 32w+31 of row 32t+r of plane p; bit b is column 32w+b, 1 is +1.
    Padded rows and columns are 0 bits.
    """
    planes, rows, columns = is_positive.shape
    row_tiles, words = math.ceil(rows / 32), math.ceil(columns / 32)
    padded = torch.zeros(planes, row_tiles * 32, words * 32, dtype=torch.int64, device=is_positive.device)
    padded[:, :rows, :columns] = is_positive
    bits = padded.reshape(planes, row_tiles, 32, words, 32)
    values = (bits << torch.arange(32, device=is_positive.device)).sum(dim=-1)
    signed = torch.where(values >= 2**31, values - 2**32, values)
    return signed.permute(1, 0, 3, 2).to(torch.int32).contiguous()


def unpack_signs(signs: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Inverse of `pack_signs`: int32 [row_tiles, planes, words, 32] to booleans [planes, out_features, in_features]."""
    row_tiles, planes, words, _ = signs.shape
    bits = (signs.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=signs.device)) & 1
    rows = bits.permute(1, 0, 3, 2, 4).reshape(planes, row_tiles * 32, words * 32)
    return rows[:, :out_features, :in_features].bool()


def dequantize(
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The dense weight [out_features, in_features], computed in float64 and rounded once to `dtype`.

    weight[n, k] = (means[n] + sum_p scales[n, p] * sign[n, p, k] + outlier_delta[n, k]) * column_scales[k]
    """
    is_positive = unpack_signs(signs, out_features, in_features)
    sign = torch.where(is_positive, 1.0, -1.0).double()
    plane_scales = _by_row(scales, out_features).double()  # [out_features, planes]
    weight = torch.einsum("np,pnk->nk", plane_scales, sign)
    if means is not None:
        weight += means.reshape(-1)[:out_features, None].double()
    columns = _by_row(outlier_columns.to(torch.int64), out_features)
    deltas = _by_row(outlier_deltas, out_features).double() * outlier_scales.reshape(-1)[:out_features, None].double()
    in_range = columns < in_features
    weight.scatter_add_(1, columns.where(in_range, 0), deltas.where(in_range, 0.0))
    if column_scales is not None:
        weight *= column_scales.double()
    return weight.to(dtype)


def linear(
    input: torch.Tensor,
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`input [..., in_features]` times the transposed weight, in float64, rounded once to the dtype of the input."""
    weight = dequantize(
        signs,
        scales,
        outlier_columns,
        outlier_deltas,
        outlier_scales,
        column_scales,
        means,
        out_features,
        input.shape[-1],
        dtype=torch.float64,
    )
    output = input.double() @ weight.T
    if bias is not None:
        output = output + bias.double()
    return output.to(input.dtype)


def packed_nbytes(
    out_features: int,
    in_features: int,
    planes: int,
    outliers: int,
    column_scales: bool = True,
    means: bool = False,
) -> int:
    """Stored bytes of one packed weight: the size formula of docs/packed_format.md."""
    rows = 32 * math.ceil(out_features / 32)
    words = math.ceil(in_features / 32)
    bytes_per_row = 4 * planes * words + 2 * planes + 3 * outliers + 2 + (2 if means else 0)
    return rows * bytes_per_row + (2 * in_features if column_scales else 0)


def historic_bitmap_bits(outlier_fraction: float) -> float:
    """Bits per weight that the old documents describe: a bitmap, a sign for each normal weight, 16 bits an outlier."""
    return 1.0 + (1.0 - outlier_fraction) + 16.0 * outlier_fraction


def historic_stored_bits(outlier_fraction: float) -> float:
    """Bits per weight that the old code counted: a bitmap, 8 bits a sign, 16 bits an outlier."""
    return 1.0 + 8.0 * (1.0 - outlier_fraction) + 16.0 * outlier_fraction


def _by_row(tensor: torch.Tensor, out_features: int) -> torch.Tensor:
    """[row_tiles, X, 32] -> [out_features, X]."""
    return tensor.transpose(1, 2).flatten(0, 1)[:out_features]
