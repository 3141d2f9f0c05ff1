"""A linear whose packed weight can be trained: dense for the model; scales, outliers and signs below."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.reference import pack_signs, unpack_signs

_MULTIPLE_SUM = 126
_LARGEST_DELTA = 127
_LARGEST_FLOAT16 = 65504.0
_SMALLEST_FLOAT16 = 2.0**-24
# What is tuned is relative to its start; a scale never falls below this share of it.
_SMALLEST_FACTOR = 0.01


class TunableLinear(nn.Module):
    """A linear that calculates with a dense weight, made from a packed one by `make_dense`.

    The gradient by the dense weight is all that training needs from the model: `take_gradient` turns it into those of
    the parameters, all of which are 0 at the start and relative to what they change. Signs follow a latent weight by a
    straight-through estimator (Bengio, Leonard and Courville 2013): of all planes of a weight at once, the level that
    is nearest to it.

    Args:
        packed: the start.
        linear: what it approximates; its weight is where latent weights start.
        signs: whether signs are tuned too.

    Attributes:
        dense: [out_features, in_features], a leaf that wants a gradient; None before `make_dense`.
        scale_change, column_change, outlier_change, latent_change: the parameters; None where there is nothing to tune.

    Raises:
        ValueError: a packed weight with means.
    """

    dense: torch.Tensor | None

    def __init__(self, packed: PackedWeight, linear: nn.Linear, signs: bool) -> None:
        super().__init__()
        if packed.means is not None:
            raise ValueError("weights with means are not tuned")
        self.bias = linear.bias
        self.rows, self.columns, self.planes = packed.out_features, packed.in_features, packed.planes
        self.dense = None
        self.stored_columns = packed.outlier_columns
        self.outlier_columns = _by_row(packed.outlier_columns.to(torch.int64), self.rows)
        # Padding slots repeat a column and stay 0.
        self.is_outlier = torch.ones_like(self.outlier_columns, dtype=torch.bool)
        self.is_outlier[:, 1:] = self.outlier_columns[:, 1:] != self.outlier_columns[:, :-1]
        self.signs = unpack_signs(packed.signs, self.rows, self.columns)
        self.scales = _by_row(packed.scales.float(), self.rows).T.contiguous()  # [planes, rows]
        self.unit = self.scales.sum(0).clamp_min(_SMALLEST_FLOAT16)
        has_columns = packed.column_scales is not None
        self.column_scales = packed.column_scales.float() if has_columns else torch.ones(self.columns)  # type: ignore[union-attr]
        steps = packed.outlier_scales.reshape(-1)[: self.rows, None].float()
        self.outlier_values = _by_row(packed.outlier_deltas.float(), self.rows) * steps
        self.scale_change = nn.Parameter(torch.zeros(self.planes, self.rows))
        self.column_change = nn.Parameter(torch.zeros(self.columns)) if has_columns else None
        self.outlier_change = nn.Parameter(torch.zeros_like(self.outlier_values))
        self.latent_change: nn.Parameter | None = None
        if signs:
            self.latent = self._latent(linear.weight.detach().float())
            self.latent_change = nn.Parameter(torch.zeros(self.rows, self.columns))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Everything but latent weights."""
        parameters = (self.scale_change, self.column_change, self.outlier_change)
        return [parameter for parameter in parameters if parameter is not None]

    def tuned_parameters(self) -> list[nn.Parameter]:
        return self.scale_parameters() + ([] if self.latent_change is None else [self.latent_change])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.dense is not None
        return nn.functional.linear(input, self.dense, self.bias)

    @torch.no_grad()
    def make_dense(self, dtype: torch.dtype = torch.float32) -> None:
        """The dense weight as the parameters are now."""
        weight = self._rows_over_column_scales(self.tuned_signs()) * self._tuned_columns()
        self.dense = weight.to(dtype).requires_grad_(True)

    @torch.no_grad()
    def take_gradient(self, gradient: torch.Tensor) -> None:
        """Sets the parameters' gradients.

        Args:
            gradient: float32 [out_features, in_features], by the dense weight.
        """
        signs = self.tuned_signs()
        if self.column_change is not None:
            values = self._rows_over_column_scales(signs)
            self.column_change.grad = (gradient * values).sum(0) * self.column_scales
        by_values = gradient * self._tuned_columns()
        by_scale = [torch.where(sign, by_values, -by_values).sum(1) for sign in signs]
        self.scale_change.grad = torch.stack(by_scale) * self.scales
        by_outlier = by_values.gather(1, self.outlier_columns) * self.is_outlier
        self.outlier_change.grad = by_outlier * self.unit[:, None]
        if self.latent_change is not None:
            self.latent_change.grad = by_values * self.unit[:, None]

    @torch.no_grad()
    def tuned_signs(self) -> torch.Tensor:
        """bool [planes, out_features, in_features]."""
        if self.latent_change is None:
            return self.signs
        return self._nearest_signs(self.latent + self.latent_change * self.unit[:, None])

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """What was tuned, rounded to the format."""
        columns = self._tuned_columns().clamp(_SMALLEST_FLOAT16, _LARGEST_FLOAT16).half()
        scales = _snapped(self._tuned_scales(), self.scales)
        outliers = self._tuned_outliers()
        steps = (outliers.abs().amax(1) / _LARGEST_DELTA).half() if outliers.shape[1] else torch.zeros(self.rows).half()
        exact = steps.float()[:, None]
        deltas = torch.where(exact > 0, outliers / exact, 0.0).round().clamp(-_LARGEST_DELTA, _LARGEST_DELTA)
        return PackedWeight(
            pack_signs(self.tuned_signs()),
            _tiled(scales.T),
            self.stored_columns,
            _tiled(deltas.to(torch.int8)),
            _tiled(steps[:, None])[:, 0].contiguous(),
            out_features=self.rows,
            in_features=self.columns,
            column_scales=columns if self.column_change is not None else None,
        )

    def _tuned_scales(self) -> torch.Tensor:
        return self.scales * (1 + self.scale_change.detach()).clamp_min(_SMALLEST_FACTOR)

    def _tuned_columns(self) -> torch.Tensor:
        if self.column_change is None:
            return self.column_scales
        return self.column_scales * (1 + self.column_change.detach()).clamp_min(_SMALLEST_FACTOR)

    def _tuned_outliers(self) -> torch.Tensor:
        return self.outlier_values + self.outlier_change.detach() * self.unit[:, None] * self.is_outlier

    def _rows_over_column_scales(self, signs: torch.Tensor) -> torch.Tensor:
        """weight / column_scales."""
        values = torch.zeros(self.rows, self.columns)
        for sign, scale in zip(signs, self._tuned_scales(), strict=True):
            values += torch.where(sign, scale[:, None], -scale[:, None])
        return values.scatter_add_(1, self.outlier_columns, self._tuned_outliers())

    def _levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [2^planes, rows] and their signs [2^planes, planes]."""
        patterns = torch.tensor(
            [[number >> plane & 1 for plane in range(self.planes)] for number in range(2**self.planes)]
        )
        return (2.0 * patterns - 1) @ self._tuned_scales(), patterns.bool()

    def _nearest_signs(self, values: torch.Tensor) -> torch.Tensor:
        if self.planes == 1:
            return (values > 0)[None]
        levels, patterns = self._levels()
        best = (values - levels[0][:, None]).abs()
        number = torch.zeros(values.shape, dtype=torch.int64)
        for index in range(1, len(levels)):
            distance = (values - levels[index][:, None]).abs()
            number[distance < best] = index
            best = torch.minimum(best, distance)
        return patterns[number].permute(2, 0, 1)

    def _latent(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense weight where its nearest level is the present one, else a little inside of that level's cell."""
        present = torch.zeros(self.rows, self.columns)
        for sign, scale in zip(self.signs, self.scales, strict=True):
            present += torch.where(sign, scale[:, None], -scale[:, None])
        exact = weight / self.column_scales
        levels, _ = torch.sort(self._levels()[0], dim=0)
        margin = 0.02 * self.unit[:, None]
        low = torch.full_like(present, -math.inf)
        high = torch.full_like(present, math.inf)
        for below, above in itertools.pairwise(levels):
            middle = ((below + above) / 2)[:, None]
            low = torch.where(present > middle, torch.maximum(low, middle + margin), low)
            high = torch.where(present <= middle, torch.minimum(high, middle - margin), high)
        return torch.maximum(torch.minimum(exact, high), low)


def changed_signs(before: PackedWeight, after: PackedWeight) -> int:
    """How many signs differ between two packed weights of the same shape."""
    rows, columns = before.out_features, before.in_features
    return int((unpack_signs(before.signs, rows, columns) != unpack_signs(after.signs, rows, columns)).sum())


def _snapped(scales: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """float16 scales [planes, rows]: whole multiples, that add up to 126, of a unit for each row.

    Rows whose planes would change their order keep the scales from before.
    """
    planes = len(scales)
    if planes == 1:
        return scales.half()
    total = scales.sum(0)
    exact = _MULTIPLE_SUM * scales / total.clamp_min(_SMALLEST_FLOAT16)
    multiples = exact.round()
    multiples[0] = _MULTIPLE_SUM - multiples[1:].sum(0)
    unit = (scales * multiples).sum(0) / multiples.square().sum(0)
    snapped = (multiples * unit).clamp_max(_LARGEST_FLOAT16).half()
    ordered = (multiples[:-1] >= multiples[1:]).all(0) & (total > 0)
    return torch.where(ordered, snapped, before.half())


def _by_row(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[row_tiles, X, 32] -> [rows, X]."""
    return tensor.transpose(1, 2).reshape(-1, tensor.shape[1])[:rows].contiguous()


def _tiled(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, X] -> [row_tiles, X, 32], zeros in padded rows."""
    rows, width = tensor.shape
    padded = torch.zeros(-(-rows // 32) * 32, width, dtype=tensor.dtype)
    padded[:rows] = tensor
    return padded.reshape(-1, 32, width).transpose(1, 2).contiguous()
