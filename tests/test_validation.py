"""Quality metrics: the protocol against plain computations, the figures on known distributions, verdicts and grades."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

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
from loop_singular_bit.window_bootstrap import WindowBootstrap

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
    # Three tokens of each text; the last one has one only, and leaves two to the others.
    assert model.seen == [[10, 0, 1, 2, 3], [10, 9, 8, 7, 6], [10, 0]]
    assert evaluation.tokens == 9
    assert [text.tokens for text in evaluation.per_text] == [4, 4, 1]
    assert calls == [(4, 9), (8, 9), (9, 9)]


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
    expected = {
        "tokens": tokens,
        "perplexity": math.exp(sum(losses) / tokens),
        "perplexity_original": math.exp(sum(original_losses) / tokens),
        "perplexity_ratio": math.exp((sum(losses) - sum(original_losses)) / tokens),
        "kl_divergence": sum(divergences) / tokens,
        "kl_divergence_median": sorted(divergences)[tokens // 2],
        "kl_divergence_p99": max(divergences),
        "top1_agreement": sum(same) / tokens,
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


def correlated_windows(windows: int, length: int, seed: int) -> torch.Tensor:
    """Values whose windows differ more than the values within one."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(windows, 1, generator=generator, dtype=torch.float64)
    return (levels + 0.1 * torch.randn(windows, length, generator=generator, dtype=torch.float64)).flatten()


def test_errors_are_those_of_independent_windows() -> None:
    windows, length = 200, 20
    values = correlated_windows(windows, length, 0)
    estimate = WindowBootstrap([length] * windows).mean(values)
    means = values.view(windows, length).mean(dim=1)
    expected = float(means.std()) / math.sqrt(windows)
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.standard_error == pytest.approx(expected, rel=0.1)
    assert estimate.standard_error > 3 * float(values.std()) / math.sqrt(len(values))
    low, high = estimate.interval
    assert low == pytest.approx(estimate.value - 1.96 * expected, abs=0.2 * expected)
    assert high == pytest.approx(estimate.value + 1.96 * expected, abs=0.2 * expected)
    assert WindowBootstrap([length] * windows).mean(values) == estimate


def test_ninety_five_percent_of_the_intervals_hold_the_truth() -> None:
    hits = 0
    for seed in range(200):
        low, high = WindowBootstrap([5] * 40).mean(correlated_windows(40, 5, seed)).interval
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.98


def test_quantiles_and_windows_of_different_lengths() -> None:
    values = torch.arange(100, dtype=torch.float64)
    median, p99 = WindowBootstrap([10] * 10).quantiles(values, (0.5, 0.99))
    assert median.value == values.median() == 49 and p99.value == 98
    assert 10 <= median.interval[0] < 49 < median.interval[1] <= 89
    assert p99.interval[1] == 99
    # A window of one value weighs as much as one value, not as much as a window.
    uneven = WindowBootstrap([99, 1]).mean(torch.tensor([0.0] * 99 + [100.0], dtype=torch.float64))
    assert uneven.value == 1 and uneven.interval == (0, 100)
    single = WindowBootstrap([100])
    assert single.mean(values).interval is None and single.quantiles(values, (0.5,))[0].interval is None


def test_each_text_is_also_reported_alone() -> None:
    texts = TEXTS[:2]
    both = evaluate_language_model(Bigrams(1), Letters(10), texts, original=Bigrams(2), window=8)
    alone = [evaluate_language_model(Bigrams(1), Letters(10), text, original=Bigrams(2), window=8) for text in texts]
    assert list(both.per_text) == alone
    assert alone[0].per_text == ()
    weighted = sum(text.kl_divergence * text.tokens for text in alone) / both.tokens
    assert both.kl_divergence == pytest.approx(weighted)
    figures = both.to_dict()
    assert LanguageModelEvaluation.from_dict(json.loads(json.dumps(figures))) == both
    assert figures["kl_divergence_interval"][0] <= both.kl_divergence <= figures["kl_divergence_interval"][1]
    assert [text["tokens"] for text in figures["per_text"]] == [text.tokens for text in alone]
    without = evaluate_language_model(Bigrams(1), Letters(10), "ab")
    assert without.perplexity_interval is None
    assert LanguageModelEvaluation.from_dict(without.to_dict()) == without


def test_limits_at_every_level() -> None:
    weight = torch.randn(64, 96)
    good, bad = quantize_weight(weight, "b4"), quantize_weight(weight, "b1")
    errors = [QualityValidator().validate_weight(weight, packed)["relative_error"] for packed in (good, bad)]
    limit = sum(errors) / 2
    assert QualityValidator().validate_weight(weight, bad)["passed"] == NOT_EVALUATED
    strict = QualityValidator(max_relative_error=limit)
    assert [strict.validate_weight(weight, packed)["passed"] for packed in (good, bad)] == [True, False]
    inputs = torch.randn(40, 96)
    for packed, expected in ((good, True), (bad, False)):
        cosine = float(nn.functional.cosine_similarity(packed.dequantize().flatten(), weight.flatten(), dim=0))
        assert strict.validate_weight(weight, packed)["cosine"] == pytest.approx(cosine, rel=1e-5)
        by_outputs = QualityValidator(max_output_error=limit)
        assert by_outputs.validate_layer(weight, packed)["passed"] == NOT_EVALUATED
        assert by_outputs.validate_layer(weight, packed, inputs)["passed"] is expected
        assert strict.validate_layer(weight, packed, inputs)["passed"] is expected
    model, original = Bigrams(2), Bigrams(1)
    evaluation = evaluate_language_model(model, Letters(10), TEXTS, original=original)
    for limits, expected in (
        ({"max_kl_divergence": evaluation.kl_divergence * 1.01}, True),
        ({"max_kl_divergence": evaluation.kl_divergence * 0.99}, False),
        ({"min_top1_agreement": evaluation.top1_agreement}, True),
        ({"min_top1_agreement": evaluation.top1_agreement + 0.01}, False),
    ):
        assert QualityValidator(1e9, **limits).passes(evaluation) is expected
    for limits in ({"max_kl_divergence": -1}, {"min_top1_agreement": 1.1}, {"max_output_error": math.nan}):
        with pytest.raises(ValueError, match=next(iter(limits))):
            QualityValidator(**limits)


def test_outputs_of_every_layer_of_a_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 64)
            self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(self.table(input_ids)).relu())

    original = Two()
    model = copy.deepcopy(original)
    model.down.weight.data = quantize_weight(original.down.weight, "b1").dequantize()
    windows = torch.randint(0, VOCABULARY, (3, 20))
    figures = QualityValidator(max_output_error=0.01).validate_layers(model, original, windows)
    assert figures["up"] == {"output_error": 0, "output_cosine": pytest.approx(1), "passed": True}
    hidden = original.up(original.table(windows)).relu()
    expected, outputs = original.down(hidden), model.down(hidden)
    error = float((outputs - expected).detach().norm() / expected.detach().norm())
    assert figures["down"]["output_error"] == pytest.approx(error, rel=1e-4)
    assert figures["down"]["passed"] is False
    del model.up
    with pytest.raises(ValueError, match="up is missing"):
        QualityValidator().validate_layers(model, original, windows)


def results(relative_error: float, output_error: float | None, evaluation: LanguageModelEvaluation | None) -> dict:
    """What `validate_results` reads of a compression's results."""
    linears = [{"output_error": output_error}, {"output_error": 0.0}]
    return {
        "layer_results": [{"relative_error": 0.1}, {"relative_error": None}, {"relative_error": relative_error}],
        "calibration": {"linears": linears},
        "evaluation": None if evaluation is None else evaluation.to_dict(),
    }


def test_verdicts_on_a_compression() -> None:
    evaluation = LanguageModelEvaluation(9, 1, 9, True, 50.0, perplexity_ratio=1.02, kl_divergence=0.3)

    def statuses(validator: QualityValidator, *arguments: Any) -> list[str]:
        checks = validator.validate_results(results(*arguments))
        return [checks[name]["status"] for name in ("weights", "layers", "quality")]

    assert statuses(QualityValidator(3.0), 0.2, 0.3, evaluation) == [NOT_EVALUATED, NOT_EVALUATED, "pass"]
    assert statuses(QualityValidator(1.0), 0.2, None, evaluation) == [NOT_EVALUATED, NOT_EVALUATED, "fail"]
    limits = QualityValidator(3.0, max_relative_error=0.2, max_output_error=0.3, max_kl_divergence=0.1)
    assert statuses(limits, 0.2, 0.3, None) == ["pass", "pass", NOT_EVALUATED]
    assert statuses(limits, 0.21, 0.31, evaluation) == ["fail", "fail", "fail"]
    quality = limits.validate_results(results(0.2, 0.3, evaluation))["quality"]
    assert (quality["measured"], quality["target"]) == (0.3, 0.1) and "KL" in quality["unit"]
    plain = results(0.2, None, None)
    del plain["calibration"]
    assert limits.validate_results(plain)["layers"]["measured"] == NOT_EVALUATED
