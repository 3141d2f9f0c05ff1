"""quantize_weight: quality oracles, blocks, options, the historic scheme."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_singular_bit import PackedWeight, ops, quantize_weight
from loop_singular_bit.packed_weight import PackedLayout
from loop_singular_bit.quantization.presets import PRESETS, outlier_count
from loop_singular_bit.quantization.quantize_weight import column_scale_rows, quantize_embedding_weight
from loop_singular_bit.quantization.weight_errors import WeightErrors, measure_weight_errors


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns)


def laplace(rows: int, columns: int) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((rows, columns))


def same_bytes(one: PackedWeight, other: PackedWeight) -> bool:
    return one.layout == other.layout and all(
        torch.equal(tensor.view(torch.uint8), other.tensors()[name].view(torch.uint8))
        for name, tensor in one.tensors().items()
    )


def sqnr_db(weight: torch.Tensor, packed: PackedWeight) -> float:
    return measure_weight_errors(weight, packed).sqnr_db


@pytest.mark.parametrize(
    ("draw", "planes", "decibels"),
    [
        (gaussian, 1, 4.40),
        (gaussian, 2, 9.30),
        (gaussian, 3, 14.3),
        (laplace, 1, 3.01),
        (laplace, 2, 7.55),
        (laplace, 3, 12.5),
    ],
)
def test_noise_of_planes_alone(draw: Callable[[int, int], torch.Tensor], planes: int, decibels: float) -> None:
    """Optimal scalar quantizers with 2^planes symmetric levels; no outliers, no column scales."""
    weight = draw(64, 4096)
    signs, scales, *outliers, _ = ops.quantize(weight, planes, 0)
    packed = PackedWeight(signs, scales, *outliers, out_features=64, in_features=4096)
    assert sqnr_db(weight, packed) == pytest.approx(decibels, abs=0.15)


@pytest.mark.parametrize("draw", [gaussian, laplace])
def test_every_plane_and_every_outlier_helps(draw: Callable[[int, int], torch.Tensor]) -> None:
    weight = draw(96, 1024)
    by_planes = [sqnr_db(weight, quantize_weight(weight, planes=planes)) for planes in range(1, 9)]
    assert all(later > earlier + 3 for earlier, later in pairwise(by_planes)), by_planes
    by_outliers = [
        sqnr_db(weight, quantize_weight(weight, outlier_fraction=share)) for share in (0, 1 / 128, 0.02, 0.08)
    ]
    assert by_outliers == sorted(by_outliers) and by_outliers[-1] > by_outliers[0] + 1


def test_a_single_huge_weight_in_a_row_does_not_spoil_it() -> None:
    weight = torch.randn(512, 512)
    plain = measure_weight_errors(weight, quantize_weight(weight)).mse_error
    rows = torch.arange(0, 512, 8)
    weight[rows, 7 * rows % 512] = 100.0
    error = quantize_weight(weight).dequantize() - weight
    assert error.square().mean() < 1.2 * plain
    assert error[rows, 7 * rows % 512].abs().max() < 0.5


def test_column_scales_help_where_columns_differ() -> None:
    weight = torch.randn(256, 512) * torch.linspace(0.2, 3.0, 512)
    with_scales, without = quantize_weight(weight), quantize_weight(weight, column_scales=False)
    assert with_scales.column_scales is not None and without.column_scales is None
    assert sqnr_db(weight, with_scales) > sqnr_db(weight, without) + 1
    assert torch.corrcoef(torch.stack([with_scales.column_scales.float(), torch.linspace(0.2, 3.0, 512)]))[0, 1] > 0.99


def test_column_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight = torch.randn(128, 256)
    importance = torch.ones(256)
    importance[:64] = 100.0
    plain, weighted = (
        quantize_weight(weight).dequantize(),
        quantize_weight(weight, column_importance=importance).dequantize(),
    )
    important = (weight - plain)[:, :64].square().mean(), (weight - weighted)[:, :64].square().mean()
    rest = (weight - plain)[:, 64:].square().mean(), (weight - weighted)[:, 64:].square().mean()
    assert important[1] < 0.98 * important[0] and rest[1] > rest[0]


def test_layouts_are_those_of_the_presets() -> None:
    weight = torch.randn(70, 300)
    for name, preset in PRESETS.items():
        packed = quantize_weight(weight, name)
        outliers = outlier_count(300, preset.outlier_fraction)
        assert packed.layout == PackedLayout(70, 300, preset.planes, outliers, preset.column_scales, preset.means)
        packed.validate()
    assert quantize_weight(weight, planes=3, outlier_fraction=0.02).layout == PackedLayout(70, 300, 3, 6)
    assert quantize_embedding_weight(weight, "b4").planes == 8
    assert same_bytes(quantize_embedding_weight(weight, "historic"), quantize_embedding_weight(weight, "b2"))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 140),
    planes=st.integers(1, 8),
    share=st.floats(0, 0.3),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
)
def test_any_shape_gives_a_valid_weight_with_zero_padding(
    rows: int, columns: int, planes: int, share: float, scale: float
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * scale
    packed = quantize_weight(weight, planes=planes, outlier_fraction=share)
    packed.validate()
    assert sqnr_db(weight, packed) > 2.5
    padding = packed.rows(rows // 32 * 32, rows % 32).tensors() if rows % 32 else {}
    for name, tensor in padding.items():
        if name != "column_scales":
            assert not tensor[..., rows % 32 :].view(torch.uint8).any(), name
    if columns % 32:
        assert not (packed.signs[:, :, -1] >> (columns % 32) & (2 ** (32 - columns % 32) - 1)).any()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(planes=st.integers(2, 8), seed=st.integers(0, 99))
def test_plane_scales_are_on_the_grid_of_the_format(planes: int, seed: int) -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(seed))
    scales = quantize_weight(weight, planes=planes).scales.double().permute(0, 2, 1).flatten(0, 1)
    assert (scales[:, :-1] >= scales[:, 1:]).all()
    if planes > 4:
        assert torch.equal(scales[:, :-1], 2 * scales[:, 1:])
    else:
        unit = scales.sum(dim=1, keepdim=True) / 126
        levels = (scales / unit).round()
        assert (levels.sum(dim=1) == 126).all()
        assert ((scales - levels * unit).abs() <= 2.0**-10 * scales).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_row_blocks_give_the_bytes_of_the_whole(preset: str) -> None:
    weight = torch.randn(300, 200).bfloat16()
    whole = quantize_weight(weight, preset)
    scales = True if whole.column_scales is None else ops.fit_column_scales(weight[column_scale_rows(300)])
    for block_rows in (32, 96, 256):
        for first in range(0, 300, block_rows):
            block = quantize_weight(weight[first : first + block_rows], preset, column_scales=scales)
            assert same_bytes(block, whole.rows(first, block.out_features)), (block_rows, first)


@pytest.mark.parametrize("preset", ["b2", "b4", "historic"])
def test_bytes_do_not_depend_on_threads(preset: str) -> None:
    weight = torch.randn(300, 200)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize_weight(weight, preset))
    finally:
        torch.set_num_threads(threads)
    assert same_bytes(results[0], results[1]) and same_bytes(results[0], results[2])


def test_bytes_do_not_depend_on_strides_or_gradients() -> None:
    weight = torch.randn(64, 96)
    expected = quantize_weight(weight)
    assert same_bytes(quantize_weight(weight.T.contiguous().T), expected)
    assert same_bytes(quantize_weight(torch.nn.Parameter(weight)), expected)
    assert same_bytes(quantize_weight(weight.double()), expected)


def test_column_scale_rows() -> None:
    assert column_scale_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(column_scale_rows(1024), torch.arange(1024))
    rows = column_scale_rows(3584)
    assert rows.dtype == torch.int64 and len(rows) == 1024 and rows[0] == 0 and rows[-1] < 3584
    assert set((rows[1:] - rows[:-1]).tolist()) == {3, 4}


def test_column_scales_of_a_tall_weight_come_from_the_rows_that_the_function_names() -> None:
    weight = torch.randn(1500, 32)
    packed = quantize_weight(weight)
    assert packed.column_scales is not None
    assert torch.equal(packed.column_scales, ops.fit_column_scales(weight[column_scale_rows(1500)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_float_dtypes_are_converted(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    assert same_bytes(quantize_weight(weight), quantize_weight(weight.float()))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.randn(5), ValueError, r"expected 2 dimensions .* got shape \[5\]"),
        (torch.randn(2, 3, 5), ValueError, r"expected 2 dimensions .* got shape \[2, 3, 5\]"),
        (torch.randn(0, 5), ValueError, r"at least one row and one column, got shape \[0, 5\]"),
        (torch.randn(5, 0), ValueError, r"at least one row and one column, got shape \[5, 0\]"),
        (torch.zeros(1, 65537), ValueError, r"at most 65536 columns"),
        (torch.zeros(4, 4, dtype=torch.int8), TypeError, r"floating-point tensor, got torch.int8"),
        ([[1.0]], TypeError, r"floating-point tensor, got list"),
    ],
)
def test_refuses_what_is_no_weight(weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(weight)


@pytest.mark.parametrize("preset", ["b2", "historic"])
def test_names_the_weight_that_is_not_finite(preset: str) -> None:
    weight = torch.randn(300, 64)
    weight[290, 33] = float("nan")
    with pytest.raises(ValueError, match=r"row 290.*column 33"):
        quantize_weight(weight, preset)


def test_refuses_options_out_of_range() -> None:
    weight = torch.randn(40, 64)
    with pytest.raises(ValueError, match="expected one of b1"):
        quantize_weight(weight, "b7")
    with pytest.raises(ValueError, match=r"outlier_fraction: expected 0 to 1, got 1\.5"):
        quantize_weight(weight, outlier_fraction=1.5)
    with pytest.raises((ValueError, RuntimeError), match="planes: expected 1 to 8, got 9"):
        quantize_weight(weight, planes=9)
    with pytest.raises(ValueError, match="'historic' has one plane"):
        quantize_weight(weight, "historic", planes=2)


def test_the_widest_weight_there_is() -> None:
    weight = torch.randn(2, 65536)
    packed = quantize_weight(weight)
    packed.validate()
    assert packed.outliers == 512
    assert sqnr_db(weight, packed) > 9


# ---- the historic scheme --------------------------------------------------------------------------------------------


def test_historic_is_sign_of_weight_minus_mean_with_the_standard_deviation_and_two_percent_outliers() -> None:
    weight = torch.randn(40, 200) * 0.02 + 0.005
    packed = quantize_weight(weight, "historic")
    assert packed.layout == PackedLayout(40, 200, planes=1, outliers=4, column_scales=False, means=True)
    for row in (0, 17, 39):
        values = weight[row].double()
        largest = values.abs().topk(4).indices.sort().values
        normal = torch.ones(200, dtype=torch.bool)
        normal[largest] = False
        mean, deviation = values[normal].mean(), values[normal].std(correction=0)
        dense = packed.dequantize()[row].double()
        assert torch.equal(packed.outlier_columns[row // 32, :, row % 32].long(), largest)
        expected = mean + torch.where(values >= mean, deviation, -deviation)
        torch.testing.assert_close(dense[normal], expected[normal], rtol=1e-3, atol=1e-6)
        # int8 deltas: within half a step of the largest one, plus float16 roundings of mean and deviation.
        step = (values - expected)[largest].abs().max() / 127
        assert ((dense - values)[largest].abs() <= 0.5 * step + 2e-3 * deviation).all()


def test_historic_reaches_what_the_old_scheme_reaches_on_gaussian_weights() -> None:
    weight = torch.randn(512, 4096)
    errors = measure_weight_errors(weight, quantize_weight(weight, "historic"))
    assert errors.sqnr_db == pytest.approx(4.94, abs=0.1)
    # 4.5 % of the range at 2^24 weights; the range of 2^21 is a little smaller.
    assert errors.mae_over_range_percent == pytest.approx(4.9, abs=0.4)


@pytest.mark.parametrize("weight", [torch.zeros(3, 50), torch.full((3, 50), 0.25), torch.eye(40)])
def test_historic_on_degenerate_weights(weight: torch.Tensor) -> None:
    packed = quantize_weight(weight, "historic")
    packed.validate()
    torch.testing.assert_close(packed.dequantize(), weight, rtol=1e-2, atol=1e-6)


# ---- errors of a weight ---------------------------------------------------------------------------------------------


def test_weight_errors_by_hand() -> None:
    errors = WeightErrors()
    errors.add(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.5, -2.0]]))
    errors.add(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    errors.add(torch.empty(0, 2), torch.empty(0, 2))
    assert errors.mse_error == pytest.approx(0.25 / 4)
    assert errors.mae_error == pytest.approx(0.125)
    assert errors.relative_error == pytest.approx(0.5 / 3)
    assert errors.sqnr_db == pytest.approx(20 * math.log10(6))
    assert errors.largest_error == 0.5
    assert errors.mae_over_range_percent == pytest.approx(100 * 0.125 / 4)


def test_weight_errors_where_nothing_or_everything_is_lost() -> None:
    exact, lost = WeightErrors(), WeightErrors()
    exact.add(torch.zeros(2, 2), torch.zeros(2, 2))
    lost.add(torch.zeros(2, 2), torch.ones(2, 2))
    assert (exact.relative_error, exact.sqnr_db, exact.mae_over_range_percent) == (0.0, math.inf, 0.0)
    assert (lost.relative_error, lost.sqnr_db) == (math.inf, -math.inf)
