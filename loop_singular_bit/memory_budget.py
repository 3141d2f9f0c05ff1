"""Resident memory of this process: read, budgeted, and watched. All figures are in MB of 10^6 bytes.

What counts is VmHWM, the peak of everything resident: interpreter, torch, its thread pools and file pages that are
mapped. Pages that the kernel caches for reads and writes do not belong to the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import MemoryBudgetExceeded

_STATUS = Path("/proc/self/status")
# An earlier peak of the process that is this far above what it holds now has nothing to do with the work to come.
_EARLIER_PEAK_MB = 16.0


def resident_mb() -> float:
    """Resident memory of this process now."""
    return _status_mb("VmRSS")


def peak_resident_mb() -> float:
    """Peak resident memory of this process since it started, or since `forget_earlier_peak`."""
    return _status_mb("VmHWM")


def forget_earlier_peak() -> None:
    """Makes the kernel count the peak anew if the process once held much more than now; silent where it cannot."""
    if peak_resident_mb() - resident_mb() < _EARLIER_PEAK_MB:
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


@dataclass
class MemoryBudget:
    """A declared limit of resident memory, checked before the work and during it.

    Args:
        target_mb: the limit; None for none.
    """

    target_mb: float | None
    base_mb: float = field(default_factory=resident_mb)

    def __post_init__(self) -> None:
        if self.target_mb is not None and not self.target_mb > 0:
            raise ValueError(f"target_ram_mb: expected a positive number, got {self.target_mb}")

    def require(self, parts_mb: Mapping[str, float]) -> None:
        """Refuses work whose parts do not fit beside what the process holds already.

        Raises:
            MemoryBudgetExceeded: naming the parts and the target that would be met.
        """
        needed = self.base_mb + sum(parts_mb.values())
        if self.target_mb is not None and needed > self.target_mb:
            parts = " + ".join(f"{name} {megabytes:.0f}" for name, megabytes in parts_mb.items())
            raise MemoryBudgetExceeded(
                f"a target of {self.target_mb:.0f} MB cannot be met: this process already holds {self.base_mb:.0f} MB, "
                f"and the work needs at least {needed:.0f} MB in all ({parts} MB more). A target of "
                f"{_rounded_up(needed)} MB can be met.",
                target_mb=self.target_mb,
                needed_mb=_rounded_up(needed),
            )

    def available_mb(self) -> float:
        """What the work may add to what the process held at the start."""
        return float("inf") if self.target_mb is None else self.target_mb - self.base_mb

    def check(self, during: str) -> float:
        """The peak so far.

        Raises:
            MemoryBudgetExceeded: the peak is above the target; nothing is lost, the work can be resumed.
        """
        peak = peak_resident_mb()
        if self.target_mb is not None and peak > self.target_mb:
            raise MemoryBudgetExceeded(
                f"{during}: peak resident memory is {peak:.1f} MB, above the target of {self.target_mb:.0f} MB; what "
                f"is finished is kept: resume with a target of {_rounded_up(peak * 1.05)} MB or more",
                target_mb=self.target_mb,
                needed_mb=_rounded_up(peak * 1.05),
            )
        return peak


def _status_mb(key: str) -> float:
    descriptor = os.open(_STATUS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, 8192)
    finally:
        os.close(descriptor)
    for line in text.splitlines():
        if line.startswith(key.encode() + b":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"{_STATUS} has no line {key}")


def _rounded_up(megabytes: float) -> int:
    return -(-int(megabytes + 1) // 5) * 5
