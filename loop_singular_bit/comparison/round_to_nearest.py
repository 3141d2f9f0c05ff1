"""Rounding to the nearest level of an asymmetric grid per group of columns: what every other method has to beat."""

from __future__ import annotations

import torch


def fit_grid(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid from the smallest to the largest weight of each row, widened to contain zero.

    Args:
        weight: [..., group].

    Returns:
        scales [..., 1], rounded to float16 as they are stored; zero points [..., 1], integers of `bits` bits.
    """
    low = weight.amin(-1, keepdim=True).clamp(max=0)
    high = weight.amax(-1, keepdim=True).clamp(min=0)
    # Half a step of float16's subnormal numbers, so that no scale rounds to zero.
    scales = ((high - low) / (2**bits - 1)).clamp(min=6e-8).half().float()
    return scales, torch.round(-low / scales).clamp(0, 2**bits - 1)


def round_to_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    codes = (torch.round(weight / scales) + zeros).clamp(0, 2**bits - 1)
    return scales * (codes - zeros)


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The round trip of a weight [out_features, in_features]; the last group of a row may be shorter."""
    rows, columns = weight.shape
    # Zeros lie on every grid and widen none.
    padded = torch.nn.functional.pad(weight, (0, -columns % group_size))
    groups = padded.reshape(rows, -1, group_size)
    return round_to_grid(groups, *fit_grid(groups, bits), bits).reshape(rows, -1)[:, :columns]


def grid_bits(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Codes, and for each group of a row a float16 scale and a zero point of the codes' width."""
    return rows * (columns * bits + -(-columns // group_size) * (16 + bits))
