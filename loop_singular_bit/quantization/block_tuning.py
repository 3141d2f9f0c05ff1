"""Tuning decoder layer by decoder layer: for models of which only one layer at a time can be held for training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.layer_calls import (
    HiddenStates,
    LayerCall,
    LayerRecorder,
    hidden_of,
    running_until,
)
from loop_singular_bit.quantization.tunable_linear import TunableLinear
from loop_singular_bit.quantization.tuning_steps import (
    Rates,
    TuningSteps,
    Workers,
    calculation_dtype,
    chosen_windows,
    load_checkpoint,
    save_checkpoint,
)

_ACTIVATION_BYTES = 2 << 30

BlockProgress = Callable[[int, str], None]


class BlockTuning:
    """Trains the packed weights of one decoder layer after another to put out what the original's layer does.

    A layer's inputs are those of the packed layers before it, its targets the original's hidden states (Li and others
    2021, BRECQ): it also makes good for what is lost already. Only one layer has dense weights, latent weights and
    moments; hidden states of all windows lie in memory or, above 2 GiB, in a file.

    Args:
        model: the original, in evaluation mode and without gradients.
        packed_weights: by name of linear; those outside of decoder layers stay as they are.
        windows: int64 [windows, window].
        trained: numbers of the windows that are trained on; a layer is kept as it was if its error on the others rose.
        signs: whether signs are tuned too.
        rates: of each layer.
        batch, seed: see `TuningOptions`.

    Raises:
        ValueError: the model's layers do not just hand one tensor on.
    """

    def __init__(
        self,
        model: nn.Module,
        packed_weights: Mapping[str, PackedWeight],
        windows: torch.Tensor,
        trained: list[int],
        *,
        signs: bool,
        rates: Rates,
        batch: int,
        seed: int,
        workers: Workers,
    ) -> None:
        self._model = model
        self._packed = dict(packed_weights)
        self._windows = windows
        self._trained = trained
        self._held_out = sorted(set(range(len(windows))) - set(trained))
        self._signs = signs
        self._rates = rates
        self._batch = batch
        self._seed = seed
        self._workers = workers
        self._dtype = calculation_dtype()
        with torch.no_grad(), LayerRecorder(model) as recorder:
            self._run_model(0)
        calls = recorder.chain()
        if calls is None:
            raise ValueError("model: expected decoder layers that each hand one tensor to the next")
        self._calls = calls

    @property
    def total_steps(self) -> int:
        return len(self._calls) * self._rates.steps

    def run(
        self, checkpoint: Path | None, checkpoint_steps: int, identity: str, progress: BlockProgress | None
    ) -> dict[str, PackedWeight]:
        """The packed weights, tuned.

        Args:
            checkpoint: file that is written every checkpoint_steps and after each layer, and continued if it is of
                the same work.
            progress: called after each step with how many there have been, and what was done.
        """
        self._checkpoint, self._checkpoint_steps, self._identity = checkpoint, checkpoint_steps, identity
        stored = load_checkpoint(checkpoint, identity) or {"layer": 0, "step": 0, "state": None, "packed": {}}
        for name, tensors in stored["packed"].items():
            shape = self._packed[name].out_features, self._packed[name].in_features
            self._packed[name] = PackedWeight.from_tensors(tensors, *shape)
        directory = None if checkpoint is None else checkpoint.parent
        first = self._calls[0]
        targets = HiddenStates(len(self._windows), first.hidden, _ACTIVATION_BYTES, directory)
        inputs = HiddenStates(len(self._windows), first.hidden, _ACTIVATION_BYTES, directory)
        with running_until(first.layer, self._run_model) as run_until:
            self._for_windows(run_until, targets.put)
        for window in range(len(self._windows)):
            inputs.put(window, targets.get(window))
        for number, call in enumerate(self._calls):
            self._advance(call, call.layer, targets)
            layer, tunables = self._student(call)
            if tunables and number >= stored["layer"]:
                resumed = stored if number == stored["layer"] and stored["state"] is not None else None
                self._tune(number, call, layer, tunables, targets, inputs, resumed, progress)
                self._save(number + 1, 0, None)
            self._advance(call, layer, inputs)
        return self._packed

    def _advance(self, call: LayerCall, layer: nn.Module, states: HiddenStates) -> None:
        """Puts a layer's outputs in the place of its inputs."""
        self._for_windows(lambda window: _run(layer, call, states.get(window)), states.put)

    def _save(self, layer: int, step: int, state: dict[str, Any] | None) -> None:
        if self._checkpoint is not None:
            packed = {name: weight.tensors() for name, weight in self._packed.items()}
            content = {"identity": self._identity, "layer": layer, "step": step, "state": state, "packed": packed}
            save_checkpoint(self._checkpoint, content)

    def _student(self, call: LayerCall) -> tuple[nn.Module, dict[str, TunableLinear]]:
        """A copy of a layer with its packed weights in it."""
        tensors = [*call.layer.parameters(), *call.layer.buffers()]
        layer = copy.deepcopy(call.layer, {id(tensor): tensor for tensor in tensors})
        tunables = {}
        for name, packed in self._packed.items():
            if name.startswith(call.name + "."):
                inside = name.removeprefix(call.name + ".")
                linear = layer.get_submodule(inside)
                assert isinstance(linear, nn.Linear)
                tunables[name] = TunableLinear(packed, linear, self._signs)
                tunables[name].dense = packed.dequantize()
                parent, _, child = inside.rpartition(".")
                setattr(layer.get_submodule(parent), child, tunables[name])
        return layer, tunables

    def _tune(
        self,
        number: int,
        call: LayerCall,
        layer: nn.Module,
        tunables: dict[str, TunableLinear],
        targets: HiddenStates,
        inputs: HiddenStates,
        stored: dict[str, Any] | None,
        progress: BlockProgress | None,
    ) -> None:
        signal = self._mean(lambda window: targets.get(window).float().square().mean(), self._trained)

        def error(window: int) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
                output = _run(layer, call, inputs.get(window))
            return (output.float() - targets.get(window).float()).square().mean() / signal

        low_precision = False
        before = self._mean(error, self._held_out)
        steps = TuningSteps(tunables, self._rates, self._dtype)
        first = 0
        if stored is not None:
            steps.load_state(stored["state"])
            first = stored["step"]
        low_precision = self._dtype == torch.bfloat16
        for step in range(first, self._rates.steps):
            chosen = chosen_windows(step, len(self._trained), self._batch, self._seed)
            loss = steps.take(step, [self._trained[window] for window in chosen], error, self._workers)
            if (step + 1) % self._checkpoint_steps == 0 and step + 1 < self._rates.steps:
                self._save(number, step + 1, steps.state())
            if progress is not None:
                progress(
                    number * self._rates.steps + step + 1,
                    f"layer {number + 1} of {len(self._calls)}, relative error {loss**0.5:.4f}",
                )
        low_precision = False
        tuned = {name: tunable.packed() for name, tunable in tunables.items()}
        for name, tunable in tunables.items():
            tunable.dense = tuned[name].dequantize()
        if self._mean(error, self._held_out) < before:
            self._packed.update(tuned)
        else:
            for name, tunable in tunables.items():
                tunable.dense = self._packed[name].dequantize()

    def _mean(self, value: Callable[[int], torch.Tensor], windows: list[int]) -> float:
        def run(window: int) -> float:
            with torch.no_grad():
                return value(window).item()

        return sum(self._workers.map(run, windows)) / len(windows)

    def _run_model(self, window: int) -> Any:
        return self._model(input_ids=self._windows[window : window + 1], use_cache=False)

    def _for_windows(self, run: Callable[[int], torch.Tensor], take: Callable[[int, torch.Tensor], None]) -> None:
        def work(window: int) -> torch.Tensor:
            with torch.no_grad():
                return run(window)

        for window, hidden in enumerate(self._workers.map(work, range(len(self._windows)))):
            take(window, hidden)


def _run(layer: nn.Module, call: LayerCall, hidden: torch.Tensor) -> torch.Tensor:
    return hidden_of(layer(hidden, *call.args, **call.kwargs))
