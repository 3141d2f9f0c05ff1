"""A model that computes in float32 while its weights stay as the checkpoint stores them, mapped from its files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loop_singular_bit.quantization.layer_calls import decoder_layers


class Float32Layers:
    """Holds one decoder layer in float32 at a time, the one that runs; while the context is open.

    A model that Transformers loads in the dtype of its checkpoint maps the files: the kernel can drop those pages, so
    that a model of many gigabytes needs one layer, the embedding and the head in memory. With gradients a layer runs
    again for its part of the backward pass, as `torch.utils.checkpoint` does, and keeps nothing in between.

    Threads may run the model at once; a layer that any of them is in stays.

    Args:
        model: without decoder layers all of it is converted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}
        self._stored: dict[str, dict[nn.Parameter, torch.Tensor]] = {}

    def __enter__(self) -> Float32Layers:
        self._layers = decoder_layers(self._model)
        inside = {id(parameter) for layer in self._layers.values() for parameter in layer.parameters()}
        self._outside = _converted([one for one in self._model.parameters() if id(one) not in inside])
        for name, layer in self._layers.items():
            layer.forward = self._wrapped(name, layer, layer.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers.values():
            del layer.forward
        for stored in [self._outside, *self._stored.values()]:
            _restore(stored)
        self._stored.clear()

    @property
    def layers_in_float32(self) -> list[str]:
        return list(self._stored)

    def _wrapped(self, name: str, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._acquire(name, layer)
            try:
                return forward(*args, **kwargs)
            finally:
                self._release(name)

        def run_with_gradients(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return run(*args, **kwargs)

        return run_with_gradients

    def _acquire(self, name: str, layer: nn.Module) -> None:
        with self._lock:
            self._users[name] = self._users.get(name, 0) + 1
            if name in self._stored:
                return
            for other in [other for other in self._stored if not self._users.get(other)]:
                _restore(self._stored.pop(other))
            self._stored[name] = _converted(list(layer.parameters()))

    def _release(self, name: str) -> None:
        with self._lock:
            self._users[name] -= 1


def _converted(parameters: list[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
    """Makes floating-point parameters float32; what they were."""
    stored = {}
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()
    return stored


def _restore(stored: dict[nn.Parameter, torch.Tensor]) -> None:
    for parameter, data in stored.items():
        parameter.data = data
