"""One bit and ternary weights from the weights alone."""

from __future__ import annotations

import torch


def binary(weight: torch.Tensor) -> torch.Tensor:
    """sign(w) times the mean magnitude of the row: Rastegari et al., XNOR-Net, ECCV 2016, equation 6."""
    scales = weight.abs().mean(1, keepdim=True).half().float()
    return torch.where(weight >= 0, scales, -scales)


def binary_bits(rows: int, columns: int) -> int:
    """A sign per weight and a float16 scale per row."""
    return rows * (columns + 16)


def absmean_ternary(weight: torch.Tensor) -> torch.Tensor:
    """{-1, 0, 1} times the mean magnitude of the matrix: Ma et al., The Era of 1-bit LLMs, arXiv 2402.17764, section 2.

    The method is made for training with it; here it meets weights that were trained without.
    """
    scale = weight.abs().mean().half().float().clamp(min=6e-8)
    return torch.round(weight / scale).clamp(-1, 1) * scale


def ternary_bits(rows: int, columns: int) -> int:
    """Five weights to a byte (3^5 = 243) and a float16 scale."""
    return 8 * -(-rows * columns // 5) + 16
