"""A model's decoder layers one after another: how they are called, and the hidden states between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LayerCall:
    """How the model calls one of its layers; what comes beside the hidden states is the same for every window."""

    name: str
    layer: nn.Module
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class LayerRecorder:
    """Remembers how a model calls its decoder layers, while the context is open."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        self._calls: list[LayerCall] = []
        self._outputs: list[torch.Tensor] = []

    def __enter__(self) -> LayerRecorder:
        self._handles = [
            layer.register_forward_hook(self._hook_of(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def chain(self) -> list[LayerCall] | None:
        """The calls of one run; None where layers do not just hand one tensor on."""
        calls = self._calls
        sequential = (
            [call.name for call in calls] == list(self._layers)
            and len(calls) > 0
            and all(call.hidden is output for call, output in zip(calls[1:], self._outputs[:-1], strict=True))
            and all(call.kwargs.get("past_key_values") is None for call in calls)
        )
        return calls if sequential else None

    def _hook_of(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor):
                self._calls.append(LayerCall(name, layer, args[0], args[1:], kwargs))
                self._outputs.append(hidden_of(output))

        return hook


class _Reached(Exception):
    pass


@contextmanager
def running_until(layer: nn.Module, run: Callable[[int], Any]) -> Iterator[Callable[[int], torch.Tensor]]:
    """A function that runs a model on a window up to a layer, and returns what would go into it.

    Args:
        run: runs the model on the window of that number. Threads may call the function at once.
    """
    caught = threading.local()

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.hidden = args[0]
        raise _Reached

    def run_until(window: int) -> torch.Tensor:
        try:
            run(window)
        except _Reached:
            pass
        hidden: torch.Tensor = caught.hidden
        return hidden

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield run_until
    finally:
        handle.remove()


class HiddenStates:
    """Hidden states of all windows, in memory or in an unnamed file."""

    def __init__(self, windows: int, example: torch.Tensor, limit: int, directory: Path | None) -> None:
        shape = (windows, *example.shape)
        if windows * example.nbytes <= limit:
            self._all = torch.empty(shape, dtype=example.dtype)
        else:
            import tempfile

            # Alive as long as the mapping, gone after it: nothing is left when the process is killed. Not in the folder
            # for temporary files by choice: that is often memory.
            with tempfile.NamedTemporaryFile(dir=directory) as file:
                file.truncate(windows * example.nbytes)
                flat = torch.from_file(file.name, shared=True, size=windows * example.numel(), dtype=example.dtype)
                self._all = flat.view(shape)

    def get(self, window: int) -> torch.Tensor:
        return self._all[window]

    def put(self, window: int, hidden: torch.Tensor) -> None:
        self._all[window] = hidden


def hidden_of(output: Any) -> torch.Tensor:
    """The tensor that a layer or model hands on."""
    if isinstance(output, torch.Tensor):
        return output
    first = output[0]
    return first if isinstance(first, torch.Tensor) else hidden_of(first)


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The longest `nn.ModuleList` with linears inside, by name of its entries; empty if there is none."""
    best: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best):
            if all(any(isinstance(inner, nn.Linear) for inner in layer.modules()) for layer in module):
                best = {f"{name}.{index}" if name else str(index): layer for index, layer in enumerate(module)}
    return best
