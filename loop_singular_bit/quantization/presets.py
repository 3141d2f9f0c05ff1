"""Named choices of planes and outliers, and what each of them needs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal


class UncalibratedWarning(UserWarning):
    """A preset is used without calibration that loses visible quality without it."""


@dataclass(frozen=True)
class Preset:
    """How the weights of a model are packed.

    Args:
        name: as users type it.
        planes: sign planes of linear layers.
        outlier_fraction: outliers of a row over its columns; see `outlier_count`.
        embedding_planes: sign planes of embeddings and output heads.
        column_scales: whether linears get one scale per column; embeddings and output heads get none.
        means: whether rows get a mean.
        without_calibration: "fine", "warn" (usable, visibly damaged) or "force" (unusable on real language models).
    """

    name: str
    planes: int
    outlier_fraction: float
    embedding_planes: int
    column_scales: bool
    means: bool
    without_calibration: Literal["fine", "warn", "force"]


_DEFAULT_OUTLIER_FRACTION = 1 / 128

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("b1", 1, _DEFAULT_OUTLIER_FRACTION, 6, column_scales=True, means=False, without_calibration="force"),
        Preset("b2", 2, _DEFAULT_OUTLIER_FRACTION, 6, column_scales=True, means=False, without_calibration="warn"),
        Preset("b3", 3, _DEFAULT_OUTLIER_FRACTION, 6, column_scales=True, means=False, without_calibration="warn"),
        Preset("b4", 4, _DEFAULT_OUTLIER_FRACTION, 8, column_scales=True, means=False, without_calibration="fine"),
        Preset("historic", 1, 0.02, 6, column_scales=False, means=True, without_calibration="warn"),
    )
}

DEFAULT_PRESET = "b2"


def find_preset(name: str | Preset) -> Preset:
    """The preset of that name; a `Preset` is returned as it is.

    Raises:
        ValueError: unknown name; the message lists the choices.
    """
    if isinstance(name, Preset):
        return name
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def outlier_count(in_features: int, fraction: float) -> int:
    """Outliers per row: ceil(fraction * in_features), at least 1, at most in_features.

    Even a preset without outliers keeps one per row: converged models have single weights of 20 to 175 standard
    deviations.

    Raises:
        ValueError: the fraction is not in [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"outlier_fraction: expected 0 to 1, got {fraction}")
    # 0.02 * 50 is 1.0000000000000002 in places: a count that is an integer on paper must not round up.
    return min(in_features, max(1, math.ceil(fraction * in_features - 1e-9)))


def check_calibration(
    preset: str | Preset, *, force: bool = False, stacklevel: int = 2, subject: str | None = None
) -> None:
    """Says loudly what a preset does without calibration; to be called once per model, before any work.

    Args:
        stacklevel: whom the warning points at: 2 is the caller of this function, 3 the caller's caller.
        subject: what the messages are about, when it is not the preset itself but something as small.

    Warns:
        UncalibratedWarning: the preset visibly damages a model without calibration.

    Raises:
        ValueError: the preset is unusable without calibration, and `force` is not set.
    """
    preset = find_preset(preset)
    subject = subject or f"preset {preset.name!r}"
    if preset.without_calibration == "force" and not force:
        raise ValueError(
            f"{subject} without calibration makes language models unusable (about {preset.planes} bit per "
            "weight from the weights alone); take 'b4', or pass force=True (--force) to do it all the same"
        )
    if preset.without_calibration != "fine":
        warnings.warn(
            f"{subject} without calibration visibly damages language models; 'b4' does not. Evaluate the "
            "result before you use it.",
            UncalibratedWarning,
            stacklevel=stacklevel,
        )
