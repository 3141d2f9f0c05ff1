"""The executable specification against itself, by hand-made values, and the oracles of the size formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_singular_bit import reference
from loop_singular_bit.packed_weight import PackedLayout


def test_pack_signs_puts_column_32w_plus_b_into_bit_b_of_word_w() -> None:
    is_positive = torch.zeros(1, 2, 40, dtype=torch.bool)
    is_positive[0, 0, [0, 31, 33]] = True
    is_positive[0, 1, 1] = True
    signs = reference.pack_signs(is_positive)
    assert signs.shape == (1, 1, 2, 32) and signs.dtype == torch.int32
    assert signs[0, 0, 0, 0].item() == 1 - 2**31
    assert signs[0, 0, 1, 0].item() == 2
    assert signs[0, 0, :, 1].tolist() == [2, 0]
    assert signs[0, 0, :, 2:].count_nonzero() == 0


def test_unpack_inverts_pack_for_every_byte() -> None:
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    is_positive = bits.bool().reshape(1, 256, 8)
    assert torch.equal(reference.unpack_signs(reference.pack_signs(is_positive), 256, 8), is_positive)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(planes=st.integers(1, 8), rows=st.integers(1, 70), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_unpack_inverts_pack(planes: int, rows: int, columns: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    is_positive = torch.rand(planes, rows, columns, generator=random) < 0.5
    signs = reference.pack_signs(is_positive)
    assert signs.shape == PackedLayout(rows, columns, planes, 0).tensors()["signs"][1]
    assert torch.equal(reference.unpack_signs(signs, rows, columns), is_positive)


def test_dequantize_skips_outlier_columns_out_of_range_and_adds_up_equal_ones() -> None:
    weight = reference.dequantize(
        signs=torch.full((1, 1, 1, 32), -1, dtype=torch.int32),
        scales=torch.full((1, 1, 32), 0.5, dtype=torch.float16),
        outlier_columns=torch.tensor([1, 1, 3]).reshape(1, 3, 1).expand(1, 3, 32).to(torch.uint16),
        outlier_deltas=torch.tensor([2, 3, 100]).reshape(1, 3, 1).expand(1, 3, 32).to(torch.int8),
        outlier_scales=torch.full((1, 32), 0.25, dtype=torch.float16),
        column_scales=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float16),
        means=torch.full((1, 32), 0.125, dtype=torch.float16),
        out_features=1,
        in_features=3,
    )
    assert weight.tolist() == [[0.625, (0.625 + 5 * 0.25) * 2, 0.625 * 4]]


@pytest.mark.parametrize("column_scales", [False, True])
@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize(("rows", "columns", "planes", "outliers"), [(1, 1, 1, 0), (33, 65, 3, 2), (4096, 4096, 2, 32)])
def test_size_formula_agrees_with_the_layout(
    rows: int, columns: int, planes: int, outliers: int, column_scales: bool, means: bool
) -> None:
    layout = PackedLayout(rows, columns, planes, outliers, column_scales, means)
    assert reference.packed_nbytes(rows, columns, planes, outliers, column_scales, means) == layout.nbytes


def test_ratio_of_the_historic_bitmap_layout() -> None:
    assert reference.historic_bitmap_bits(0.02) == pytest.approx(2.30)
    assert 16 / reference.historic_bitmap_bits(0.02) == pytest.approx(6.957, abs=5e-4)


def test_ratio_that_the_old_code_computed() -> None:
    # The share of outliers that its session measured for Mistral's layer 0 q_proj.
    assert 16 / reference.historic_stored_bits(0.01988) == pytest.approx(1.747, abs=5e-4)
    assert 32 / reference.historic_stored_bits(0.01988) == pytest.approx(3.493, abs=1e-3)
