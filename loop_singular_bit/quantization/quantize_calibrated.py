"""Weights packed for the least error of their outputs, with what `calibration` knows about their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loop_singular_bit import ops
from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.calibration import (
    DEFAULT_MAX_WINDOWS,
    DEFAULT_WINDOW,
    ProgressCallback,
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from loop_singular_bit.quantization.outlier_preserving_quantizer import OutlierPreservingQuantizer
from loop_singular_bit.quantization.presets import DEFAULT_PRESET, Preset, find_preset, outlier_count
from loop_singular_bit.quantization.quantize_model import QuantizationConfig, QuantizationReport, quantize_model
from loop_singular_bit.quantization.quantize_weight import quantize_weight

DEFAULT_ROUNDS = 5
DEFAULT_DAMPING = 0.01
REPORTED_ROWS = 512


@dataclass(frozen=True)
class CalibratedWeight:
    """A packed weight and how it came about.

    Attributes:
        losses: tr(E H E') / tr(W H W') with the damped hessian: after the sweep, after each round, at the end.
        damping: share of the mean of the hessian's diagonal that was added to it.
    """

    packed_weight: PackedWeight
    losses: tuple[float, ...]
    damping: float


@dataclass(frozen=True)
class CalibratedLinear:
    """Figures of one linear: relative errors of its outputs on the calibration text, sqrt(tr(E H E') / tr(W H W')).

    Attributes:
        output_error_before: of the same preset without calibration.
        output_error: as packed.
        damping: see `CalibratedWeight`; None where there was no calibration.
        tokens: that went into the statistics; 0 where the linear was never called, and packed without calibration.
    """

    name: str
    planes: int
    outliers: int
    bits_per_weight: float
    output_error_before: float | None
    output_error: float | None
    damping: float | None
    tokens: int


def quantize_weight_calibrated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    preset: str | Preset = DEFAULT_PRESET,
    *,
    planes: int | None = None,
    outliers: int | None = None,
    rounds: int = DEFAULT_ROUNDS,
    damping: float = DEFAULT_DAMPING,
) -> CalibratedWeight:
    """Packs a weight [out_features, in_features] for the least error of its outputs; see `ops.quantize_calibrated`.

    Args:
        hessian: float32 [in_features, in_features], the second moment of the inputs.
        preset: where planes, outliers and column scales come from.
        planes: 1 to 4, instead of the preset's.
        outliers: per row, instead of the preset's.

    Raises:
        ValueError: a preset with means, which are not calibrated, or see `ops.quantize_calibrated`.
    """
    chosen = find_preset(preset)
    if chosen.means:
        raise ValueError(f"preset {chosen.name!r} has means, which are not calibrated; take b1, b2, b3 or b4")
    weight = weight.detach()
    out_features, in_features = weight.shape
    count = outlier_count(in_features, chosen.outlier_fraction) if outliers is None else outliers
    scales = ops.fit_column_scales(weight) if chosen.column_scales else None
    signs, row_scales, outlier_columns, outlier_deltas, outlier_scales, column_scales, losses, used = (
        ops.quantize_calibrated(
            weight, hessian, chosen.planes if planes is None else planes, count, scales, rounds, damping
        )
    )
    packed_weight = PackedWeight(
        signs,
        row_scales,
        outlier_columns,
        outlier_deltas,
        outlier_scales,
        out_features=out_features,
        in_features=in_features,
        column_scales=column_scales if chosen.column_scales else None,
    )
    return CalibratedWeight(packed_weight, tuple(losses.tolist()), float(used))


def output_error(weight: torch.Tensor, packed_weight: PackedWeight, hessian: torch.Tensor) -> float:
    """Relative error of a linear's outputs: sqrt(tr(E H E') / tr(W H W')); 0 for a weight that puts nothing out.

    Of a weight with more than 512 rows that many, evenly spread, stand for all: with all, the error would cost as much
    as a few rounds of refinement.
    """
    count = min(len(weight), REPORTED_ROWS)
    chosen = torch.arange(count) * len(weight) // count
    exact = weight.detach()[chosen].float()
    difference = exact - packed_weight.dequantize()[chosen]
    squared = float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    signal = float(((exact @ hessian) * exact).sum(dtype=torch.float64))
    return max(squared / signal, 0.0) ** 0.5 if signal > 0 else 0.0


class CalibratedQuantizer(OutlierPreservingQuantizer):
    """Packs the linears of a model with the statistics of their inputs; for `LoopCompressor` and `quantize_model`.

    Args:
        statistics: by name of linear. A linear without any was never called and is packed without calibration.
        outlier_ratio: outliers over weights in a row, 0 to 1; None means the preset's.
        preset: name of a preset or a `Preset`.
        layouts: (planes, outliers per row) of linears that differ from the preset.
        packed_weights: of linears that are packed already, and tuned; they are handed out as they are.
        rounds: of refinement.
        damping: share of the mean of the hessian's diagonal that is added to it.
        measure_before: also pack every weight without calibration, for `output_error_before`.
        error_compensation: False packs as without calibration, only that columns count as much as their mean squared
            input: no sweep, no rounds.
        on_linear: called with the figures of each linear.

    Attributes:
        linears: figures of each linear that was packed, in that order.
    """

    def __init__(
        self,
        statistics: StatisticsStore,
        outlier_ratio: float | None = None,
        preset: str | Preset = DEFAULT_PRESET,
        *,
        layouts: Mapping[str, tuple[int, int]] | None = None,
        packed_weights: Mapping[str, PackedWeight] | None = None,
        rounds: int = DEFAULT_ROUNDS,
        damping: float = DEFAULT_DAMPING,
        measure_before: bool = True,
        calibration: str = "calibrated",
        error_compensation: bool = True,
        on_linear: Callable[[CalibratedLinear], None] | None = None,
    ) -> None:
        super().__init__(outlier_ratio, preset)
        if self.preset.means:
            raise ValueError(f"preset {self.preset.name!r} has means, which are not calibrated; take b1, b2, b3 or b4")
        self.statistics = statistics
        self.layouts = dict(layouts or {})
        self.packed_weights = dict(packed_weights or {})
        self.rounds = rounds
        self.damping = damping
        self.measure_before = measure_before
        self.calibration = calibration
        self.error_compensation = error_compensation
        self.on_linear = on_linear
        self.linears: list[CalibratedLinear] = []

    def layout_of(self, name: str, in_features: int) -> tuple[int, int]:
        """Planes and outliers per row of a linear."""
        return self.layouts.get(name, (self.preset.planes, outlier_count(in_features, self.outlier_ratio)))

    def quantize_weight(self, weight: torch.Tensor, name: str) -> PackedWeight:
        """Packs one weight; remembers its figures.

        Raises:
            ValueError: see `quantize_weight_calibrated`.
        """
        planes, outliers = self.layout_of(name, weight.shape[1])
        # Statistics know modules, checkpoints know tensors.
        module = name.removesuffix(".weight")
        if module not in self.statistics:
            packed = quantize_weight(weight, self.preset, planes=planes, outlier_fraction=outliers / weight.shape[1])
            self._remember(name, packed, None, None, None, 0)
            return packed
        statistics = self.statistics[module]
        if module in self.packed_weights:
            calibrated = CalibratedWeight(self.packed_weights[module], (), self.damping)
        elif not self.error_compensation:
            weighted = quantize_weight(
                weight,
                self.preset,
                planes=planes,
                outlier_fraction=outliers / weight.shape[1],
                column_importance=statistics.hessian.diagonal(),
            )
            calibrated = CalibratedWeight(weighted, (), 0.0)
        else:
            calibrated = quantize_weight_calibrated(
                weight,
                statistics.hessian,
                self.preset,
                planes=planes,
                outliers=outliers,
                rounds=self.rounds,
                damping=self.damping,
            )
        before: float | None = None
        if self.measure_before:
            plain = quantize_weight(weight, self.preset, planes=planes, outlier_fraction=outliers / weight.shape[1])
            before = output_error(weight, plain, statistics.hessian)
        after = output_error(weight, calibrated.packed_weight, statistics.hessian)
        self._remember(name, calibrated.packed_weight, before, after, calibrated.damping, statistics.tokens)
        return calibrated.packed_weight

    def report(self) -> dict[str, Any]:
        """What is worth keeping beside the packed weights."""
        measured = [linear for linear in self.linears if linear.output_error is not None]
        raised = {linear.name: linear.damping for linear in measured if (linear.damping or 0) > self.damping}
        return {
            "calibration": self.calibration,
            "rounds": self.rounds,
            "damping": self.damping,
            "error_compensation": self.error_compensation,
            "raised_damping": raised,
            "uncalibrated": [linear.name for linear in self.linears if linear.output_error is None],
            "linears": [vars(linear) for linear in self.linears],
        }

    def _remember(
        self,
        name: str,
        packed: PackedWeight,
        before: float | None,
        after: float | None,
        damping: float | None,
        tokens: int,
    ) -> None:
        figures = CalibratedLinear(
            name, packed.planes, packed.outliers, packed.bits_per_weight, before, after, damping, tokens
        )
        self.linears.append(figures)
        if self.on_linear is not None:
            self.on_linear(figures)


def quantize_model_calibrated(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    config: QuantizationConfig | None = None,
    *,
    window: int = DEFAULT_WINDOW,
    max_windows: int = DEFAULT_MAX_WINDOWS,
    rounds: int = DEFAULT_ROUNDS,
    damping: float = DEFAULT_DAMPING,
    progress: ProgressCallback | None = None,
) -> tuple[QuantizationReport, list[CalibratedLinear]]:
    """Swaps the linears and embeddings inside a model for packed ones, in place, as `quantize_model` does.

    The linears are packed for the least error of their outputs on the texts; embeddings and heads as without texts.

    Args:
        model: takes `input_ids` [1, window].
        tokenizer: a Transformers tokenizer.
        texts: of the kind the model will see; 16 to 64 thousand tokens are enough.
        config: see `quantize_model`.
        window, max_windows: see `calibration_windows`.
        rounds, damping: see `ops.quantize_calibrated`.
        progress: called after each decoder layer of the pass over the texts.

    Returns:
        The report of `quantize_model`, and of each linear its output errors with and without calibration.

    Raises:
        ValueError: the texts are too short, the preset has means, or see `quantize_model`.
    """
    config = config or QuantizationConfig()
    windows = calibration_windows(tokenizer, texts, window=window, max_windows=max_windows)
    statistics = collect_statistics(model, windows, progress=progress)
    quantizer = CalibratedQuantizer(statistics, config.outlier_fraction, config.preset, rounds=rounds, damping=damping)
    report = quantize_model(model, replace(config, quantizer=quantizer))
    return report, quantizer.linears
