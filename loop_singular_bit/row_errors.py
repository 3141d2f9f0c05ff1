"""Squared errors of a weight row by row, and the figures that follow from their sums."""

from __future__ import annotations

import math

import torch

from .packed_weight import ROWS_PER_TILE, PackedWeight

# Small enough for two float32 pieces to stay in the cache of a core.
VALUES_AT_ONCE = 1 << 18


class RowErrors:
    """Squared errors and squared weights of each row; their sums do not depend on blocks or threads."""

    def __init__(self, rows: int) -> None:
        self._squared_error = torch.zeros(rows, dtype=torch.float64)
        self._squared_weight = torch.zeros(rows, dtype=torch.float64)

    def add(self, first_row: int, rows: torch.Tensor, packed: PackedWeight) -> None:
        """Takes rows [count, in_features] of a weight, and what stands for them, in from `first_row` on."""
        step = max(1, VALUES_AT_ONCE // (ROWS_PER_TILE * rows.shape[1])) * ROWS_PER_TILE
        for first in range(0, rows.shape[0], step):
            # Subtracting bfloat16 from float32 in place takes torch many times as long as converting first.
            dense = rows[first : first + step].float()
            approximation = packed.rows(first, dense.shape[0]).dequantize()
            place = slice(first_row + first, first_row + first + dense.shape[0])
            self._squared_weight[place] = torch.linalg.vector_norm(dense, dim=1).double().square()
            self._squared_error[place] = torch.linalg.vector_norm(approximation.sub_(dense), dim=1).double().square()

    @property
    def squared_error(self) -> float:
        return math.fsum(self._squared_error.tolist())

    @property
    def squared_weight(self) -> float:
        return math.fsum(self._squared_weight.tolist())


def relative_error(squared_error: float, squared_weight: float) -> float | None:
    """Frobenius norm of the error over that of the weight; None over a weight of zeros."""
    return math.sqrt(squared_error / squared_weight) if squared_weight > 0 else None


def sqnr_db(squared_error: float, squared_weight: float) -> float | None:
    """Signal to quantization noise in decibels; None where it is infinite or undefined."""
    if squared_error <= 0 or squared_weight <= 0:
        return None
    return 10 * math.log10(squared_weight / squared_error)
