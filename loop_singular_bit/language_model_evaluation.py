"""How much a language model differs from its original on text: perplexity, KL divergence and top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .window_bootstrap import Estimate, WindowBootstrap

NOT_EVALUATED = "not evaluated"

# Positions whose log-probabilities are held at once: 128 x 150,000 words in float32 are 77 MB.
_POSITIONS_AT_ONCE = 128

Interval = tuple[float, float]


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
        *_standard_error: of the figure before it, and *_interval: its 95 % confidence interval. Both from 1000
            bootstrap resamples of whole windows (see `WindowBootstrap`), those of the ratio paired token by token; None
            with fewer than two windows.
        per_text: the same figures of each text, when there was more than one.
    """

    tokens: int
    windows: int
    window: int
    beginning_token: bool
    perplexity: float
    perplexity_standard_error: float | None = None
    perplexity_interval: Interval | None = None
    perplexity_original: float | None = None
    perplexity_original_standard_error: float | None = None
    perplexity_original_interval: Interval | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_standard_error: float | None = None
    perplexity_ratio_interval: Interval | None = None
    kl_divergence: float | None = None
    kl_divergence_standard_error: float | None = None
    kl_divergence_interval: Interval | None = None
    kl_divergence_median: float | None = None
    kl_divergence_median_interval: Interval | None = None
    kl_divergence_p99: float | None = None
    kl_divergence_p99_interval: Interval | None = None
    top1_agreement: float | None = None
    top1_agreement_standard_error: float | None = None
    top1_agreement_interval: Interval | None = None
    per_text: tuple[LanguageModelEvaluation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON; the ones that were not measured say "not evaluated"."""
        figures = {name: _plain(value) for name, value in asdict(self).items() if name != "per_text"}
        return {**figures, "per_text": [text.to_dict() for text in self.per_text]}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> LanguageModelEvaluation:
        """The inverse of `to_dict`; keys that are not figures of an evaluation are ignored."""
        known: dict[str, Any] = {}
        for field in fields(cls):
            value = figures.get(field.name)
            if value is None or (isinstance(value, str) and value == NOT_EVALUATED):
                continue
            if field.name == "per_text":
                value = tuple(cls.from_dict(text) for text in value)
            known[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)


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
        max_tokens: predict this many tokens, taken from the beginnings of the texts in equal shares; what a text
            is too short for goes to the others.
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
    texts = [texts] if isinstance(texts, str) else list(texts)
    windows_of_texts = _windows_of_texts(texts, tokenizer, beginning, window, max_tokens)
    windows = [ids for windows_of_text in windows_of_texts for ids in windows_of_text]
    total = _predicted(windows)
    if total == 0:
        raise ValueError("texts: expected at least one token to predict, got none")

    measured = _Measured.of(total, original is not None)
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
                measured.losses[into] = -_chosen(log_probabilities, targets[positions])
                if original_logits is not None:
                    expected = torch.log_softmax(original_logits[positions].float(), dim=-1)
                    divergences = (expected.exp() * (expected - log_probabilities)).double().sum(dim=-1)
                    measured.original_losses[into] = -_chosen(expected, targets[positions])
                    measured.divergences[into] = divergences.cpu()
                    measured.same_top1[into] = (expected.argmax(dim=-1) == log_probabilities.argmax(dim=-1)).cpu()
            done += len(targets)
            if progress is not None:
                progress(done, total)

    def summary(
        measured: _Measured, windows: list[list[int]], per_text: tuple[LanguageModelEvaluation, ...] = ()
    ) -> LanguageModelEvaluation:
        return LanguageModelEvaluation(
            tokens=len(measured.losses),
            windows=len(windows),
            window=window,
            beginning_token=beginning is not None,
            per_text=per_text,
            **measured.figures([len(ids) - 1 for ids in windows]),
        )

    per_text = []
    first = 0
    for windows_of_text in windows_of_texts:
        tokens = _predicted(windows_of_text)
        if tokens and len(windows_of_texts) > 1:
            per_text.append(summary(measured.part(first, first + tokens), windows_of_text))
        first += tokens
    return summary(measured, windows, tuple(per_text))


@dataclass
class _Measured:
    """One value per predicted token; those that need an original are empty without one."""

    losses: torch.Tensor
    original_losses: torch.Tensor
    divergences: torch.Tensor
    same_top1: torch.Tensor

    @classmethod
    def of(cls, tokens: int, has_original: bool) -> _Measured:
        others = tokens if has_original else 0
        return cls(*(torch.empty(count, dtype=torch.float64) for count in (tokens, others, others, others)))

    def part(self, first: int, last: int) -> _Measured:
        return _Measured(*(getattr(self, field.name)[first:last] for field in fields(self)))

    def figures(self, window_lengths: Sequence[int]) -> dict[str, Any]:
        bootstrap = WindowBootstrap(window_lengths)
        figures = _named("perplexity", _exponential(bootstrap.mean(self.losses)))
        if len(self.original_losses) == 0:
            return figures
        kl_median, kl_p99 = bootstrap.quantiles(self.divergences, (0.5, 0.99))
        return {
            **figures,
            **_named("perplexity_original", _exponential(bootstrap.mean(self.original_losses))),
            **_named("perplexity_ratio", _exponential(bootstrap.mean(self.losses - self.original_losses))),
            **_named("kl_divergence", bootstrap.mean(self.divergences)),
            "kl_divergence_median": kl_median.value,
            "kl_divergence_median_interval": kl_median.interval,
            "kl_divergence_p99": kl_p99.value,
            "kl_divergence_p99_interval": kl_p99.interval,
            **_named("top1_agreement", bootstrap.mean(self.same_top1)),
        }


def _named(name: str, estimate: Estimate) -> dict[str, Any]:
    return {
        name: estimate.value,
        f"{name}_standard_error": estimate.standard_error,
        f"{name}_interval": estimate.interval,
    }


def _exponential(estimate: Estimate) -> Estimate:
    """A perplexity from a mean loss, a ratio of perplexities from a mean difference; the error by the delta method."""
    value = _exp(estimate.value)
    if estimate.interval is None or estimate.standard_error is None:
        return Estimate(value)
    low, high = estimate.interval
    return Estimate(value, value * estimate.standard_error, (_exp(low), _exp(high)))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _windows_of_texts(
    texts: Sequence[str], tokenizer: Any, beginning: int | None, window: int, max_tokens: int | None
) -> list[list[list[int]]]:
    """Token windows of each text."""
    prefix = [] if beginning is None else [beginning]
    step = window - len(prefix)
    windows_of_texts = []
    for text in texts:
        # The tokenizer warns about texts longer than the model's positions; they are cut here.
        encoded: Mapping[str, Any] = tokenizer(text, add_special_tokens=False, verbose=False)
        ids = list(encoded["input_ids"])
        windows = [prefix + ids[first : first + step] for first in range(0, len(ids), step)]
        windows_of_texts.append([ids for ids in windows if len(ids) > 1])
    if max_tokens is not None:
        counts = [_predicted(windows) for windows in windows_of_texts]
        windows_of_texts = [
            _beginning_of(windows, share)
            for windows, share in zip(windows_of_texts, _equal_shares(counts, max_tokens), strict=True)
        ]
    return windows_of_texts


def _predicted(windows: Sequence[list[int]]) -> int:
    return sum(len(ids) - 1 for ids in windows)


def _equal_shares(counts: Sequence[int], total: int) -> list[int]:
    """Splits a total equally; what one count is too small for goes to the others."""
    shares = [0] * len(counts)
    smallest_first = sorted(range(len(counts)), key=lambda index: counts[index])
    for position, index in enumerate(smallest_first):
        others = len(counts) - position
        shares[index] = min(counts[index], -(-total // others))
        total -= shares[index]
    return shares


def _beginning_of(windows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """As many windows as predict that many tokens; the last one is cut."""
    kept = []
    for ids in windows:
        if tokens <= 0:
            break
        kept.append(ids[: tokens + 1])
        tokens -= len(kept[-1]) - 1
    return kept


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
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return logits[0, :-1]


def _chosen(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    targets = targets.to(log_probabilities.device)
    return log_probabilities.gather(-1, targets[:, None])[:, 0].double().cpu()


def _plain(value: Any) -> Any:
    if value is None:
        return NOT_EVALUATED
    return list(value) if isinstance(value, tuple) else value
