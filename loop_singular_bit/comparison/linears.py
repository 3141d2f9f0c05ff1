"""Which linears of a model every method compresses, and what a method reports of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from loop_singular_bit.quantization.eligibility import linear_skip_reason

# The width of a 7B model's matrices, at which scales per row or column weigh less than in a small model.
REFERENCE_FEATURES = 4096

StoredBits = Callable[[int, int], float]
"""out_features, in_features -> bits that a weight of this shape takes, scales and zero points included."""


@dataclass(frozen=True)
class CompressedSize:
    """Stored bits per weight of the compressed linears, as they are, and of the same format at 4096 x 4096."""

    bits_per_weight: float
    bits_per_weight_at_4096: float


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Linears by name, in the order of the model: without output heads and without what is too small to pack."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and linear_skip_reason(module.out_features, module.in_features) is None
    }


def size_of(linears: Mapping[str, nn.Linear], stored_bits: StoredBits) -> CompressedSize:
    """What linears take whose weights are stored in one format."""
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    stored = sum(stored_bits(*shape) for shape in shapes)
    reference = stored_bits(REFERENCE_FEATURES, REFERENCE_FEATURES) / REFERENCE_FEATURES**2
    return CompressedSize(stored / sum(rows * columns for rows, columns in shapes), reference)


@torch.no_grad()
def replace_weights(model: nn.Module, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts a round trip in place of the weight of every linear, in float32."""
    for name, linear in linears_of(model).items():
        try:
            linear.weight.copy_(quantize(linear.weight.float()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
