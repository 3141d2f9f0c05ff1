"""HQQ: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023. From the weights alone."""

from __future__ import annotations

import torch

# The published defaults: an l_p norm of the error with p = 0.7, its weight grows by 1 % in each of 20 steps.
_NORM = 0.7
_BETA = 10.0
_BETA_GROWTH = 1.01
_STEPS = 20
# Zero points are -low times the inverse scale, in float16: these keep them finite.
_LARGEST_INVERSE_SCALE = 2e4
_SMALLEST_SPAN = 1e-4


def half_quadratic(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The round trip of a weight [out_features, in_features].

    Scales are those of min and max of a group; zero points, real numbers, minimize the l_p norm of the error by turns
    with an auxiliary sparse error, and start from an integer at 4 bits. Groups run through the rows, one after another.

    Raises:
        ValueError: the weight does not split into whole groups.
    """
    if weight.numel() % group_size:
        raise ValueError(f"hqq: expected a multiple of {group_size} weights, got {tuple(weight.shape)}")
    groups = weight.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    span = high - low
    inverse_scales = ((2**bits - 1) / span).clamp(max=_LARGEST_INVERSE_SCALE)
    inverse_scales = torch.where(span <= _SMALLEST_SPAN, 1.0, inverse_scales)
    zeros = -low * inverse_scales
    if bits == 4:
        zeros = torch.round(zeros)
    zeros = _fit_zeros(groups, inverse_scales, zeros, bits)
    codes = torch.round(groups * inverse_scales + zeros).clamp(0, 2**bits - 1)
    scales = (1 / inverse_scales).half().float()
    return ((codes - zeros.half().float()) * scales).reshape(weight.shape)


def half_quadratic_bits(rows: int, columns: int, bits: int, group_size: int) -> float:
    """Codes, and a float16 scale and zero point for each group; ten 3-bit codes share 32 bits, as its library packs."""
    return rows * columns * ((3.2 if bits == 3 else bits) + 32 / group_size)


def _fit_zeros(groups: torch.Tensor, inverse_scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The zero points with the least mean error on the way, up to the first step that does not lower it."""
    beta, least, best = _BETA, float("inf"), zeros
    for _ in range(_STEPS):
        codes = torch.round(groups * inverse_scales + zeros).clamp(0, 2**bits - 1)
        restored = (codes - zeros) / inverse_scales
        current = float((groups - restored).abs().mean())
        if current >= least:
            break
        least, best = current, zeros
        error = _shrink(groups - restored, beta)
        zeros = (codes - (groups - error) * inverse_scales).mean(1, keepdim=True)
        beta *= _BETA_GROWTH
    return best


def _shrink(error: torch.Tensor, beta: float) -> torch.Tensor:
    """The proximal operator of the l_p norm, in the generalized form that HQQ uses."""
    magnitude = error.abs()
    return error.sign() * (magnitude - magnitude.pow(_NORM - 1) / beta).clamp(min=0)
