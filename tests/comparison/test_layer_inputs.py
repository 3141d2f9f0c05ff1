"""Layer-by-layer runs against the pass over the whole model, and the methods that need them on a tiny model."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import random_tokens, tiny_language_model
from torch import nn

from loop_singular_bit.comparison.eight_bit import Int8Linear, apply_llm_int8, apply_smoothquant
from loop_singular_bit.comparison.gptq import apply_gptq
from loop_singular_bit.comparison.layer_inputs import LayerwiseRun
from loop_singular_bit.comparison.linears import linears_of
from loop_singular_bit.comparison.round_to_nearest import round_to_nearest
from loop_singular_bit.quantization.calibration import collect_statistics


@pytest.fixture
def model() -> nn.Module:
    return tiny_language_model("llama", tied=False)


@pytest.fixture
def windows() -> torch.Tensor:
    return random_tokens(batch=5, length=24)


def test_second_moments_are_those_of_the_whole_model(model: nn.Module, windows: torch.Tensor) -> None:
    linears = linears_of(model)
    assert len(linears) == 14 and "lm_head" not in linears
    expected = collect_statistics(model, windows, linears)
    with torch.no_grad():
        run = LayerwiseRun(model, windows, linears)
        assert [len(run.groups_in(layer)) for layer in run.layers] == [4, 4]
        assert [name.rpartition(".")[2] for name in run.groups_in(run.layers[0])[0]] == ["q_proj", "k_proj", "v_proj"]
        for layer in run.layers:
            for names in run.groups_in(layer):
                moment = run.second_moment(layer, names[0]).float()
                torch.testing.assert_close(moment, expected[names[0]].hessian, rtol=1e-4, atol=1e-5)
            run.advance(layer)


def test_later_layers_see_what_was_done_to_earlier_ones(model: nn.Module, windows: torch.Tensor) -> None:
    with torch.no_grad():
        run = LayerwiseRun(model, windows, linears_of(model))
        first = run.layers[0]
        down = run.groups_in(first)[-1][0]
        before = run.second_moment(first, down)
        first.module.mlp.up_proj.weight.zero_()
        assert before.any() and not run.second_moment(first, down).any()


def test_models_without_a_sequence_of_layers_are_refused(windows: torch.Tensor) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(64, 64)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.only(torch.zeros(64))

    with pytest.raises(ValueError, match="list of layers"):
        LayerwiseRun(Flat(), windows, ["only"])
    outside = tiny_language_model("llama", tied=False)
    with pytest.raises(ValueError, match="lm_head is not"):
        LayerwiseRun(outside, windows, ["lm_head", *linears_of(outside)])


def test_gptq_beats_rounding_on_the_outputs_of_a_model(model: nn.Module, windows: torch.Tensor) -> None:
    compensated, rounded = copy.deepcopy(model), copy.deepcopy(model)
    apply_gptq(compensated, windows, 3, 32)
    with torch.no_grad():
        for linear in linears_of(rounded).values():
            linear.weight.copy_(round_to_nearest(linear.weight, 3, 32))
        expected = model(windows).logits
        errors = [float((changed(windows).logits - expected).norm()) for changed in (compensated, rounded)]
        assert errors[0] < 0.8 * errors[1]
        for name, linear in linears_of(compensated).items():
            assert not torch.equal(linear.weight, linears_of(model)[name].weight), name
    assert torch.equal(compensated.lm_head.weight, model.lm_head.weight)
    again = copy.deepcopy(model)
    apply_gptq(again, windows, 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), compensated.parameters(), strict=True))


def test_smoothquant_smooths_what_norms_feed(model: nn.Module, windows: torch.Tensor) -> None:
    loud = copy.deepcopy(model)
    with torch.no_grad():
        for layer in loud.model.layers:
            layer.input_layernorm.weight[3] *= 40
            layer.post_attention_layernorm.weight[7] *= 40
    smooth, plain = copy.deepcopy(loud), copy.deepcopy(loud)
    apply_smoothquant(smooth, windows.split(1))
    for name in linears_of(plain):
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, Int8Linear(plain.get_submodule(name), None, None))
    smoothed = {name for name, module in smooth.named_modules() if getattr(module, "smoothing", None) is not None}
    assert {name.rpartition(".")[2] for name in smoothed} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    attention = smooth.model.layers[1].self_attn
    weights = loud.model.layers[1].self_attn
    columns = torch.stack([getattr(weights, f"{p}_proj").weight.abs().amax(0) for p in "qkv"]).amax(0)
    inputs: list[torch.Tensor] = []
    handle = weights.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        expected = loud(windows).logits
        handle.remove()
        peaks = inputs[0].abs().flatten(0, 1).amax(0)
        torch.testing.assert_close(attention.q_proj.smoothing, (peaks / columns).sqrt())
        errors = [float((changed(windows).logits - expected).norm()) for changed in (smooth, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_llm_int8_replaces_every_linear(model: nn.Module, windows: torch.Tensor) -> None:
    changed = copy.deepcopy(model)
    apply_llm_int8(changed)
    assert sum(isinstance(module, Int8Linear) for module in changed.modules()) == 14
    with torch.no_grad():
        expected, outputs = model(windows).logits, changed(windows).logits
    assert 0 < float((outputs - expected).norm() / expected.norm()) < 0.05
