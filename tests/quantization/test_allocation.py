"""Mixed layouts: optimal on hulls, within the budget, and driven by what the model minds."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_singular_bit.quantization.allocation import Candidate, allocate, measure_candidates
from loop_singular_bit.quantization.calibration import collect_statistics

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import VOCABULARY, tiny_language_model

WEIGHTS = 100


def candidates_of(losses: list[list[float]]) -> dict[str, list[Candidate]]:
    """Linear i has a candidate of 1, 2, ... bits per weight for each of its losses."""
    return {
        str(index): [Candidate(bits, 1, bits * WEIGHTS, WEIGHTS, loss) for bits, loss in enumerate(some, 1)]
        for index, some in enumerate(losses)
    }


def total(candidates: dict[str, list[Candidate]], layouts: dict[str, tuple[int, int]]) -> tuple[float, int]:
    chosen = [next(one for one in candidates[name] if one.planes == planes) for name, (planes, _) in layouts.items()]
    return sum(one.loss for one in chosen), sum(one.bits for one in chosen)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.lists(st.floats(0.01, 10), min_size=3, max_size=3).map(lambda gains: sorted(gains, reverse=True)),
        min_size=1,
        max_size=4,
    ),
    target=st.integers(1, 4),
)
def test_least_loss_of_all_choices_when_losses_are_convex(steps: list[list[float]], target: int) -> None:
    losses = [[sum(gains[index:]) for index in range(4)] for gains in steps]
    candidates = candidates_of(losses)
    loss, bits = total(candidates, allocate(candidates, target))
    budget = target * WEIGHTS * len(losses)
    assert bits <= budget
    best = min(
        sum(one.loss for one in choice)
        for choice in itertools.product(*candidates.values())
        if sum(one.bits for one in choice) <= budget
    )
    assert loss == pytest.approx(best)


def test_points_on_a_straight_line_are_all_used() -> None:
    gain = 2.1687416386286773
    candidates = candidates_of([[2 * gain + 2.0, gain + 2.0, 2.0, 0.0]])
    assert allocate(candidates, 2.0) == {"0": (2, 1)}


def test_candidates_above_the_hull_are_passed_over() -> None:
    candidates = candidates_of([[10.0, 9.9, 0.0]])
    assert allocate(candidates, 2.0) == {"0": (1, 1)}
    assert allocate(candidates, 3.0) == {"0": (3, 1)}
    assert allocate(candidates_of([[1.0, 2.0]]), 2.0) == {"0": (1, 1)}


def test_budget_that_cannot_be_met() -> None:
    with pytest.raises(
        ValueError, match=r"0\.5 bits per weight cannot be met: the smallest layouts need 1\.000, the largest 1\.000"
    ):
        allocate(candidates_of([[1.0]]), 0.5)
    with pytest.raises(ValueError, match="at least one"):
        allocate({}, 1.0)


def test_measures_what_the_model_minds() -> None:
    model = tiny_language_model("llama", tied=False)
    # The second layer's attention hardly reaches the output.
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
    windows = torch.randint(VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    store = collect_statistics(model, windows, names)
    candidates = measure_candidates(
        model,
        {name: model.get_submodule(name).weight for name in names},
        store,
        windows[:2],
        planes=(1, 2, 3),
    )
    for some in candidates.values():
        assert [(one.planes, one.outliers) for one in some] == [(1, 1), (2, 1), (3, 1), (3, 2)]
        assert some[0].loss > some[1].loss > some[2].loss > 0
        assert some[0].bits < some[1].bits < some[2].bits
    layouts = allocate(candidates, sum(one.bits for one in (candidates[names[0]][2], candidates[names[1]][0])) / 4096)
    assert (layouts[names[0]][0], layouts[names[1]][0]) == (3, 1)
    assert all(parameter.requires_grad for parameter in model.parameters())
