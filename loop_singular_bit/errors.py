"""What can go wrong with a checkpoint as a whole; the command line gives each its own exit code."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint, a shard or a tensor is missing, damaged or of a kind that is not supported. Names the file."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but of a kind that the native runtime does not run; Transformers may."""


class OutputExistsError(FileExistsError):
    """The output directory holds something already, and neither resuming nor overwriting was asked for."""


class MemoryBudgetExceeded(MemoryError):
    """The declared budget of resident memory cannot be met, or was not. Carries the numbers.

    Attributes:
        target_mb: the declared budget, in units of 10^6 bytes like every other figure here.
        needed_mb: what would be enough.
    """

    def __init__(self, message: str, *, target_mb: float, needed_mb: float) -> None:
        super().__init__(message)
        self.target_mb = target_mb
        self.needed_mb = needed_mb


class QualityRefusedError(ValueError):
    """The preset is known to ruin a model without calibration, and force was not given."""
