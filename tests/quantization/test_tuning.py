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
from loop_singular_bit.quantization.tuning import TuningOptions, TuningProgress, _TunableLinear, tune

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
    options = TuningOptions(signs=signs, steps=25, learning_rate=4e-3, sign_learning_rate=4e-3)
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
        linear = model.get_submodule(name)
        for signs in (False, True):
            tunable = _TunableLinear(weight, linear, signs)
            inputs = torch.randn(3, weight.in_features)
            expected = torch.nn.functional.linear(inputs, weight.dequantize(), linear.bias)
            assert torch.allclose(tunable(inputs), expected, rtol=1e-4, atol=1e-5)
            again = tunable.packed().dequantize()
            assert torch.allclose(again, weight.dequantize(), rtol=2e-3, atol=2e-3 * float(again.abs().max()))


def test_gradients_are_those_of_the_weight(model: torch.nn.Module, packed: dict[str, PackedWeight]) -> None:
    name, weight = next(iter(packed.items()))
    tunable = _TunableLinear(weight, model.get_submodule(name), False)
    inputs = torch.randn(5, weight.in_features, requires_grad=True)
    target = torch.randn(5, weight.out_features)
    parameters = tunable.scale_parameters()
    ((tunable(inputs) - target) ** 2).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator)
        values = []
        for step in (1e-2, -1e-2):
            parameter.data.add_(step * direction)
            values.append(((tunable(inputs) - target) ** 2).sum().item())
            parameter.data.sub_(step * direction)
        slope = float((parameter.grad * direction).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=1e-2)
    assert torch.allclose(
        inputs.grad, 2 * (tunable(inputs) - target).detach() @ weight.dequantize(), rtol=1e-3, atol=1e-4
    )


def test_resumes_to_the_same_bytes(model: torch.nn.Module, packed: dict[str, PackedWeight], tmp_path: Path) -> None:
    options = TuningOptions(steps=6, checkpoint_steps=2, learning_rate=1e-2)
    whole = tune(model, packed, WINDOWS, options)

    class Killed(Exception):
        pass

    def kill(progress: TuningProgress) -> None:
        if progress.step == 5:
            raise Killed

    checkpoint = tmp_path / "tuning.pt"
    with pytest.raises(Killed):
        tune(model, packed, WINDOWS, options, checkpoint=checkpoint, progress=kill)
    seen: list[int] = []
    resumed = tune(model, packed, WINDOWS, options, checkpoint=checkpoint, progress=lambda step: seen.append(step.step))
    assert seen == [5, 6]
    assert not checkpoint.exists()
    for name, weight in whole.packed_weights.items():
        for part, tensor in weight.tensors().items():
            assert torch.equal(tensor, resumed.packed_weights[name].tensors()[part])


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
    assert math.isfinite(TuningOptions().learning_rate)
