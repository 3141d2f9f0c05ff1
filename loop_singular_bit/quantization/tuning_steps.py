"""Steps of an optimizer over tunable linears: windows in parallel, the same bytes for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from loop_singular_bit.quantization.tunable_linear import TunableLinear

_WARM_UP_STEPS = 10
_LEAST_RATE = 0.02
_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads that each calculate with one thread; what goes in together comes out in order."""

    def __init__(self, executor: ThreadPoolExecutor, threads: int) -> None:
        self._executor = executor
        self._threads = threads

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """As many results exist at once as there are threads."""
        for first in range(0, len(items), self._threads):
            yield from list(self._executor.map(function, items[first : first + self._threads]))


@contextmanager
def single_threaded_workers(threads: int | None = None) -> Iterator[Workers]:
    """Workers, while torch itself uses one thread everywhere: sums are split among threads in no case.

    Args:
        threads: None for as many as torch uses outside.
    """
    before = torch.get_num_threads()
    count = before if threads is None else threads
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=count, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield Workers(executor, count)
    finally:
        torch.set_num_threads(before)


def calculation_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


@dataclass(frozen=True)
class Rates:
    """Learning rates at their highest, see `TuningOptions`, and how many steps they last."""

    scales: float
    signs: float
    steps: int

    def factor(self, step: int) -> float:
        """Warm-up, then half a cosine."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / _WARM_UP_STEPS) * max(_LEAST_RATE, cosine)


class TuningSteps:
    """Optimizers of tunable linears: AdamW for scales and outliers, Muon for latent weights.

    Signs change when latent weights cross borders, and noise makes them cross for nothing. Muon (Jordan 2024) moves a
    matrix along the directions that gradients agree on, and wins more in the same number of steps than Adam.
    """

    def __init__(self, tunables: Mapping[str, TunableLinear], rates: Rates, dtype: torch.dtype) -> None:
        self._tunables = list(tunables.values())
        self._rates = rates
        self._dtype = dtype
        self._optimizers = [_optimizers(tunable, rates) for tunable in self._tunables]

    def take(
        self, step: int, windows: Sequence[int], loss_of: Callable[[int], torch.Tensor], workers: Workers
    ) -> float:
        """One step for the mean of the windows' losses; that mean.

        Args:
            loss_of: the loss of a window, with the linears as they are.
        """
        self._for_linears(workers, lambda index: self._tunables[index].make_dense(self._dtype))

        def gradients_of(window: int) -> tuple[float, tuple[torch.Tensor, ...]]:
            loss = loss_of(window)
            dense = [tunable.dense for tunable in self._tunables]
            return loss.item(), torch.autograd.grad(loss, dense, materialize_grads=True)  # type: ignore[arg-type]

        total = 0.0
        sums: list[torch.Tensor] = []
        for loss, gradients in workers.map(gradients_of, windows):
            total += loss
            if not sums:
                sums = [gradient.float() for gradient in gradients]
            else:
                for running, gradient in zip(sums, gradients, strict=True):
                    running.add_(gradient)

        def update(index: int) -> None:
            self._tunables[index].take_gradient(sums[index] / len(windows))
            for optimizer in self._optimizers[index]:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * self._rates.factor(step)
                optimizer.step()
                optimizer.zero_grad()

        self._for_linears(workers, update)
        return total / len(windows)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "values": [[parameter.detach() for parameter in tunable.tuned_parameters()] for tunable in self._tunables],
            "optimizers": [[optimizer.state_dict() for optimizer in pair] for pair in self._optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for tunable, values in zip(self._tunables, state["values"], strict=True):
            for parameter, value in zip(tunable.tuned_parameters(), values, strict=True):
                parameter.data.copy_(value)
        for pair, states in zip(self._optimizers, state["optimizers"], strict=True):
            for optimizer, stored in zip(pair, states, strict=True):
                optimizer.load_state_dict(stored)

    def _for_linears(self, workers: Workers, function: Callable[[int], None]) -> None:
        for _ in workers.map(function, range(len(self._tunables))):
            pass


def chosen_windows(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Windows of one step: every epoch goes through all of them in an order of its own."""
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        generator = torch.Generator().manual_seed(seed + position // count)
        chosen.append(int(torch.randperm(count, generator=generator)[position % count]))
    return chosen


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)


def load_checkpoint(path: Path | None, identity: str) -> dict[str, Any] | None:
    """What an interrupted run of the same work stored."""
    if path is None or not path.is_file():
        return None
    stored: dict[str, Any] = torch.load(path, weights_only=True)
    return stored if stored["identity"] == identity else None


def _optimizers(tunable: TunableLinear, rates: Rates) -> list[torch.optim.Optimizer]:
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(tunable.scale_parameters(), lr=rates.scales, betas=_BETAS, weight_decay=0.0)
    ]
    if tunable.latent_change is not None:
        optimizers.append(
            torch.optim.Muon(
                [tunable.latent_change],
                lr=rates.signs,
                momentum=_MOMENTUM,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
