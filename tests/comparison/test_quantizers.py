"""The published quantizers against slow plain versions of themselves, and their bits against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loop_singular_bit.comparison.eight_bit import Int8Linear, absmax_int8, int8_bits
from loop_singular_bit.comparison.gptq import DAMPING, gptq
from loop_singular_bit.comparison.half_quadratic import half_quadratic, half_quadratic_bits
from loop_singular_bit.comparison.linears import size_of
from loop_singular_bit.comparison.methods import METHODS, VARIANTS, find_variants
from loop_singular_bit.comparison.round_to_nearest import fit_grid, grid_bits, round_to_nearest
from loop_singular_bit.comparison.sign_and_ternary import absmean_ternary, binary, binary_bits, ternary_bits


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return normal * torch.exp(0.5 * torch.randn(rows, columns, generator=generator))


def correlated_inputs(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) + torch.randn(columns)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [64, 96, 100])
def test_round_to_nearest_takes_the_nearest_level_of_each_group(bits: int, columns: int) -> None:
    weight = heavy_tailed(5, columns)
    rounded = round_to_nearest(weight, bits, 32)
    for row in range(5):
        for first in range(0, columns, 32):
            group = weight[row, first : first + 32]
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = round(-low / scale)
            levels = torch.tensor([scale * (code - zero) for code in range(2**bits)])
            nearest = levels[(group[:, None] - levels).abs().argmin(dim=1)]
            torch.testing.assert_close(rounded[row, first : first + 32], nearest)


def test_a_group_of_zeros_stays_zero_and_tiny_weights_do_not_vanish() -> None:
    assert not round_to_nearest(torch.zeros(2, 64), 2, 64).any()
    assert round_to_nearest(torch.full((1, 64), 1e-6), 4, 64).any()


def test_binary_has_the_best_scale_of_a_row() -> None:
    weight = heavy_tailed(6, 96)
    rounded = binary(weight)
    for row in range(6):
        scale = rounded[row].abs().unique()
        assert len(scale) == 1
        assert torch.equal(rounded[row].sign(), torch.where(weight[row] >= 0, 1.0, -1.0))
        best = float((weight[row] * rounded[row].sign()).mean())
        assert float(scale) == pytest.approx(best, rel=1e-3)


def test_ternary_has_three_levels_of_one_scale() -> None:
    weight = heavy_tailed(8, 64)
    mean = float(weight.abs().mean())
    rounded = absmean_ternary(weight)
    assert torch.allclose(rounded.unique(), torch.tensor([-mean, 0.0, mean]), rtol=1e-3)
    away_from_ties = (weight.abs() - mean / 2).abs() > 1e-3
    assert torch.equal((rounded != 0)[away_from_ties], (weight.abs() > mean / 2)[away_from_ties])


def test_half_quadratic_lowers_the_error_of_rounding() -> None:
    weight = torch.randn(64, 128)
    for bits in (2, 3, 4):
        restored = half_quadratic(weight, bits, 64)
        error, rounded = (restored - weight).abs(), (round_to_nearest(weight, bits, 64) - weight).abs()
        assert error.mean() < 0.97 * rounded.mean()
        assert error.pow(0.7).mean() < 0.98 * rounded.pow(0.7).mean()
        assert max(len(group.unique()) for group in restored.reshape(-1, 64)) <= 2**bits
    with pytest.raises(ValueError, match="multiple of 64"):
        half_quadratic(torch.randn(3, 50), 4, 64)


def test_half_quadratic_keeps_groups_of_equal_weights() -> None:
    equal = torch.full((2, 64), 5.0)
    torch.testing.assert_close(half_quadratic(equal, 4, 64), equal)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (weight - rounded).double()
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_lowers_the_output_error_of_rounding(bits: int) -> None:
    weight, inputs = heavy_tailed(32, 192), correlated_inputs(600, 192).double()
    hessian = inputs.T @ inputs / len(inputs)
    compensated, rounded = gptq(weight, hessian, bits, 64), round_to_nearest(weight, bits, 64)
    assert output_error(weight, compensated, hessian) < 0.7 * output_error(weight, rounded, hessian)


def test_gptq_is_rounding_when_inputs_are_not_correlated() -> None:
    weight = heavy_tailed(16, 200)
    assert torch.equal(gptq(weight, torch.eye(200), 3, 64), round_to_nearest(weight, 3, 64))


def test_gptq_against_the_formula_column_by_column() -> None:
    weight, inputs = heavy_tailed(7, 40), correlated_inputs(90, 40).double()
    hessian = inputs.T @ inputs / len(inputs)
    bits, group = 3, 16
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    left = torch.argsort(damped.diagonal(), descending=True)
    remaining, expected = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    while len(left):
        # The inverse over the columns that are left: equation 3 of the paper, without its Cholesky reformulation.
        inverse = torch.linalg.inv(damped[left][:, left])
        column = int(left[0])
        first = column // group * group
        scales, zeros = fit_grid(weight[:, first : first + group], bits)
        codes = (torch.round(remaining[:, column] / scales[:, 0]) + zeros[:, 0]).clamp(0, 2**bits - 1)
        expected[:, column] = scales[:, 0] * (codes - zeros[:, 0])
        error = (remaining[:, column] - expected[:, column]) / inverse[0, 0]
        remaining[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    torch.testing.assert_close(gptq(weight, hessian, bits, group), expected.float())


def test_gptq_with_silent_columns_and_few_tokens() -> None:
    weight, inputs = torch.randn(16, 96), torch.randn(20, 96).double()
    inputs[:, 10:20] = 0
    hessian = inputs.T @ inputs / len(inputs)
    rounded = gptq(weight, hessian, 4, 32)
    assert torch.isfinite(rounded).all()
    assert not rounded[:, 10:20].any()
    without = round_to_nearest(weight, 4, 32)
    assert output_error(weight, rounded, hessian) < output_error(weight, without, hessian)


def test_absmax_int8_is_within_half_a_step() -> None:
    values = heavy_tailed(9, 70)
    steps = values.abs().amax(dim=1, keepdim=True) / 127
    assert ((absmax_int8(values) - values).abs() <= steps * 0.501).all()
    assert not absmax_int8(torch.zeros(1, 8)).any()


def test_smoothing_moves_the_range_of_loud_columns_into_the_weights() -> None:
    linear = nn.Linear(64, 48)
    inputs = torch.randn(4, 30, 64)
    inputs[..., 5] *= 60
    expected = linear(inputs)
    smoothing = inputs.abs().flatten(0, 1).amax(0) ** 0.5 / linear.weight.detach().abs().amax(0) ** 0.5

    def error(module: nn.Module) -> float:
        return float((module(inputs) - expected).detach().norm() / expected.detach().norm())

    plain, smooth = error(Int8Linear(linear, None, None)), error(Int8Linear(linear, smoothing, None))
    assert smooth < 0.6 * plain
    # Above the threshold activations are exact: what is left is the error of the weights.
    split = Int8Linear(linear, None, 6.0)
    assert error(split) < 0.6 * plain
    only_loud = torch.zeros(1, 64)
    only_loud[:, 5] = 123.456
    torch.testing.assert_close(
        split(only_loud), nn.functional.linear(only_loud, absmax_int8(linear.weight.detach()), linear.bias)
    )


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("binary", 1 + 16 / 4096),
        ("bitnet", 1.6),
        ("rtn-2bit-g128", 2 + 18 / 128),
        ("rtn-3bit-g64", 3 + 19 / 64),
        ("gptq-4bit-g64", 4 + 20 / 64),
        ("gptq-3bit-g128", 3 + 19 / 128),
        ("hqq-4bit-g64", 4.5),
        ("hqq-3bit-g64", 3.7),
        ("int8", 8 + 32 / 4096),
    ],
)
def test_bits_count_everything_that_is_stored(name: str, bits: float) -> None:
    stored = {
        "binary": binary_bits,
        "bitnet": ternary_bits,
        "rtn-2bit-g128": lambda *shape: grid_bits(*shape, bits=2, group_size=128),
        "rtn-3bit-g64": lambda *shape: grid_bits(*shape, bits=3, group_size=64),
        "gptq-4bit-g64": lambda *shape: grid_bits(*shape, bits=4, group_size=64),
        "gptq-3bit-g128": lambda *shape: grid_bits(*shape, bits=3, group_size=128),
        "hqq-4bit-g64": lambda *shape: half_quadratic_bits(*shape, bits=4, group_size=64),
        "hqq-3bit-g64": lambda *shape: half_quadratic_bits(*shape, bits=3, group_size=64),
        "int8": int8_bits,
    }[name]
    linears = {"a": nn.Linear(256, 128), "b": nn.Linear(768, 256)}
    size = size_of(linears, stored)
    assert size.bits_per_weight_at_4096 == pytest.approx(bits, abs=1e-5)
    assert size.bits_per_weight >= bits - 1e-9
    assert name in {variant.name for variant in VARIANTS}
    # A group that is not full has a scale and a zero point all the same.
    assert grid_bits(1, 65, 4, 64) == 65 * 4 + 2 * 20


def test_names_of_methods_and_of_single_variants() -> None:
    assert set(METHODS) == {
        *("loop_singular_bit", "binary", "bitnet", "rtn", "hqq", "gptq", "int8", "llm_int8", "smoothquant"),
    }
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS) == len(find_variants(None))
    assert [variant.name for variant in find_variants(["gptq-3bit-g64", "int8", "int8"])] == ["gptq-3bit-g64", "int8"]
    assert {variant.method for variant in find_variants(["hqq"])} == {"hqq"} and len(find_variants(["hqq"])) == 3
    with pytest.raises(ValueError, match=r"loop_singular_bit, binary, .*smoothquant.*got 'awq'"):
        find_variants(["int8", "awq"])
    with pytest.raises(ValueError, match=r"gptq-2bit-g128.*got 'gptq-5bit'"):
        find_variants(["gptq-5bit"])
    with pytest.raises(ValueError, match="got none"):
        find_variants([])
    with pytest.raises(TypeError, match="sequence"):
        find_variants("gptq")
    assert sum(variant.method == "loop_singular_bit" for variant in VARIANTS) == 4 + 4 + 6
