"""8-bit weights, alone and with 8-bit activations: absmax rounding, LLM.int8() and SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .linears import linears_of

OUTLIER_THRESHOLD = 6.0
SMOOTHING = 0.5


def absmax_int8(values: torch.Tensor) -> torch.Tensor:
    """Symmetric rounding to -127...127 of each row [..., columns], scales in float32."""
    scales = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return torch.round(values / scales) * scales


def int8_bits(rows: int, columns: int) -> int:
    """A byte per weight and a float32 scale per row."""
    return rows * (8 * columns + 32)


class Int8Linear(nn.Module):
    """A linear with int8 weights per row and int8 activations per token.

    Args:
        linear: its weight is rounded, its bias shared.
        smoothing: [in_features]: activations are divided by it and weights multiplied before both are rounded.
        threshold: columns in which an activation of the batch exceeds it stay unrounded; None for none.
    """

    def __init__(self, linear: nn.Linear, smoothing: torch.Tensor | None, threshold: float | None) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.threshold = threshold
        weight = linear.weight.detach().float()
        self.weight = nn.Parameter(
            absmax_int8(weight if smoothing is None else weight * smoothing), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.smoothing is not None:
            inputs = inputs / self.smoothing
        if self.threshold is None:
            rounded = absmax_int8(inputs)
        else:
            outlying = (inputs.abs() > self.threshold).flatten(0, -2).any(0)
            rounded = torch.where(outlying, inputs, absmax_int8(torch.where(outlying, 0.0, inputs)))
        return nn.functional.linear(rounded, self.weight, self.bias)


def apply_llm_int8(model: nn.Module) -> None:
    """Dettmers et al., LLM.int8(), NeurIPS 2022: 8-bit products but for the columns of large activations.

    As in its library bitsandbytes the weights of these columns, too, come from their 8-bit form.
    """
    _replace(model, {name: Int8Linear(linear, None, OUTLIER_THRESHOLD) for name, linear in linears_of(model).items()})


@torch.no_grad()
def apply_smoothquant(model: nn.Module, windows: Iterable[torch.Tensor]) -> None:
    """Xiao et al., SmoothQuant, ICML 2023: activations hand half of their range to the weights, then both are 8 bits.

    s = max|X|^alpha / max|W|^(1 - alpha) per column, alpha = 0.5, for linears fed by a norm, whose own weight can take
    1 / s in; the others are rounded unsmoothed, as published. Weights per row, activations per token.

    Args:
        windows: int64 [1, tokens] each, of calibration text.
    """
    groups, peaks = _inputs_from_norms(model, windows)
    linears = linears_of(model)
    smoothing: dict[str, torch.Tensor] = {}
    for names, peak in zip(groups, peaks, strict=True):
        columns = torch.stack([linears[name].weight.float().abs().amax(0) for name in names]).amax(0)
        scales = peak.clamp(min=1e-5) ** SMOOTHING / columns.clamp(min=1e-5) ** (1 - SMOOTHING)
        smoothing |= dict.fromkeys(names, scales)
    _replace(model, {name: Int8Linear(linear, smoothing.get(name), None) for name, linear in linears.items()})


def _inputs_from_norms(model: nn.Module, windows: Iterable[torch.Tensor]) -> tuple[list[list[str]], list[torch.Tensor]]:
    """Names of linears that share the output of one norm, and the largest magnitude of each of its columns."""
    linears = linears_of(model)
    groups: dict[str, list[str]] = {}
    peaks: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def norm_hook(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            outputs[name] = output

        return hook

    def linear_hook(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for norm, output in outputs.items():
                if output is args[0]:
                    names = groups.setdefault(norm, [])
                    if name not in names:
                        names.append(name)
                    peak = output.detach().float().abs().flatten(0, -2).amax(0)
                    peaks[norm] = torch.maximum(peaks[norm], peak) if norm in peaks else peak

        return hook

    handles = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Norm"):
            handles.append(module.register_forward_hook(norm_hook(name)))
        elif name in linears:
            handles.append(module.register_forward_pre_hook(linear_hook(name)))
    try:
        for window in windows:
            model(input_ids=window)
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values()), [peaks[norm] for norm in groups]


def _replace(model: nn.Module, modules: dict[str, Int8Linear]) -> None:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
