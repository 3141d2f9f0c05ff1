"""GPTQ: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ, ICLR 2023. Rounding with error compensation, layer by layer.

With act-order (columns by falling second moment) on static groups, so that the order costs no bits, and "true
sequential": every linear sees the inputs that the quantized ones before it give.
"""

from __future__ import annotations

import torch
from torch import nn

from .layer_inputs import LayerwiseRun
from .linears import linears_of
from .round_to_nearest import fit_grid, round_to_grid

DAMPING = 0.01
_COLUMN_BLOCK = 128
_MOST_DAMPING = 1.0


def gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The round trip of a weight [out_features, in_features]; grids of the original weights as in `round_to_nearest`.

    Args:
        hessian: float64 [in_features, in_features], the second moment of the inputs.
    """
    weight, hessian = weight.float().clone(), hessian.double().clone()
    columns = weight.shape[1]
    grids = [fit_grid(weight[:, first : first + group_size], bits) for first in range(0, columns, group_size)]
    silent = hessian.diagonal() == 0
    hessian.diagonal()[silent] = 1
    weight[:, silent] = 0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    inverse = _inverse_factor(hessian)
    rounded = torch.empty_like(weight)
    for first in range(0, columns, _COLUMN_BLOCK):
        last = min(first + _COLUMN_BLOCK, columns)
        block, factor = weight[:, first:last].clone(), inverse[first:last, first:last]
        errors = torch.empty_like(block)
        for column in range(last - first):
            scales, zeros = grids[int(order[first + column]) // group_size]
            current = block[:, column : column + 1]
            rounded[:, first + column] = round_to_grid(current, scales, zeros, bits)[:, 0]
            errors[:, column] = (current[:, 0] - rounded[:, first + column]) / factor[column, column]
            block[:, column + 1 :] -= errors[:, column, None] * factor[column, None, column + 1 :]
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return rounded[:, torch.argsort(order)]


@torch.no_grad()
def apply_gptq(model: nn.Module, windows: torch.Tensor, bits: int, group_size: int) -> None:
    """Quantizes the linears of a model in place.

    Args:
        windows: int64 [windows, tokens] of calibration text.

    Raises:
        ValueError: see `LayerwiseRun`.
    """
    linears = linears_of(model)
    run = LayerwiseRun(model, windows, linears)
    for layer in run.layers:
        for names in run.groups_in(layer):
            hessian = run.second_moment(layer, names[0])
            for name in names:
                linears[name].weight.copy_(gptq(linears[name].weight, hessian, bits, group_size))
        run.advance(layer)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """float32 upper factor U of the inverse, U'U; more damping where the matrix is not positive definite."""
    mean = hessian.diagonal().mean()
    damping = DAMPING
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed:
            return upper.float()
        if damping > _MOST_DAMPING:
            raise ValueError(f"hessian: not positive definite, even with {damping:g} of its mean diagonal added")
        damping *= 10
