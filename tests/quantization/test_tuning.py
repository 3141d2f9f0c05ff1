"""Tuning: right gradients, a lower divergence on held-out windows, valid packed weights, resumable."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.calibration import collect_statistics
from loop_singular_bit.quantization.quantize_calibrated import quantize_weight_calibrated
from loop_singular_bit.quantization.sampled_windows import sample_windows
from loop_singular_bit.quantization.tunable_linear import TunableLinear
from loop_singular_bit.quantization.tuning import TuningOptions, TuningProgress, training_bytes, tune
from loop_singular_bit.quantization.tuning_steps import single_threaded_workers

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import VOCABULARY, tiny_language_model

MANY_WINDOWS = torch.randint(VOCABULARY, (96, 24), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = tiny_language_model("llama", tied=False)
    # Random logits of size 0.1 have nothing to say.
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module", params=[1, 2])
def packed(request: pytest.FixtureRequest, model: torch.nn.Module) -> dict[str, PackedWeight]:
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    store = collect_statistics(model, WINDOWS, names)
    return {
        name: quantize_weight_calibrated(
            model.get_submodule(name).weight, store[name].hessian, planes=request.param, rounds=2
        ).packed_weight
        for name in names
    }


@pytest.mark.parametrize("signs", [False, True])
def test_lowers_the_divergence_on_windows_it_has_not_seen(
    model: torch.nn.Module, packed: dict[str, PackedWeight], signs: bool
) -> None:
    seen: list[TuningProgress] = []
    options = TuningOptions(signs=signs, steps=25, learning_rate=4e-3, sign_learning_rate=2e-2)
    result = tune(model, packed, MANY_WINDOWS, options, progress=seen.append)
    assert result.kept
    assert result.kl_after < 0.99 * result.kl_before
    assert [step.step for step in seen] == list(range(1, 26))
    assert (result.changed_signs > 0) == signs
    for name, weight in result.packed_weights.items():
        weight.validate()
        assert weight.layout == packed[name].layout
        if weight.planes > 1:
            scales = weight.scales.float().transpose(1, 2).reshape(-1, weight.planes)[: weight.out_features]
            multiples = 126 * scales / scales.sum(1, keepdim=True)
            assert (multiples - multiples.round()).abs().max() < 0.06
        if not signs:
            assert torch.equal(weight.signs, packed[name].signs)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_starts_from_the_packed_weight_and_gives_it_back(
    model: torch.nn.Module, packed: dict[str, PackedWeight]
) -> None:
    for name, weight in packed.items():
        for signs in (False, True):
            tunable = TunableLinear(weight, model.get_submodule(name), signs)
            tunable.make_dense()
            assert torch.allclose(tunable.dense, weight.dequantize(), rtol=1e-4, atol=1e-5)
            again = tunable.packed().dequantize()
            assert torch.allclose(again, weight.dequantize(), rtol=2e-3, atol=2e-3 * float(again.abs().max()))
            assert torch.equal(tunable.packed().signs, weight.signs)


def test_gradients_are_those_of_the_weight(model: torch.nn.Module, packed: dict[str, PackedWeight]) -> None:
    name, weight = next(iter(packed.items()))
    tunable = TunableLinear(weight, model.get_submodule(name), False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, weight.in_features, generator=generator)
    target = torch.randn(5, weight.out_features, generator=generator)

    def loss() -> torch.Tensor:
        tunable.make_dense()
        return ((tunable(inputs) - target) ** 2).sum()

    tunable.take_gradient(torch.autograd.grad(loss(), tunable.dense)[0])
    for parameter in tunable.scale_parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator)
        values = []
        for step in (1e-2, -1e-2):
            parameter.data.add_(step * direction)
            values.append(loss().item())
            parameter.data.sub_(step * direction)
        slope = float((parameter.grad * direction).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=1e-2)


def same_bytes(one: dict[str, PackedWeight], other: dict[str, PackedWeight]) -> bool:
    return all(
        torch.equal(tensor, other[name].tensors()[part])
        for name, weight in one.items()
        for part, tensor in weight.tensors().items()
    )


@pytest.mark.parametrize("packed", [2], indirect=True)
def test_threads_change_nothing(model: torch.nn.Module, packed: dict[str, PackedWeight]) -> None:
    options = TuningOptions(signs=True, steps=3, batch=3, sampled_windows=70)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(tune(model, packed, WINDOWS, options))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0].kl_before == results[1].kl_before
    assert results[0].kl_after == results[1].kl_after
    assert same_bytes(results[0].packed_weights, results[1].packed_weights)


def test_sampled_text_follows_the_model(model: torch.nn.Module) -> None:
    """Tokens at second place, after the same first one, come as often as the model says."""
    with single_threaded_workers() as workers:
        sampled = sample_windows(model, 1000, 2, torch.tensor([3]), workers)
    assert sampled.shape == (1000, 2)
    assert (sampled[:, 0] == 3).all()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3]])).logits[0, -1].softmax(-1)
    found = torch.bincount(sampled[:, 1], minlength=len(expected)) / 1000
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / 1000)
    assert float((found - expected).abs().sum()) < float((found - 1 / len(expected)).abs().sum())


@pytest.mark.parametrize("packed", [2], indirect=True)
@pytest.mark.parametrize("signs", [False, True])
def test_blocks_lower_the_divergence_and_resume_to_the_same_bytes(
    model: torch.nn.Module, packed: dict[str, PackedWeight], tmp_path: Path, signs: bool
) -> None:
    """No memory for the whole model, or none but for scales: layer by layer."""
    scales = training_bytes(packed.values(), False)
    options = TuningOptions(
        signs=signs,
        steps=8,
        learning_rate=1e-2,
        checkpoint_steps=4,
        held_out_share=4,
        memory_gb=1e-9 * scales if signs else 0.0,
    )
    seen: list[TuningProgress] = []
    whole = tune(model, packed, WINDOWS, options, progress=seen.append)
    assert whole.kept
    assert whole.kl_after < whole.kl_before
    assert [step.step for step in seen] == list(range(1, 25 if signs else 17))
    assert seen[-1].description.startswith("KL" if signs else "layer 2 of 2")

    class Killed(Exception):
        pass

    checkpoint = tmp_path / "tuning.pt"
    steps: list[int] = []

    def tune_until(killed: int) -> dict[str, PackedWeight]:
        steps.clear()

        def kill(progress: TuningProgress) -> None:
            steps.append(progress.step)
            if progress.step == killed:
                raise Killed

        return tune(model, packed, WINDOWS, options, checkpoint=checkpoint, progress=kill).packed_weights

    # In the second layer, and for signs then among the steps for scales.
    with pytest.raises(Killed):
        tune_until(14)
    assert checkpoint.with_name("tuning.pt.blocks").is_file()
    if signs:
        with pytest.raises(Killed):
            tune_until(22)
        assert steps[0] == 13
    resumed = tune_until(-1)
    assert steps[0] == (21 if signs else 13)
    assert same_bytes(whole.packed_weights, resumed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [1], indirect=True)
def test_layers_first_then_all_signs(model: torch.nn.Module, packed: dict[str, PackedWeight]) -> None:
    options = TuningOptions(signs=True, steps=4, layer_steps=8, learning_rate=1e-2, held_out_share=4)
    seen: list[TuningProgress] = []
    both = tune(model, packed, WINDOWS, options, progress=seen.append)
    assert [step.description[:2] for step in seen] == ["la"] * 16 + ["KL"] * 4
    assert both.kept
    assert both.kl_after < both.kl_before
    with pytest.raises(ValueError, match="layer_steps"):
        TuningOptions(layer_steps=-1)


@pytest.mark.parametrize("packed", [2], indirect=True)
@pytest.mark.parametrize("signs", [False, True])
def test_resumes_to_the_same_bytes(
    model: torch.nn.Module, packed: dict[str, PackedWeight], tmp_path: Path, signs: bool
) -> None:
    options = TuningOptions(signs=signs, steps=6, checkpoint_steps=2, learning_rate=1e-2, sampled_windows=4)
    whole = tune(model, packed, WINDOWS, options)

    class Killed(Exception):
        pass

    def kill(progress: TuningProgress) -> None:
        if progress.step == 5:
            raise Killed

    checkpoint, sampled = tmp_path / "tuning.pt", tmp_path / "sampled.pt"
    with pytest.raises(Killed):
        tune(model, packed, WINDOWS, options, checkpoint=checkpoint, sampled=sampled, progress=kill)
    seen: list[int] = []
    resumed = tune(
        model,
        packed,
        WINDOWS,
        options,
        checkpoint=checkpoint,
        sampled=sampled,
        progress=lambda step: seen.append(step.step),
    )
    assert seen == [5, 6]
    assert list(tmp_path.iterdir()) == [sampled]
    assert same_bytes(whole.packed_weights, resumed.packed_weights)
    # A checkpoint of other work is not continued.
    with pytest.raises(Killed):
        tune(model, packed, WINDOWS, options, checkpoint=checkpoint, progress=kill)
    other = tune(model, packed, WINDOWS.flip(0), options, checkpoint=checkpoint)
    assert same_bytes(other.packed_weights, tune(model, packed, WINDOWS.flip(0), options).packed_weights)


def test_what_does_not_help_is_not_kept(model: torch.nn.Module, packed: dict[str, PackedWeight]) -> None:
    result = tune(model, packed, WINDOWS, TuningOptions(steps=2, learning_rate=5.0))
    assert not result.kept
    assert result.kl_after >= result.kl_before
    for name, weight in result.packed_weights.items():
        assert weight is packed[name]


def test_rejects_what_it_cannot_tune(model: torch.nn.Module, packed: dict[str, PackedWeight]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        tune(model, packed, WINDOWS[:1])
    with pytest.raises(ValueError, match=r"expected an nn\.Linear"):
        tune(model, {"model.embed_tokens": next(iter(packed.values()))}, WINDOWS)
    with pytest.raises(ValueError, match="steps"):
        TuningOptions(steps=0)
    with pytest.raises(ValueError, match="held_out_share"):
        TuningOptions(held_out_share=1)
    with pytest.raises(ValueError, match="sampled_windows"):
        TuningOptions(sampled_windows=-1)
