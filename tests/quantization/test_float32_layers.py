"""One layer in float32 at a time: the outputs, statistics and gradients of the whole model in float32."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from loop_singular_bit.quantization.allocation import measure_candidates
from loop_singular_bit.quantization.calibration import collect_statistics
from loop_singular_bit.quantization.float32_layers import Float32Layers

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import VOCABULARY, tiny_encoder, tiny_language_model

WINDOWS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


def linears_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name]


@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_statistics_and_sensitivities_are_those_of_the_whole_model_in_float32(kind: str) -> None:
    stored = tiny_encoder() if kind == "encoder" else tiny_language_model("llama", tied=True)
    stored = stored.to(torch.bfloat16)
    whole = copy.deepcopy(stored).float()
    before = {name: parameter.data_ptr() for name, parameter in stored.named_parameters()}
    names = linears_of(stored)
    names = [name for name in names if "pooler" not in name]
    expected = collect_statistics(whole, WINDOWS, names)
    weights = {name: whole.get_submodule(name).weight for name in names}
    expected_candidates = measure_candidates(whole, weights, expected, WINDOWS[:2], planes=(1, 2))
    with Float32Layers(stored) as layers:
        found = collect_statistics(stored, WINDOWS, names)
        assert len(layers.layers_in_float32) == 1
        weights = {name: stored.get_submodule(name).weight for name in names}
        candidates = measure_candidates(stored, weights, found, WINDOWS[:2], planes=(1, 2))
        assert len(layers.layers_in_float32) == 1
    for name in names:
        assert torch.equal(found[name].hessian, expected[name].hessian)
        assert [one.loss for one in candidates[name]] == [one.loss for one in expected_candidates[name]]
        assert candidates[name][0].loss > candidates[name][1].loss > 0
    assert {name: parameter.data_ptr() for name, parameter in stored.named_parameters()} == before
    assert all(parameter.dtype == torch.bfloat16 for parameter in stored.parameters())


def test_a_layer_that_another_thread_is_in_stays() -> None:
    model = tiny_language_model("llama", tied=False).to(torch.bfloat16)
    whole = copy.deepcopy(model).float()
    with torch.no_grad(), Float32Layers(model), ThreadPoolExecutor(4) as executor:
        outputs = list(executor.map(lambda window: model(input_ids=window[None]).logits, [*WINDOWS] * 4))
        for window, output in zip([*WINDOWS] * 4, outputs, strict=True):
            assert torch.equal(output, whole(input_ids=window[None]).logits)
