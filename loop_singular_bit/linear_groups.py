"""Packed linears that stand side by side in a model, such as queries, keys and values, run by one call.

The parent whose forward calls them, one after the other and with the same tensor, is a module of Transformers. While
its forward runs, and only then, the first of them that is called computes the outputs of all, and the others hand out
what is there. Each gives what it gives alone, bit for bit; modules, their names and state dicts stay as they are.

Whatever stands in the way makes them run alone: an adapter, a hook or another class in place of one of them, another
input, torch.compile, another thread; and so do weights or machines for which one call is not faster.
"""

from __future__ import annotations

import functools
import operator
import threading
from typing import Any

import torch
from torch import nn

from . import ops
from .packed_linear import PackedLinear

_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")

# Below, in weights of the whole group, what Python does for it (11 µs on Zen 4) takes longer than what one call saves.
_LEAST_WEIGHTS = 1 << 24

# package of transformers.models -> class -> linears that its forward calls with its own, unchanged input.
_PARENTS: dict[str, dict[str, tuple[str, ...]]] = {
    package: {f"{family}Attention": _QUERY_KEY_VALUE, f"{family}MLP": _GATE_UP}
    for package, family in {
        "cohere": "Cohere",
        "ernie4_5": "Ernie4_5",
        "exaone4": "Exaone4",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "gemma3": "Gemma3",
        "granite": "Granite",
        "helium": "Helium",
        "llama": "Llama",
        "ministral": "Ministral",
        "mistral": "Mistral",
        "olmo2": "Olmo2",
        "olmo3": "Olmo3",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "qwen3_moe": "Qwen3Moe",
        "smollm3": "SmolLM3",
        "stablelm": "StableLm",
    }.items()
} | {
    "apertus": {"ApertusAttention": _QUERY_KEY_VALUE},
    "bert": {"BertSelfAttention": ("query", "key", "value")},
    "clip": {"CLIPAttention": _QUERY_KEY_VALUE},
    "glm": {"GlmAttention": _QUERY_KEY_VALUE},
    "gpt_oss": {"GptOssAttention": _QUERY_KEY_VALUE},
    "mixtral": {"MixtralAttention": _QUERY_KEY_VALUE},
    "opt": {"OPTAttention": _QUERY_KEY_VALUE},
    "phi": {"PhiAttention": _QUERY_KEY_VALUE},
    "roberta": {"RobertaSelfAttention": ("query", "key", "value")},
    "siglip": {"SiglipAttention": _QUERY_KEY_VALUE},
    "starcoder2": {"Starcoder2Attention": _QUERY_KEY_VALUE},
    "vit": {"ViTAttention": _QUERY_KEY_VALUE},
}


def group_linears(model: nn.Module) -> list[str]:
    """Lets packed linears of known Transformers modules that take the same input run in one call, in place.

    `quantize_model` and `from_pretrained` do this. Groups of less than 2^24 weights run alone: they are faster so.
    Calling it again is harmless.

    Returns:
        The names of the modules whose linears form a group: attention and MLP blocks.
    """
    names = []
    for name, parent in model.named_modules():
        siblings = _siblings(type(parent))
        if siblings is None:
            continue
        linears: Any = [parent._modules.get(sibling) for sibling in siblings]
        if not all(map(_only_multiplies, linears)):
            continue
        if sum(linear.in_features * linear.out_features for linear in linears) < _LEAST_WEIGHTS:
            continue
        # A forward that somebody else has put there is left in peace.
        if "forward" not in parent.__dict__:
            # torch.export looks into a partial, not into an object that can be called.
            parent.forward = functools.partial(_grouped_forward, _Group(parent, siblings))
        if _is_grouped(parent):
            names.append(name)
    return names


def ungroup_linears(model: nn.Module) -> None:
    """Undoes `group_linears`: every linear runs alone."""
    for module in model.modules():
        if _is_grouped(module):
            del module.forward


def _is_grouped(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _grouped_forward


def _siblings(parent: type[nn.Module]) -> tuple[str, ...] | None:
    if not parent.__module__.startswith("transformers.models."):
        return None
    return _PARENTS.get(parent.__module__.split(".")[2], {}).get(parent.__name__)


def _only_multiplies(module: nn.Module | None) -> bool:
    """Whether a call of this module is its input times its own packed weight, and nothing else."""
    return (
        type(module) is PackedLinear
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._owner
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
    )


def _grouped_forward(group: _Group, *args: Any, **kwargs: Any) -> Any:
    """In place of a module's bound forward: for as long as that runs, its linears have a `GroupCall`."""
    parent = group.parent
    forward = type(parent).forward
    # What one call saves is threads that wait.
    if torch.compiler.is_compiling() or torch.get_num_threads() == 1:
        return forward(parent, *args, **kwargs)
    modules: Any = parent._modules
    linears = [modules.get(name) for name in group.names]
    if not all(map(_only_multiplies, linears)):
        return forward(parent, *args, **kwargs)
    call = GroupCall(group, linears)
    for linear in linears:
        linear.__dict__["_group_call"] = call
    try:
        return forward(parent, *args, **kwargs)
    finally:
        for linear in linears:
            linear.__dict__["_group_call"] = None


class _Group:
    """The linears of a parent, and what they held in the last call as the operator takes it.

    To make that anew in every call would cost what the group saves.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent = parent
        self.names = names
        self._held: list[torch.Tensor | None] = []
        self._tensors: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": [], "_tensors": []}

    def tensors_of(self, linears: list[PackedLinear]) -> list[torch.Tensor]:
        """Packed tensors and biases, as `packed_linear_group` takes them."""
        held: list[torch.Tensor | None] = []
        for linear in linears:
            held.extend(linear._packed_buffers())
            held.append(linear._parameters["bias"])
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            absent = torch.empty(0)
            self._held, self._tensors = held, [absent if tensor is None else tensor for tensor in held]
        return self._tensors


class GroupCall:
    """What the linears of a group share while the forward of their parent runs, in one thread."""

    def __init__(self, group: _Group, linears: list[PackedLinear]) -> None:
        self._group = group
        self._linears = linears
        self._thread = threading.get_ident()
        self._input: torch.Tensor | None = None
        self._outputs: dict[PackedLinear, torch.Tensor] = {}

    def output_of(self, linear: PackedLinear, input: torch.Tensor) -> torch.Tensor | None:
        """The output of one linear of the group, once; None when it has to compute it alone."""
        if self._input is None and self._thread == threading.get_ident():
            self._input = input
            self._run(input)
        return self._outputs.pop(linear, None) if input is self._input else None

    def _run(self, input: torch.Tensor) -> None:
        if type(input) is not torch.Tensor:
            return
        in_features = input.shape[-1] if input.dim() else 0
        precision = self._linears[0].activation_precision
        out_features = []
        for linear in self._linears:
            bias = linear._parameters["bias"]
            if (
                linear.in_features != in_features
                or linear.activation_precision != precision
                or (bias is not None and bias.dtype != input.dtype)
            ):
                return
            out_features.append(linear.out_features)
        tensors = self._group.tensors_of(self._linears)
        outputs = ops.packed_linear_group(input, tensors, out_features, activation_precision=precision)
        self._outputs = dict(zip(self._linears, outputs, strict=True))
