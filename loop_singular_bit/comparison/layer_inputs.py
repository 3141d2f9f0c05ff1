"""Runs a model layer by layer over many windows, so that later layers see what was done to earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quantization.layer_calls import decoder_layers, hidden_of


class _Reached(Exception):
    """What was wanted from the model is known: the rest need not run."""


@dataclass(frozen=True)
class DecoderLayer:
    """A layer and how the model calls it; what comes beside the hidden states is the same for every window."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class LayerwiseRun:
    """The hidden states of all windows before a layer, and what goes into its linears.

    Args:
        model: takes `input_ids` [1, tokens]; has a list of layers that hand one tensor on.
        windows: int64 [windows, tokens].
        names: of linears that matter.

    Attributes:
        layers: in the order of computation.

    Raises:
        ValueError: no such list of layers, or a linear outside of it.
    """

    def __init__(self, model: nn.Module, windows: torch.Tensor, names: Collection[str]) -> None:
        self._model = model
        self._names = set(names)
        modules = decoder_layers(model)
        if not modules:
            raise ValueError(f"model: expected a list of layers with linears inside, {type(model).__name__} has none")
        self.layers, self._groups = self._probe(windows[:1], modules)
        inside = {name for groups in self._groups.values() for group in groups for name in group}
        if outside := sorted(self._names - inside):
            raise ValueError(f"model: expected all linears in a sequence of layers, {outside[0]} is not")
        self._states = [self._before_layers(window[None]) for window in windows]

    def groups_in(self, layer: DecoderLayer) -> list[list[str]]:
        """Names of linears that share an input, in the order in which they are called."""
        return self._groups[layer.name]

    def second_moment(self, layer: DecoderLayer, name: str) -> torch.Tensor:
        """float64 [in_features, in_features]: mean of x x' over the inputs of a linear of the next layer."""
        caught: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            caught.append(args[0].reshape(-1, args[0].shape[-1]).float())
            raise _Reached

        total = torch.zeros((), dtype=torch.float64)
        tokens = 0
        handle = self._model.get_submodule(name).register_forward_pre_hook(hook)
        try:
            for state in self._states:
                try:
                    layer.module(state, *layer.args, **layer.kwargs)
                except _Reached:
                    rows = caught.pop()
                    total = total + (rows.T @ rows).double()
                    tokens += len(rows)
        finally:
            handle.remove()
        return total / tokens

    def advance(self, layer: DecoderLayer) -> None:
        """Takes the states of all windows through the next layer."""
        self._states = [hidden_of(layer.module(state, *layer.args, **layer.kwargs)) for state in self._states]

    def _probe(
        self, window: torch.Tensor, modules: Mapping[str, nn.Module]
    ) -> tuple[list[DecoderLayer], dict[str, list[list[str]]]]:
        layers: list[DecoderLayer] = []
        states: list[torch.Tensor] = []
        groups: dict[str, list[list[str]]] = {name: [] for name in modules}
        inputs: list[torch.Tensor] = []

        def layer_hook(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not args:
                    raise ValueError(f"model: expected {name} to be called with its hidden states first")
                layers.append(DecoderLayer(name, module, args[1:], kwargs))
                states.append(args[0])
                inputs.clear()

            return hook

        def linear_hook(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if not layers or not name.startswith(layers[-1].name + "."):
                    return
                of_layer = groups[layers[-1].name]
                for tensor, group in zip(inputs, of_layer, strict=True):
                    if tensor is args[0]:
                        group.append(name)
                        return
                inputs.append(args[0])
                of_layer.append([name])

            return hook

        handles = [
            module.register_forward_pre_hook(layer_hook(name), with_kwargs=True) for name, module in modules.items()
        ]
        handles += [
            self._model.get_submodule(name).register_forward_pre_hook(linear_hook(name)) for name in self._names
        ]
        outputs: list[torch.Tensor] = []
        handles += [
            module.register_forward_hook(lambda _, __, output: outputs.append(hidden_of(output)))
            for module in modules.values()
        ]
        try:
            self._call(window)
        finally:
            for handle in handles:
                handle.remove()
        follows = all(state is output for state, output in zip(states[1:], outputs[:-1], strict=True))
        if [layer.name for layer in layers] != list(modules) or not follows:
            raise ValueError("model: expected decoder layers that are called one after another, once each")
        return layers, groups

    def _before_layers(self, window: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])
            raise _Reached

        handle = self.layers[0].module.register_forward_pre_hook(hook)
        try:
            self._call(window)
        except _Reached:
            pass
        finally:
            handle.remove()
        return caught[0]

    def _call(self, window: torch.Tensor) -> None:
        device = next(self._model.parameters()).device
        self._model(input_ids=window.to(device), use_cache=False)
