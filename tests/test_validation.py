"""Quality metrics: the protocol against plain computations, the figures on known distributions, verdicts and grades."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loop_singular_bit.quantization.quantize_weight import quantize_weight
from loop_singular_bit.validation import (
    NOT_EVALUATED,
    LanguageModelEvaluation,
    QualityValidator,
    evaluate_language_model,
    grade_kl_divergence,
)

VOCABULARY = 11


class Letters:
    """A tokenizer that gives each of the letters a to j its place in the alphabet, and keeps 10 as beginning token."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


class Bigrams(nn.Module):
    """Logits that depend on the current token only; notes every window it is shown."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator) * scale)
        self.seen: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.seen += input_ids.tolist()
        return SimpleNamespace(logits=self.table[input_ids])


TEXTS = ["abcdefghijabcdefghij", "jihgfedc", "a"]


def test_windows_with_a_beginning_token() -> None:
    model = Bigrams(0)
    evaluation = evaluate_language_model(model, Letters(10), TEXTS, window=8)
    assert model.seen == [
        [10, 0, 1, 2, 3, 4, 5, 6],
        [10, 7, 8, 9, 0, 1, 2, 3],
        [10, 4, 5, 6, 7, 8, 9],
        [10, 9, 8, 7, 6, 5, 4, 3],
        [10, 2],
        [10, 0],
    ]
    assert evaluation.tokens == 29
    assert evaluation.windows == 6
    assert evaluation.beginning_token


def test_windows_without_a_beginning_token() -> None:
    model = Bigrams(0)
    evaluation = evaluate_language_model(model, Letters(None), TEXTS, window=8)
    assert model.seen == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9],
        [9, 8, 7, 6, 5, 4, 3, 2],
    ]
    assert evaluation.tokens == 24
    assert not evaluation.beginning_token


def test_max_tokens_and_progress() -> None:
    calls: list[tuple[int, int]] = []
    model = Bigrams(0)
    evaluation = evaluate_language_model(
        model, Letters(10), TEXTS, window=8, max_tokens=9, progress=lambda *call: calls.append(call)
    )
    assert model.seen == [[10, 0, 1, 2, 3, 4, 5, 6], [10, 7, 8]]
    assert evaluation.tokens == 9
    assert calls == [(7, 9), (9, 9)]


def test_figures_against_a_plain_computation() -> None:
    model, original = Bigrams(1), Bigrams(2)
    evaluation = evaluate_language_model(model, Letters(10), TEXTS, original=original, window=8)
    losses, original_losses, divergences, same = [], [], [], []
    for window in model.seen:
        for current, target in pairwise(window):
            q = torch.log_softmax(model.table.double()[current], dim=0)
            p = torch.log_softmax(original.table.double()[current], dim=0)
            losses.append(-q[target].item())
            original_losses.append(-p[target].item())
            divergences.append((p.exp() * (p - q)).sum().item())
            same.append(bool(q.argmax() == p.argmax()))
    tokens = len(losses)
    delta = torch.tensor(losses) - torch.tensor(original_losses)
    expected = {
        "tokens": tokens,
        "perplexity": math.exp(sum(losses) / tokens),
        "perplexity_original": math.exp(sum(original_losses) / tokens),
        "perplexity_ratio": math.exp((sum(losses) - sum(original_losses)) / tokens),
        "kl_divergence": sum(divergences) / tokens,
        "kl_divergence_median": sorted(divergences)[tokens // 2],
        "kl_divergence_p99": max(divergences),
        "top1_agreement": sum(same) / tokens,
        "perplexity_ratio_standard_error": math.exp(float(delta.mean())) * float(delta.std()) / math.sqrt(tokens),
        "kl_divergence_standard_error": float(torch.tensor(divergences).std()) / math.sqrt(tokens),
    }
    results = evaluation.to_dict()
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-5), name


def test_a_model_against_itself() -> None:
    model = Bigrams(1)
    evaluation = evaluate_language_model(model, Letters(10), TEXTS, original=model, window=8)
    assert evaluation.perplexity_ratio == 1
    assert evaluation.perplexity_ratio_standard_error == 0
    assert evaluation.kl_divergence == 0
    assert evaluation.top1_agreement == 1


def test_dropout_is_off_and_the_mode_is_restored() -> None:
    class Dropping(Bigrams):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=nn.functional.dropout(self.table[input_ids], 0.5, self.training))

    model = Dropping(1).train()
    evaluation = evaluate_language_model(model, Letters(10), TEXTS, original=Bigrams(1).eval())
    assert evaluation.perplexity_ratio == 1
    assert model.training


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    evaluation = evaluate_language_model(Bigrams(0, scale=0.0), Letters(10), TEXTS)
    assert evaluation.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert evaluation.perplexity_standard_error == pytest.approx(0, abs=1e-5)


def test_long_windows_are_summed_in_pieces() -> None:
    text = "abcdefghij" * 50
    whole = evaluate_language_model(Bigrams(1), Letters(None), text, original=Bigrams(2), window=500)
    pieces = evaluate_language_model(Bigrams(1), Letters(10), text, original=Bigrams(2), window=6)
    assert whole.tokens == 499 and pieces.tokens == 500
    assert whole.kl_divergence == pytest.approx(pieces.kl_divergence, rel=0.5)


def test_without_an_original_only_perplexity_is_evaluated() -> None:
    results = evaluate_language_model(Bigrams(0), Letters(10), TEXTS).to_dict()
    assert isinstance(results["perplexity"], float)
    for name in ("perplexity_original", "perplexity_ratio", "kl_divergence", "top1_agreement"):
        assert results[name] == NOT_EVALUATED
    verdict = QualityValidator().validate_model(Bigrams(0), Letters(10), TEXTS)
    assert verdict["passed"] == verdict["grade"] == verdict["perplexity_increase_percent"] == NOT_EVALUATED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ""}, "at least one token"),
        ({"texts": []}, "at least one token"),
        ({"window": 1}, "at least 2"),
        ({"max_tokens": 0}, "at least one token"),
    ],
)
def test_nothing_to_evaluate(options: dict[str, object], message: str) -> None:
    arguments: dict = {"texts": TEXTS, **options}
    with pytest.raises(ValueError, match=message):
        evaluate_language_model(Bigrams(0), Letters(10), **arguments)


def test_windows_beyond_the_positions_and_other_vocabularies_are_refused() -> None:
    model = Bigrams(0)
    model.config = SimpleNamespace(max_position_embeddings=16)
    with pytest.raises(ValueError, match="16 positions"):
        evaluate_language_model(model, Letters(10), TEXTS, window=17)
    other = Bigrams(0)
    other.table = nn.Parameter(torch.zeros(VOCABULARY, 7))
    with pytest.raises(ValueError, match="vocabulary of 11"):
        evaluate_language_model(Bigrams(0), Letters(10), TEXTS, original=other)


def test_grades() -> None:
    grades = [grade_kl_divergence(value) for value in (0.0, 0.006, 0.02, 0.05, 0.2, 0.5, 0.81)]
    assert grades == ["transparent", "transparent", "good", "fair", "degraded", "poor", "broken"]


def test_verdict_of_a_model_and_a_subclass_of_the_validator() -> None:
    model, original = Bigrams(2), Bigrams(1)
    evaluation = evaluate_language_model(model, Letters(10), TEXTS, original=original)
    increase = 100 * (evaluation.perplexity_ratio - 1)
    assert increase > 1
    strict = QualityValidator(quality_threshold=increase * 0.99)
    lenient = QualityValidator(quality_threshold=increase * 1.01)
    assert strict.validate_model(model, Letters(10), TEXTS, original)["passed"] is False
    results = lenient.validate_model(model, Letters(10), TEXTS, original, window=8)
    assert results["perplexity_increase_percent"] > 0
    assert results["grade"] == grade_kl_divergence(results["kl_divergence"])
    assert lenient.validate_model(model, Letters(10), TEXTS, original)["passed"] is True

    class Agreement(QualityValidator):
        def passes(self, evaluation: LanguageModelEvaluation) -> bool | str:
            return evaluation.top1_agreement == 1

    assert Agreement(1e9).validate_model(model, Letters(10), TEXTS, original)["passed"] is False
    assert Agreement(0).validate_model(model, Letters(10), TEXTS, model)["passed"] is True
    with pytest.raises(ValueError, match="quality_threshold"):
        QualityValidator(-1.0)


def test_layer_figures_of_a_packed_and_of_a_dense_approximation() -> None:
    weight = torch.randn(96, 128)
    inputs = torch.randn(3, 50, 128)
    packed = quantize_weight(weight, "b3")
    validator = QualityValidator()
    results = validator.validate_layer(weight, packed, inputs)
    error = packed.dequantize() - weight
    relative = float(error.norm() / weight.norm())
    assert results["relative_error"] == pytest.approx(relative, rel=1e-4)
    assert results["sqnr_db"] == pytest.approx(-20 * math.log10(relative), rel=1e-4)
    assert results["max_absolute_error"] == pytest.approx(float(error.abs().max()), rel=1e-5)
    spread = float(weight.max() - weight.min())
    assert results["mae_over_range_percent"] == pytest.approx(100 * float(error.abs().mean()) / spread, rel=1e-4)
    assert results["bits_per_weight"] == packed.bits_per_weight
    # White inputs: the error of the outputs is the error of the weight, and cos = sqrt(1 - e^2) nearly.
    assert results["output_error"] == pytest.approx(relative, rel=0.1)
    assert results["output_cosine"] == pytest.approx(math.sqrt(1 - relative**2), rel=0.02)

    dense = validator.validate_layer(weight, packed.dequantize(), inputs)
    assert dense["relative_error"] == pytest.approx(results["relative_error"], rel=1e-5)
    assert dense["output_error"] == pytest.approx(results["output_error"], rel=0.05)
    assert dense["bits_per_weight"] == NOT_EVALUATED


def test_layer_without_inputs_and_an_exact_layer() -> None:
    weight = torch.randn(32, 32)
    results = QualityValidator().validate_layer(weight, weight)
    assert results["relative_error"] == 0 and results["sqnr_db"] == math.inf
    assert results["output_error"] == results["output_cosine"] == NOT_EVALUATED
    for other in (torch.zeros(32, 31), quantize_weight(torch.randn(64, 32), "b4")):
        with pytest.raises(ValueError, match="shape of the original weight"):
            QualityValidator().validate_layer(weight, other)
