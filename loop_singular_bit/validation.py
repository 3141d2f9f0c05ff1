"""How much a compressed model differs from its original: language-model metrics on text, weight and output errors.

Only the model-level figures (perplexity ratio, KL divergence, top-1 agreement) say something about quality; an error of
a weight or of a layer's output is a diagnosis, not a verdict, and is named as what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .packed_weight import PackedWeight
from .quantization.weight_errors import WeightErrors, measure_weight_errors

NOT_EVALUATED = "not evaluated"

# Positions whose log-probabilities are held at once: 128 x 150,000 words in float32 are 77 MB.
_POSITIONS_AT_ONCE = 128


@dataclass(frozen=True)
class LanguageModelEvaluation:
    """What `evaluate_language_model` measured; figures that need an original are None when there was none.

    Attributes:
        tokens: predicted tokens.
        windows: windows they lie in.
        window: positions per window.
        beginning_token: whether every window starts with the tokenizer's beginning-of-sequence token.
        perplexity: of the model.
        perplexity_original: of the original.
        perplexity_ratio: perplexity / perplexity_original.
        kl_divergence: mean over tokens of KL(original || model), in nats.
        kl_divergence_median, kl_divergence_p99: median and 99th percentile over tokens.
        top1_agreement: share of tokens at which both models rank the same word first.
        *_standard_error: of the figure before it, tokens taken as independent (they are correlated within a text, so
            that the true uncertainty is somewhat larger); that of the ratio is paired token by token.
    """

    tokens: int
    windows: int
    window: int
    beginning_token: bool
    perplexity: float
    perplexity_standard_error: float
    perplexity_original: float | None = None
    perplexity_original_standard_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_standard_error: float | None = None
    kl_divergence: float | None = None
    kl_divergence_standard_error: float | None = None
    kl_divergence_median: float | None = None
    kl_divergence_p99: float | None = None
    top1_agreement: float | None = None
    top1_agreement_standard_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures by name; the ones that need an original say "not evaluated" when there was none."""
        return {name: NOT_EVALUATED if value is None else value for name, value in asdict(self).items()}


def evaluate_language_model(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    original: torch.nn.Module | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModelEvaluation:
    """Perplexity of a causal language model on texts and, given its original, how far the two disagree.

    Protocol. Each text is tokenized on its own, without special tokens, and cut into windows that do not overlap; no
    token is predicted across a window's border. When the tokenizer has a beginning-of-sequence token, every window is
    that token followed by `window` - 1 tokens of text, all of them predicted; without one, a window is `window` tokens
    of text and the first is context only. A text's last window is as long as what is left. Logits are turned into
    log-probabilities in float32, per-token values are summed in float64. KL, its percentiles and top-1 agreement are
    defined as in llama.cpp's `--kl-divergence`: KL(original || model) at every predicted token.

    Memory: logits of one window per model; nothing of the original is kept beyond a few numbers per token.

    Args:
        model: anything whose call with `input_ids` [1, length] returns an object with `logits` [1, length, vocabulary].
        tokenizer: a Transformers tokenizer, the same for both models.
        texts: one text or several.
        original: the uncompressed model.
        window: positions per window, at least 2; at most what the model was trained on.
        max_tokens: stop after predicting this many tokens.
        progress: called after each window with the tokens predicted so far and the tokens there are.

    Raises:
        ValueError: nothing to predict, a window below 2 or above the model's positions, or two vocabularies.
    """
    if window < 2:
        raise ValueError(f"window: expected at least 2 positions, got {window}")
    for name, evaluated in (("model", model), ("original", original)):
        positions = getattr(getattr(evaluated, "config", None), "max_position_embeddings", None)
        if isinstance(positions, int) and window > positions:
            raise ValueError(f"window: the {name} has {positions} positions, got {window}")
    beginning = getattr(tokenizer, "bos_token_id", None)
    windows = list(_windows([texts] if isinstance(texts, str) else texts, tokenizer, beginning, window, max_tokens))
    total = sum(len(ids) - 1 for ids in windows)
    if total == 0:
        raise ValueError("texts: expected at least one token to predict, got none")

    losses = torch.empty(total, dtype=torch.float64)
    original_losses = torch.empty(total if original is not None else 0, dtype=torch.float64)
    divergences = torch.empty_like(original_losses)
    same_top1 = 0
    done = 0
    with torch.inference_mode(), _evaluating(model), _evaluating(original):
        for ids in windows:
            logits = _logits(model, ids)
            original_logits = None if original is None else _logits(original, ids)
            if original_logits is not None and original_logits.shape != logits.shape:
                raise ValueError(
                    f"original: expected a vocabulary of {logits.shape[-1]} words as the model has, "
                    f"got {original_logits.shape[-1]}"
                )
            targets = torch.tensor(ids[1:])
            for first in range(0, len(targets), _POSITIONS_AT_ONCE):
                positions = slice(first, min(first + _POSITIONS_AT_ONCE, len(targets)))
                into = slice(done + positions.start, done + positions.stop)
                log_probabilities = torch.log_softmax(logits[positions].float(), dim=-1)
                losses[into] = -_chosen(log_probabilities, targets[positions])
                if original_logits is not None:
                    expected = torch.log_softmax(original_logits[positions].float(), dim=-1)
                    original_losses[into] = -_chosen(expected, targets[positions])
                    divergences[into] = (expected.exp() * (expected - log_probabilities)).double().sum(dim=-1).cpu()
                    same_top1 += int((expected.argmax(dim=-1) == log_probabilities.argmax(dim=-1)).sum())
            done += len(targets)
            if progress is not None:
                progress(done, total)

    perplexity, perplexity_error = _perplexity(losses)
    base = LanguageModelEvaluation(
        tokens=total,
        windows=len(windows),
        window=window,
        beginning_token=beginning is not None,
        perplexity=perplexity,
        perplexity_standard_error=perplexity_error,
    )
    if original is None:
        return base
    perplexity_original, original_error = _perplexity(original_losses)
    ratio, ratio_error = _perplexity(losses - original_losses)
    agreement = same_top1 / total
    return LanguageModelEvaluation(
        **{name: value for name, value in asdict(base).items() if value is not None},
        perplexity_original=perplexity_original,
        perplexity_original_standard_error=original_error,
        perplexity_ratio=ratio,
        perplexity_ratio_standard_error=ratio_error,
        kl_divergence=float(divergences.mean()),
        kl_divergence_standard_error=_standard_error(divergences),
        kl_divergence_median=float(divergences.median()),
        kl_divergence_p99=float(divergences.sort().values[min(total - 1, math.ceil(0.99 * total) - 1)]),
        top1_agreement=agreement,
        top1_agreement_standard_error=math.sqrt(agreement * (1 - agreement) / total),
    )


def grade_kl_divergence(kl_divergence: float) -> str:
    """A word for a mean KL divergence in nats per token, by what llama.cpp's formats reach on 7B models.

    Up to 0.006 "transparent" (Q6_K), 0.03 "good" (Q4_K_M), 0.1 "fair" (Q3_K), 0.35 "degraded" (Q2_K), 0.8 "poor",
    above "broken".
    """
    for limit, grade in ((0.006, "transparent"), (0.03, "good"), (0.1, "fair"), (0.35, "degraded"), (0.8, "poor")):
        if kl_divergence <= limit:
            return grade
    return "broken"


class QualityValidator:
    """Measures weights, layers and models against their originals, and judges models. Made to be subclassed.

    Args:
        quality_threshold: the largest increase of perplexity, in percent of the original's, at which a model passes.

    Raises:
        ValueError: a negative threshold.

    Subclasses change what is measured in `validate_layer` and what counts as good in `passes` and `grade`.
    """

    def __init__(self, quality_threshold: float = 1.0) -> None:
        if not quality_threshold >= 0:
            raise ValueError(f"quality_threshold: expected a percentage of at least 0, got {quality_threshold}")
        self.quality_threshold = float(quality_threshold)

    def validate_layer(
        self,
        original_weight: torch.Tensor,
        compressed: PackedWeight | torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Errors of one compressed weight [out_features, in_features], and of the layer's outputs on given inputs.

        Args:
            original_weight: the dense weight.
            compressed: its packed form, or a dense approximation of it.
            inputs: [..., in_features] to judge outputs on; without them the output figures are "not evaluated".

        Returns:
            relative_error: ||original - compressed|| / ||original||, Frobenius.
            sqnr_db: the same as a signal-to-noise ratio in decibels; infinite when exact.
            max_absolute_error: the largest |original - compressed|.
            mae_over_range_percent: the figure older documents call quality error; see `WeightErrors`.
            bits_per_weight: of a packed weight.
            output_error, output_cosine: relative L2 of the outputs, and their mean cosine over tokens; the outputs of a
                packed weight are those its kernels compute.

        Raises:
            ValueError: the shapes differ.
        """
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
        else:
            errors = WeightErrors()
            errors.add(original_weight, compressed)
        results: dict[str, Any] = {
            "relative_error": errors.relative_error,
            "sqnr_db": errors.sqnr_db,
            "max_absolute_error": errors.largest_error,
            "mae_over_range_percent": errors.mae_over_range_percent,
            "bits_per_weight": compressed.bits_per_weight if isinstance(compressed, PackedWeight) else NOT_EVALUATED,
        }
        if inputs is None:
            return {**results, "output_error": NOT_EVALUATED, "output_cosine": NOT_EVALUATED}
        tokens = inputs.detach().float().reshape(-1, inputs.shape[-1])
        expected = torch.nn.functional.linear(tokens, original_weight.detach().float())
        if isinstance(compressed, PackedWeight):
            outputs = compressed.linear(tokens)
        else:
            outputs = torch.nn.functional.linear(tokens, compressed.detach().float())
        results["output_error"] = _relative_norm(expected - outputs, expected)
        cosines = torch.nn.functional.cosine_similarity(expected, outputs, dim=-1)
        results["output_cosine"] = float(cosines.mean(dtype=torch.float64))
        return results

    def validate_model(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        texts: str | Iterable[str],
        original: torch.nn.Module | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """`evaluate_language_model` and a verdict on it.

        Args:
            options: further arguments of `evaluate_language_model`.

        Returns:
            Its figures, `perplexity_increase_percent`, `quality_threshold`, `grade` (of the KL divergence) and
            `passed`; without an original the last two, and every figure that needs one, are "not evaluated".
        """
        evaluation = evaluate_language_model(model, tokenizer, texts, original=original, **options)
        ratio = evaluation.perplexity_ratio
        return {
            **evaluation.to_dict(),
            "perplexity_increase_percent": NOT_EVALUATED if ratio is None else 100 * (ratio - 1),
            "quality_threshold": self.quality_threshold,
            "grade": self.grade(evaluation),
            "passed": self.passes(evaluation),
        }

    def passes(self, evaluation: LanguageModelEvaluation) -> bool | str:
        """Whether the perplexity rose by at most the threshold; "not evaluated" without an original."""
        if evaluation.perplexity_ratio is None:
            return NOT_EVALUATED
        return 100 * (evaluation.perplexity_ratio - 1) <= self.quality_threshold

    def grade(self, evaluation: LanguageModelEvaluation) -> str:
        """A word for the KL divergence; "not evaluated" without an original."""
        if evaluation.kl_divergence is None:
            return NOT_EVALUATED
        return grade_kl_divergence(evaluation.kl_divergence)


def _windows(
    texts: Iterable[str], tokenizer: Any, beginning: int | None, window: int, max_tokens: int | None
) -> Iterator[list[int]]:
    left = math.inf if max_tokens is None else max_tokens
    prefix = [] if beginning is None else [beginning]
    for text in texts:
        # The tokenizer warns about texts longer than the model's positions; they are cut here.
        encoded: Mapping[str, Any] = tokenizer(text, add_special_tokens=False, verbose=False)
        ids = list(encoded["input_ids"])
        step = window - len(prefix)
        for first in range(0, len(ids), step):
            if left <= 0:
                return
            positions = (prefix + ids[first : first + step])[: min(window, int(min(left, window)) + 1)]
            if len(positions) < 2:
                continue
            left -= len(positions) - 1
            yield positions


@contextmanager
def _evaluating(model: torch.nn.Module | None) -> Iterator[None]:
    """Without dropout; afterwards the model trains again if it did."""
    training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        if model is not None:
            model.train(training)


def _logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[predicted tokens, vocabulary]: the last position predicts nothing that is known."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1]


def _chosen(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    targets = targets.to(log_probabilities.device)
    return log_probabilities.gather(-1, targets[:, None])[:, 0].double().cpu()


def _perplexity(losses: torch.Tensor) -> tuple[float, float]:
    """exp(mean) and its standard error, by the delta method; of differences of losses it is a ratio of perplexities."""
    mean = float(losses.mean())
    value = math.exp(mean) if mean < 700 else math.inf
    return value, value * _standard_error(losses)


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _relative_norm(difference: torch.Tensor, reference: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(reference, dtype=torch.float64))
    error = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    return error / norm if norm > 0 else 0.0 if error == 0 else math.inf
