"""quantize_calibrated: lower output errors than without calibration, not higher with more rounds, always the same."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_singular_bit import ops
from loop_singular_bit.packed_linear import PackedLinear
from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.calibration import InputStatistics, StatisticsStore
from loop_singular_bit.quantization.quantize_calibrated import (
    CalibratedQuantizer,
    output_error,
    quantize_model_calibrated,
    quantize_weight_calibrated,
)
from loop_singular_bit.quantization.quantize_weight import quantize_weight

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import VOCABULARY, tiny_language_model


def correlated(features: int, seed: int, tokens: int = 400) -> torch.Tensor:
    """Second moment of inputs of which a few directions and a few columns hold most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) * torch.logspace(0, -2, features)
    inputs = torch.randn(tokens, features, generator=generator) @ mixing.T
    inputs[:, :: max(1, features // 3)] *= 4
    return inputs.T @ inputs / tokens


def heavy_tailed(out_features: int, in_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 8
    return weight


def pack(
    weight: torch.Tensor, hessian: torch.Tensor, planes: int, outliers: int, rounds: int = 3, scales: bool = True
) -> tuple[PackedWeight, torch.Tensor, float]:
    start = ops.fit_column_scales(weight) if scales else None
    *packed, column_scales, losses, damping = ops.quantize_calibrated(weight, hessian, planes, outliers, start, rounds)
    out_features, in_features = weight.shape
    packed_weight = PackedWeight(
        *packed,
        out_features=out_features,
        in_features=in_features,
        column_scales=column_scales if scales else None,
    )
    return packed_weight, losses, float(damping)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    out_features=st.integers(1, 140),
    in_features=st.integers(1, 200),
    planes=st.integers(1, 4),
    outlier_share=st.sampled_from([0.0, 0.01, 0.05, 1.0]),
    scales=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_valid_packed_weight_of_any_shape(
    out_features: int, in_features: int, planes: int, outlier_share: float, scales: bool, seed: int
) -> None:
    weight = heavy_tailed(out_features, in_features, seed)
    outliers = min(in_features, math.ceil(outlier_share * in_features), 20)
    packed, losses, _ = pack(weight, correlated(in_features, seed), planes, outliers, rounds=2, scales=scales)
    packed.validate()
    assert packed.layout.planes == planes
    assert torch.isfinite(losses).all()
    steps = losses[1:] - losses[:-1]
    assert (steps <= 1e-5 * losses[:-1] + 1e-7).all(), losses
    assert torch.isfinite(packed.dequantize()).all()


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_half_the_output_error_of_packing_without_calibration(planes: int) -> None:
    weight, hessian = heavy_tailed(96, 160, 1), correlated(160, 2)
    packed, losses, _ = pack(weight, hessian, planes, 2, rounds=4)
    plain = quantize_weight(weight, planes=planes)
    assert output_error(weight, packed, hessian) < 0.8 * output_error(weight, plain, hessian)
    assert losses[-1] < 0.95 * losses[0]  # the rounds do something after the sweep


def test_losses_are_those_of_the_packed_weight() -> None:
    weight, hessian = heavy_tailed(70, 100, 3), correlated(100, 4)
    packed, losses, damping = pack(weight, hessian, 2, 1)
    # Damping acts on columns divided by their first scales.
    start = ops.fit_column_scales(weight).float()
    scaled = hessian * start[:, None] * start[None]
    damped = scaled + damping * scaled.diagonal().mean() * torch.eye(100)
    difference = (weight - packed.dequantize()) / start
    loss = ((difference @ damped) * difference).sum() / (((weight / start) @ damped) * (weight / start)).sum()
    assert float(loss) == pytest.approx(float(losses[-1]), rel=1e-3)


def test_more_rounds_never_hurt() -> None:
    weight, hessian = heavy_tailed(64, 128, 5), correlated(128, 6)
    ends = [float(pack(weight, hessian, 2, 1, rounds=rounds)[1][-1]) for rounds in (0, 1, 3, 6)]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < 0.9 * ends[0]


def test_same_bytes_for_any_number_of_threads_and_any_instruction_set() -> None:
    weight, hessian = heavy_tailed(200, 150, 7), correlated(150, 8)
    threads, isa = torch.get_num_threads(), ops.isa()
    results = []
    try:
        for name, count in [(name, count) for name in ops.supported_isas() for count in (1, 2)]:
            ops.set_isa(name)
            torch.set_num_threads(count)
            results.append(pack(weight, hessian, 3, 2, rounds=2))
    finally:
        torch.set_num_threads(threads)
        ops.set_isa(isa)
    for packed, losses, _ in results[1:]:
        assert torch.equal(losses, results[0][1])
        for name, tensor in packed.tensors().items():
            assert torch.equal(tensor, results[0][0].tensors()[name]), name


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_scales_are_snapped_to_multiples_that_add_up_to_126(planes: int) -> None:
    packed, _, _ = pack(heavy_tailed(96, 128, 9), correlated(128, 10), planes, 1)
    scales = packed.scales.float().transpose(1, 2).reshape(-1, planes)[:96]
    multiples = 126 * scales / scales.sum(1, keepdim=True)
    assert (multiples - multiples.round()).abs().max() < 0.06
    assert (multiples.round().sum(1) == 126).all()
    assert (scales[:, :-1] >= scales[:, 1:]).all()


def test_exact_where_levels_suffice() -> None:
    signs = torch.randint(0, 2, (64, 96), generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = signs * torch.linspace(0.5, 2, 64)[:, None].half().float()
    packed, losses, _ = pack(weight, correlated(96, 0), 1, 1, scales=False)
    assert torch.allclose(packed.dequantize(), weight, rtol=2e-3)
    assert losses[-1] < 1e-5


def test_singular_hessians_get_more_damping_and_dead_columns_do_no_harm() -> None:
    weight = heavy_tailed(40, 64, 11)
    direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    hessian = direction @ direction.T
    *_, damping = ops.quantize_calibrated(weight, hessian, 2, 1, None, 1, 0.0)
    assert damping > 0
    hessian = correlated(64, 12)
    hessian[5] = hessian[:, 5] = 0
    packed, losses, used = pack(weight, hessian, 2, 1)
    assert used == 0.01
    assert torch.isfinite(packed.dequantize()).all()
    assert losses[-1] < losses[0]


def test_zero_weight() -> None:
    packed, losses, _ = pack(torch.zeros(33, 40), correlated(40, 0), 2, 1)
    assert (packed.dequantize() == 0).all()
    assert (losses == 0).all()


def test_rejects_what_it_cannot_do() -> None:
    weight, hessian = heavy_tailed(32, 64, 0), correlated(64, 0)
    with pytest.raises(ValueError, match=r"planes: expected 1 to 4, got 5"):
        ops.quantize_calibrated(weight, hessian, 5, 1)
    with pytest.raises(ValueError, match="outliers"):
        ops.quantize_calibrated(weight, hessian, 1, 65)
    with pytest.raises(ValueError, match="rounds"):
        ops.quantize_calibrated(weight, hessian, 1, 1, None, -1)
    with pytest.raises(ValueError, match="damping"):
        ops.quantize_calibrated(weight, hessian, 1, 1, None, 1, -1.0)
    with pytest.raises(RuntimeError, match="hessian: expected shape"):
        ops.quantize_calibrated(weight, hessian[:-1], 1, 1)
    with pytest.raises(RuntimeError, match="float32"):
        ops.quantize_calibrated(weight, hessian.double(), 1, 1)
    broken = weight.clone()
    broken[3, 4] = math.nan
    with pytest.raises(ValueError, match="row 3, column 4"):
        ops.quantize_calibrated(broken, hessian, 1, 1)
    with pytest.raises(ValueError, match="hessian"):
        ops.quantize_calibrated(weight, torch.zeros(64, 64), 1, 1)
    with pytest.raises(ValueError, match="positive definite"):
        ops.quantize_calibrated(weight, hessian - 1e6 * (torch.ones(64, 64) - torch.eye(64)), 1, 1)
    with pytest.raises(ValueError, match="means"):
        quantize_weight_calibrated(weight, hessian, "historic")


def test_operator_registration() -> None:
    weight, hessian = heavy_tailed(40, 64, 0), correlated(64, 0)
    torch.library.opcheck(
        torch.ops.loop_singular_bit.quantize_calibrated.default,
        (weight, hessian, 2, 1, ops.fit_column_scales(weight), 1, 0.01),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_exactly(dtype: torch.dtype) -> None:
    weight, hessian = heavy_tailed(40, 64, 13).to(dtype), correlated(64, 13)
    for result, expected in zip(
        ops.quantize_calibrated(weight, hessian, 2, 1),
        ops.quantize_calibrated(weight.float(), hessian, 2, 1),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_quantizer_uses_statistics_and_layouts_and_reports() -> None:
    store = StatisticsStore()
    hessian = correlated(64, 14)
    store.add(["a", "b"], InputStatistics(hessian, 400))
    quantizer = CalibratedQuantizer(store, preset="b2", layouts={"b": (3, 4)}, rounds=2)
    weight = heavy_tailed(48, 64, 15)
    first, second, third = (quantizer.quantize_weight(weight, name) for name in ("a", "b", "never.called"))
    assert (first.planes, first.outliers, second.planes, second.outliers) == (2, 1, 3, 4)
    expected = quantize_weight_calibrated(weight, hessian, "b2", rounds=2).packed_weight
    assert torch.equal(first.signs, expected.signs)
    assert torch.equal(third.signs, quantize_weight(weight, "b2").signs)
    report = quantizer.report()
    assert report["uncalibrated"] == ["never.called"]
    assert all(linear["output_error"] < linear["output_error_before"] for linear in report["linears"][:2])
    assert quantizer.linears[0].output_error == pytest.approx(output_error(weight, first, hessian))


def test_model_in_memory() -> None:
    model = tiny_language_model("llama", tied=True)
    text = " ".join(str(number) for number in range(600))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # calibrated models need no warning
        report, linears = quantize_model_calibrated(model, Numbers(), text, window=32, rounds=1)
    assert len(linears) == 14
    assert all(linear.output_error < linear.output_error_before for linear in linears)
    assert {module.kind for module in report.replaced} == {"linear", "embedding"}
    assert isinstance(model.model.layers[1].mlp.up_proj, PackedLinear)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


class Numbers:
    bos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) * 37 % VOCABULARY for word in text.split()]}
