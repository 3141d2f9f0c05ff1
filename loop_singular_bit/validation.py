"""Compressed weights, layers and models against their originals, and verdicts on them.

Only the model-level figures (perplexity ratio, KL divergence, top-1 agreement) say something about quality; an error of
a weight or of a layer's output is a diagnosis, not a verdict, and is named as what it is. Limits on them can be set;
none is by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .language_model_evaluation import NOT_EVALUATED, LanguageModelEvaluation, evaluate_language_model
from .packed_weight import PackedWeight
from .quantization.weight_errors import WeightErrors, measure_weight_errors

__all__ = [
    "NOT_EVALUATED",
    "LanguageModelEvaluation",
    "QualityValidator",
    "evaluate_language_model",
    "grade_kl_divergence",
]

# Rows of a weight, or tokens of a layer's inputs, that are looked at in double precision at once.
_ROWS_AT_ONCE = 1024


def grade_kl_divergence(kl_divergence: float) -> str:
    """A word for a mean KL divergence in nats per token, by what llama.cpp's formats reach on 7B models.

    Up to 0.006 "transparent" (Q6_K), 0.03 "good" (Q4_K_M), 0.1 "fair" (Q3_K), 0.35 "degraded" (Q2_K), 0.8 "poor",
    above "broken".
    """
    for limit, grade in ((0.006, "transparent"), (0.03, "good"), (0.1, "fair"), (0.35, "degraded"), (0.8, "poor")):
        if kl_divergence <= limit:
            return grade
    return "broken"


@dataclass(frozen=True)
class Criterion:
    """One figure and its limit."""

    measured: float
    limit: float
    unit: str
    passed: bool


class QualityValidator:
    """Measures and judges at three levels: weights, outputs of layers, models. Made to be subclassed.

    Its verdicts decide `LoopCompressor.validate_compression`.

    Args:
        quality_threshold: the largest increase of perplexity, in percent of the original's, at which a model passes;
            None for any.
        max_kl_divergence: the largest mean KL divergence, in nats per token, at which a model passes; None for any.
        min_top1_agreement: the smallest share of equal first words, 0 to 1, at which a model passes; None for any.
        max_relative_error: of a weight (Frobenius), at which it passes; None: weights are measured and not judged.
        max_output_error: of a layer's outputs (relative L2), at which it passes; None: measured and not judged.

    Raises:
        ValueError: a limit below 0, or an agreement above 1.

    Subclasses change what is measured in `validate_weight` and `validate_layer`, and what counts as good in
    `weight_passes`, `layer_passes`, `passes` (of a model) and `grade`.
    """

    def __init__(
        self,
        quality_threshold: float | None = 1.0,
        *,
        max_kl_divergence: float | None = None,
        min_top1_agreement: float | None = None,
        max_relative_error: float | None = None,
        max_output_error: float | None = None,
    ) -> None:
        if quality_threshold is not None and not quality_threshold >= 0:
            raise ValueError(f"quality_threshold: expected a percentage of at least 0, got {quality_threshold}")
        if min_top1_agreement is not None and not 0 <= min_top1_agreement <= 1:
            raise ValueError(f"min_top1_agreement: expected 0 to 1, got {min_top1_agreement}")
        for name, limit in (
            ("max_kl_divergence", max_kl_divergence),
            ("max_relative_error", max_relative_error),
            ("max_output_error", max_output_error),
        ):
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name}: expected at least 0, got {limit}")
        self.quality_threshold = None if quality_threshold is None else float(quality_threshold)
        self.max_kl_divergence = max_kl_divergence
        self.min_top1_agreement = min_top1_agreement
        self.max_relative_error = max_relative_error
        self.max_output_error = max_output_error

    def validate_weight(self, original_weight: torch.Tensor, compressed: PackedWeight | torch.Tensor) -> dict[str, Any]:
        """Errors of one compressed weight [out_features, in_features].

        Args:
            original_weight: the dense weight.
            compressed: its packed form, or a dense approximation of it.

        Returns:
            relative_error: ||original - compressed|| / ||original||, Frobenius.
            sqnr_db: the same as a signal-to-noise ratio in decibels; infinite when exact.
            cosine: of the angle between the two, all weights as one vector.
            max_absolute_error: the largest |original - compressed|.
            mae_over_range_percent: the figure older documents call quality error; see `WeightErrors`.
            bits_per_weight: of a packed weight.
            passed: `weight_passes` of these figures.

        Raises:
            ValueError: the shapes differ.
        """
        figures = self._weight_figures(original_weight, compressed)
        return {**figures, "passed": self.weight_passes(figures)}

    def validate_layer(
        self,
        original_weight: torch.Tensor,
        compressed: PackedWeight | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Errors of one compressed weight, and of the layer's outputs on given inputs.

        Args:
            original_weight: the dense weight [out_features, in_features].
            compressed: its packed form, or a dense approximation of it.
            inputs: [..., in_features] to judge outputs on; without them the output figures are "not evaluated".

        Returns:
            What `validate_weight` returns, and output_error, output_cosine: relative L2 of the outputs, and their mean
            cosine over tokens; the outputs of a packed weight are those its kernels compute. passed: whether neither
            `weight_passes` nor `layer_passes` says no; "not evaluated" when none of them judges.

        Raises:
            ValueError: the shapes differ.
        """
        figures = self._weight_figures(original_weight, compressed)
        figures |= {"output_error": NOT_EVALUATED, "output_cosine": NOT_EVALUATED}
        if inputs is not None:
            tokens = inputs.detach().float().reshape(-1, inputs.shape[-1])
            errors = _OutputErrors()
            for part in tokens.split(_ROWS_AT_ONCE):
                if isinstance(compressed, PackedWeight):
                    outputs = compressed.linear(part)
                else:
                    outputs = nn.functional.linear(part, compressed.detach().float())
                errors.add(nn.functional.linear(part, original_weight.detach().float()), outputs)
            figures |= errors.figures()
        return {**figures, "passed": _all_pass([self.weight_passes(figures), self.layer_passes(figures)])}

    def validate_layers(
        self, model: nn.Module, original: nn.Module, windows: torch.Tensor
    ) -> dict[str, dict[str, Any]]:
        """Errors of the outputs of every linear, on the inputs that the original model gives it.

        Args:
            model: the compressed model; its linears have the names of the original's.
            original: takes `input_ids`.
            windows: int64 [windows, tokens], such as those of `calibration_windows`.

        Returns:
            By name of linear: output_error, output_cosine and passed (`layer_passes`).

        Raises:
            ValueError: a linear of the original that the model lacks.
        """
        errors: dict[str, _OutputErrors] = {}
        handles = []

        def compare(name: str, compressed: nn.Module) -> Any:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                errors.setdefault(name, _OutputErrors()).add(output, compressed(args[0]))

            return hook

        for name, module in original.named_modules():
            if isinstance(module, nn.Linear):
                try:
                    compressed = model.get_submodule(name)
                except AttributeError as error:
                    raise ValueError(f"model: expected the linears of the original, {name} is missing") from error
                handles.append(module.register_forward_hook(compare(name, compressed)))
        device = next(original.parameters()).device
        try:
            with torch.inference_mode():
                for window in windows:
                    original(input_ids=window[None].to(device))
        finally:
            for handle in handles:
                handle.remove()
        results = {name: measured.figures() for name, measured in errors.items()}
        return {name: {**figures, "passed": self.layer_passes(figures)} for name, figures in results.items()}

    def validate_model(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: str | Iterable[str],
        original: nn.Module | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """`evaluate_language_model` and a verdict on it.

        Args:
            options: further arguments of `evaluate_language_model`.

        Returns:
            Its figures, `perplexity_increase_percent`, the limits, `grade` (of the KL divergence) and `passed`; without
            an original the last two, and every figure that needs one, are "not evaluated".
        """
        return self.judge_model(evaluate_language_model(model, tokenizer, texts, original=original, **options))

    def judge_model(self, evaluation: LanguageModelEvaluation) -> dict[str, Any]:
        """What `validate_model` returns, of an evaluation that was made already."""
        ratio = evaluation.perplexity_ratio
        return {
            **evaluation.to_dict(),
            "perplexity_increase_percent": NOT_EVALUATED if ratio is None else 100 * (ratio - 1),
            "quality_threshold": self.quality_threshold,
            "max_kl_divergence": self.max_kl_divergence,
            "min_top1_agreement": self.min_top1_agreement,
            "grade": self.grade(evaluation),
            "passed": self.passes(evaluation),
        }

    def validate_results(self, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Verdicts on what `LoopCompressor.compress_model` or `compress_calibrated` returned.

        Returns:
            weights: of the relative errors in `layer_results`; layers: of the output errors on the calibration text, if
            there was one; quality: of the evaluation on text. Each with target, measured (the worst), unit and status:
            "pass", "fail" or "not evaluated".
        """
        measured = [layer for layer in results["layer_results"] if layer["relative_error"] is not None]
        weights = [(layer, self.weight_passes(layer)) for layer in measured]
        linears = (results.get("calibration") or {}).get("linears", ())
        measured = [linear for linear in linears if linear["output_error"] is not None]
        layers = [(linear, self.layer_passes(linear)) for linear in measured]
        evaluation = results.get("evaluation")
        return {
            "weights": _check_all(weights, "relative_error", self.max_relative_error, "relative error of a weight"),
            "layers": _check_all(layers, "output_error", self.max_output_error, "relative error of a layer's outputs"),
            "quality": self._check_model(None if evaluation is None else LanguageModelEvaluation.from_dict(evaluation)),
        }

    def weight_passes(self, figures: Mapping[str, Any]) -> bool | str:
        """Whether a weight's `relative_error` is within its limit; "not evaluated" without one."""
        return _within(figures["relative_error"], self.max_relative_error)

    def layer_passes(self, figures: Mapping[str, Any]) -> bool | str:
        """Whether a layer's `output_error` is within its limit; "not evaluated" without a limit or without inputs."""
        return _within(figures["output_error"], self.max_output_error)

    def passes(self, evaluation: LanguageModelEvaluation) -> bool | str:
        """Whether a model meets every limit that is set; "not evaluated" without an original."""
        criteria = self.model_criteria(evaluation)
        return all(criterion.passed for criterion in criteria) if criteria else NOT_EVALUATED

    def model_criteria(self, evaluation: LanguageModelEvaluation) -> list[Criterion]:
        """Increase of perplexity, KL divergence and top-1 agreement against their limits; none without an original."""
        ratio, divergence = evaluation.perplexity_ratio, evaluation.kl_divergence
        agreement = evaluation.top1_agreement
        criteria = []
        if ratio is not None and (limit := self.quality_threshold) is not None:
            increase = 100 * (ratio - 1)
            criteria.append(Criterion(increase, limit, "percent increase of perplexity", increase <= limit))
        if divergence is not None and (limit := self.max_kl_divergence) is not None:
            criteria.append(Criterion(divergence, limit, "nats of KL divergence per token", divergence <= limit))
        if agreement is not None and (limit := self.min_top1_agreement) is not None:
            criteria.append(Criterion(agreement, limit, "of first words agree, at least", agreement >= limit))
        return criteria

    def grade(self, evaluation: LanguageModelEvaluation) -> str:
        """A word for the KL divergence; "not evaluated" without an original."""
        if evaluation.kl_divergence is None:
            return NOT_EVALUATED
        return grade_kl_divergence(evaluation.kl_divergence)

    def _weight_figures(self, original_weight: torch.Tensor, compressed: PackedWeight | torch.Tensor) -> dict[str, Any]:
        if isinstance(compressed, PackedWeight):
            shape = [compressed.out_features, compressed.in_features]
        else:
            shape = list(compressed.shape)
        if list(original_weight.shape) != shape:
            raise ValueError(
                f"compressed: expected the shape of the original weight {list(original_weight.shape)}, got {shape}"
            )
        if isinstance(compressed, PackedWeight):
            errors = measure_weight_errors(original_weight, compressed)
            dense = compressed.dequantize()
        else:
            errors = WeightErrors()
            errors.add(original_weight, compressed)
            dense = compressed.detach()
        return {
            "relative_error": errors.relative_error,
            "sqnr_db": errors.sqnr_db,
            "cosine": _cosine(original_weight.detach(), dense),
            "max_absolute_error": errors.largest_error,
            "mae_over_range_percent": errors.mae_over_range_percent,
            "bits_per_weight": compressed.bits_per_weight if isinstance(compressed, PackedWeight) else NOT_EVALUATED,
        }

    def _check_model(self, evaluation: LanguageModelEvaluation | None) -> dict[str, Any]:
        verdict = NOT_EVALUATED if evaluation is None else self.passes(evaluation)
        criteria = [] if evaluation is None else self.model_criteria(evaluation)
        shown = next((criterion for criterion in criteria if not criterion.passed), criteria[0] if criteria else None)
        return {
            "target": self.quality_threshold if shown is None else shown.limit,
            "measured": NOT_EVALUATED if shown is None else shown.measured,
            "unit": "percent increase of perplexity" if shown is None else shown.unit,
            "status": _status(verdict),
        }


class _OutputErrors:
    """Sums over tokens of a layer's outputs."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squared_error = 0.0
        self.squared_output = 0.0
        self.cosines = 0.0

    def add(self, expected: torch.Tensor, outputs: torch.Tensor) -> None:
        expected = expected.detach().reshape(-1, expected.shape[-1]).float()
        outputs = outputs.detach().reshape(expected.shape).float()
        self.tokens += len(expected)
        self.squared_error += float((expected - outputs).double().square().sum())
        self.squared_output += float(expected.double().square().sum())
        self.cosines += float(nn.functional.cosine_similarity(expected, outputs, dim=-1).sum(dtype=torch.float64))

    def figures(self) -> dict[str, Any]:
        if self.squared_output == 0:
            error = 0.0 if self.squared_error == 0 else math.inf
        else:
            error = math.sqrt(self.squared_error / self.squared_output)
        return {"output_error": error, "output_cosine": self.cosines / self.tokens}


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of the angle between two matrices of one shape; 1 when both are zero, 0 when one is."""
    product = squared_first = squared_second = 0.0
    for one, other in zip(first.split(_ROWS_AT_ONCE), second.split(_ROWS_AT_ONCE), strict=True):
        one, other = one.double(), other.double()
        product += float((one * other).sum())
        squared_first += float(one.square().sum())
        squared_second += float(other.square().sum())
    if squared_first == 0 or squared_second == 0:
        return 1.0 if squared_first == squared_second else 0.0
    return product / math.sqrt(squared_first * squared_second)


def _within(measured: float | str, limit: float | None) -> bool | str:
    if limit is None or isinstance(measured, str):
        return NOT_EVALUATED
    return measured <= limit


def _all_pass(verdicts: Sequence[bool | str]) -> bool | str:
    judged = [verdict for verdict in verdicts if isinstance(verdict, bool)]
    return all(judged) if judged else NOT_EVALUATED


def _check_all(
    judged: Sequence[tuple[Mapping[str, Any], bool | str]], figure: str, limit: float | None, unit: str
) -> dict[str, Any]:
    failed = [figures for figures, verdict in judged if verdict is False]
    shown = failed or [figures for figures, _ in judged]
    return {
        "target": limit,
        "measured": max(figures[figure] for figures in shown) if shown else NOT_EVALUATED,
        "unit": unit,
        "status": _status(_all_pass([verdict for _, verdict in judged])),
    }


def _status(verdict: bool | str) -> str:
    return verdict if isinstance(verdict, str) else "pass" if verdict else "fail"
