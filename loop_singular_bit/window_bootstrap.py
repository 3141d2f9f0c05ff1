"""Confidence intervals of figures over tokens. Whole windows are drawn again: tokens of a text are not independent.

Percentile intervals of Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

RESAMPLES = 1000
CONFIDENCE = 0.95
_SEED = 20231
# Weights of so many tokens are held at once.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap standard error and its 95 % interval; None for both with fewer than two windows."""

    value: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None


class WindowBootstrap:
    """Draws 1000 times as many windows as there are, with replacement; always the same ones for a number of windows.

    Args:
        window_lengths: values in each window, in their order.
    """

    def __init__(self, window_lengths: Sequence[int]) -> None:
        self._lengths = torch.tensor(window_lengths)
        self._windows = len(window_lengths)
        self._window_of_value = torch.arange(self._windows).repeat_interleave(self._lengths)

    def mean(self, values: torch.Tensor) -> Estimate:
        """Mean of float64 values [number of values]."""
        value = float(values.mean())
        if self._windows < 2:
            return Estimate(value)
        sums = torch.zeros(self._windows, dtype=torch.float64).index_add_(0, self._window_of_value, values)
        resampled = [
            counts @ sums / (counts @ self._lengths.double())
            for counts in self._counts(max(1, _WEIGHTS_AT_ONCE // self._windows))
        ]
        return _estimate(value, torch.cat(resampled))

    def quantiles(self, values: torch.Tensor, shares: Sequence[float]) -> list[Estimate]:
        """For each share the smallest of the values [number of values] that at least that share does not exceed."""
        ordered, order = values.sort()
        windows = self._window_of_value[order]
        resampled: list[list[torch.Tensor]] = [[] for _ in shares]
        whole = torch.ones(1, self._windows, dtype=torch.float64)
        draws = () if self._windows < 2 else self._counts(max(1, _WEIGHTS_AT_ONCE // len(values)))
        for counts in chain((whole,), draws):
            ranks = counts[:, windows].cumsum(dim=1)
            for share, found in zip(shares, resampled, strict=True):
                wanted = (share * ranks[:, -1:]).ceil().clamp(min=1)
                found.append(ordered[torch.searchsorted(ranks, wanted)[:, 0]])
        return [
            _estimate(float(found[0]), torch.cat(found[1:])) if len(found) > 1 else Estimate(float(found[0]))
            for found in resampled
        ]

    def _counts(self, at_once: int) -> Iterator[torch.Tensor]:
        """float64 [at most at_once, windows]: how often each window was drawn."""
        generator = torch.Generator().manual_seed(_SEED)
        for first in range(0, RESAMPLES, at_once):
            shape = (min(at_once, RESAMPLES - first), self._windows)
            drawn = torch.randint(self._windows, shape, generator=generator)
            ones = torch.ones(shape, dtype=torch.float64)
            yield torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, ones)


def _estimate(value: float, resampled: torch.Tensor) -> Estimate:
    ordered = resampled.sort().values
    tail = (1 - CONFIDENCE) / 2
    low, high = ordered[round(tail * RESAMPLES)], ordered[round((1 - tail) * RESAMPLES) - 1]
    return Estimate(value, float(resampled.std()), (float(low), float(high)))
