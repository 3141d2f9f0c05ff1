"""How far a packed weight is from the dense one, summed up block by block so that no weight is dense as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loop_singular_bit.packed_weight import PackedWeight

# Rows dequantized at once: 1024 x 14336 in float32 are 59 MB.
_BLOCK_ROWS = 1024


@dataclass
class WeightErrors:
    """Sums over the weights seen so far, and the errors that follow from them."""

    count: int = 0
    squared_weight: float = 0.0
    squared_error: float = 0.0
    absolute_error: float = 0.0
    largest_error: float = 0.0
    smallest_weight: float = math.inf
    largest_weight: float = -math.inf

    def add(self, weight: torch.Tensor, approximation: torch.Tensor) -> None:
        """Adds a block of a weight and of what stands for it; same shape, any float dtypes."""
        if weight.numel() == 0:
            return
        dense = weight.detach().float()
        error = approximation.detach().float() - dense
        self.count += dense.numel()
        self.squared_weight += _sum_of_squares(dense)
        self.squared_error += _sum_of_squares(error)
        magnitude = error.abs_()
        self.absolute_error += magnitude.sum(dtype=torch.float64).item()
        self.largest_error = max(self.largest_error, magnitude.max().item())
        smallest, largest = dense.aminmax()
        self.smallest_weight = min(self.smallest_weight, smallest.item())
        self.largest_weight = max(self.largest_weight, largest.item())

    @property
    def mse_error(self) -> float:
        return self.squared_error / self.count

    @property
    def mae_error(self) -> float:
        return self.absolute_error / self.count

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the weight; 0 when both are 0."""
        if self.squared_weight == 0:
            return 0.0 if self.squared_error == 0 else math.inf
        return math.sqrt(self.squared_error / self.squared_weight)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels: -20 log10(relative_error); infinite when nothing is lost."""
        if self.relative_error == 0:
            return math.inf
        return -math.inf if math.isinf(self.relative_error) else -20 * math.log10(self.relative_error)

    @property
    def mae_over_range_percent(self) -> float:
        """The "quality error" of the old documents: 100 x mean absolute error / (largest - smallest weight).

        It measures the longest outlier, not quality; kept under this name so that old figures can be compared.
        """
        spread = self.largest_weight - self.smallest_weight
        return 100 * self.mae_error / spread if spread > 0 else 0.0


def measure_weight_errors(weight: torch.Tensor, packed_weight: PackedWeight) -> WeightErrors:
    """Errors of `packed_weight` against the dense weight [out_features, in_features]."""
    errors = WeightErrors()
    for first in range(0, packed_weight.out_features, _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, packed_weight.out_features - first)
        errors.add(weight[first : first + rows], packed_weight.rows(first, rows).dequantize())
    return errors


def _sum_of_squares(values: torch.Tensor) -> float:
    # float32 products summed per row, rows summed in float64: no second copy of the block in float64.
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).double().square().sum().item()
