"""Shapes, sizes, checks and conversions of PackedLayout and PackedWeight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_packed_weights import random_packed_weight, reference_dequantize

from loop_singular_bit.packed_weight import TENSOR_NAMES, PackedLayout, PackedWeight


def test_layout_of_odd_shapes() -> None:
    layout = PackedLayout(33, 65, planes=3, outliers=2, column_scales=True, means=True)
    assert layout.tensors() == {
        "signs": (torch.int32, (2, 3, 3, 32)),
        "scales": (torch.float16, (2, 3, 32)),
        "outlier_columns": (torch.uint16, (2, 2, 32)),
        "outlier_deltas": (torch.int8, (2, 2, 32)),
        "outlier_scales": (torch.float16, (2, 32)),
        "column_scales": (torch.float16, (65,)),
        "means": (torch.float16, (2, 32)),
    }
    assert list(layout.tensors()) == list(TENSOR_NAMES)
    assert layout.nbytes == sum(layout.part_nbytes().values()) == 2304 + 384 + 256 + 128 + 128 + 130 + 128


@pytest.mark.parametrize(("planes", "bits"), [(1, 1.19921875), (2, 2.203125), (3, 3.20703125), (4, 4.2109375)])
def test_bits_per_weight_of_a_4096_square(planes: int, bits: float) -> None:
    assert PackedLayout(4096, 4096, planes, 32).bits_per_weight == bits


def test_layout_survives_a_round_trip_through_a_dictionary() -> None:
    layout = PackedLayout(33, 65, planes=3, outliers=2, column_scales=False, means=True)
    assert PackedLayout.from_dict(layout.to_dict()) == layout
    assert PackedLayout.from_dict({"kind": "linear", **layout.to_dict()}) == layout


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"planes": 9}, ValueError, r"planes: expected 1 to 8, got 9"),
        ({"planes": 0}, ValueError, r"planes: expected 1 to 8, got 0"),
        ({"in_features": 65537}, ValueError, r"in_features: expected 1 to 65536, got 65537"),
        ({"out_features": 0}, ValueError, r"out_features: expected 1 to \d+, got 0"),
        ({"outliers": 66}, ValueError, r"outliers: expected 0 to 65, got 66"),
        ({"outliers": -1}, ValueError, r"outliers: expected 0 to 65, got -1"),
        ({"planes": 2.0}, TypeError, r"planes: expected an int, got 2\.0"),
        ({"planes": True}, TypeError, r"planes: expected an int, got True"),
        ({"means": 1}, TypeError, r"means: expected a bool, got 1"),
        ({"colour": "blue"}, ValueError, r"unknown keys \['colour'\]"),
    ],
)
def test_layout_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    fields = {**PackedLayout(33, 65, 3, 2).to_dict(), **change}
    with pytest.raises(error, match=message):
        PackedLayout.from_dict(fields)


def test_layout_names_missing_keys() -> None:
    fields = PackedLayout(33, 65, 3, 2).to_dict()
    del fields["outliers"]
    with pytest.raises(ValueError, match=r"missing keys \['outliers'\]"):
        PackedLayout.from_dict(fields)


def test_tensors_are_in_storage_order_and_make_the_weight_again() -> None:
    packed = random_packed_weight(40, 70, means=True)
    assert list(packed.tensors()) == list(TENSOR_NAMES)
    again = PackedWeight.from_tensors(packed.tensors(), 40, 70)
    assert again.layout == packed.layout == PackedLayout(40, 70, 2, 3, True, True)
    assert (again.planes, again.outliers, again.nbytes) == (2, 3, packed.layout.nbytes)
    assert all(again.tensors()[name] is tensor for name, tensor in packed.tensors().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"signs": torch.zeros(2, 2, 3, 31, dtype=torch.int32)}, ValueError, r"signs: expected shape \[2, 2, 3, 32\]"),
        ({"signs": torch.zeros(2, 2, 3, dtype=torch.int32)}, ValueError, r"signs: expected shape \[row_tiles"),
        ({"scales": torch.zeros(2, 2, 32)}, TypeError, r"scales: expected dtype torch.float16, got torch.float32"),
        (
            {"scales": torch.zeros(2, 3, 32).half()},
            ValueError,
            r"scales: expected shape .* got \[2, 3, 32\]",
        ),
        ({"outlier_columns": torch.zeros(2, 3, 32, dtype=torch.int16)}, TypeError, r"expected dtype torch.uint16"),
        ({"column_scales": torch.zeros(69).half()}, ValueError, r"column_scales: expected shape \[70\]"),
        ({"outlier_scales": torch.zeros(32, 2).half().T}, ValueError, r"outlier_scales: expected a contiguous tensor"),
        ({"biases": torch.zeros(1)}, ValueError, r"unknown names \['biases'\]"),
    ],
)
def test_from_tensors_refuses(change: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    tensors = {**random_packed_weight(40, 70).tensors(), **change}
    with pytest.raises(error, match=message):
        PackedWeight.from_tensors(tensors, 40, 70)


def test_from_tensors_names_missing_tensors() -> None:
    tensors = random_packed_weight(40, 70).tensors()
    del tensors["outlier_deltas"]
    with pytest.raises(ValueError, match=r"missing \['outlier_deltas'\]"):
        PackedWeight.from_tensors(tensors, 40, 70)


def _changed(packed: PackedWeight, name: str, index: tuple[int, ...], value: float) -> PackedWeight:
    tensor = getattr(packed, name).clone()
    if tensor.dtype == torch.uint16:
        tensor.view(torch.int16)[index] = int(value) - (65536 if value > 32767 else 0)
    else:
        tensor[index] = value
    return replace(packed, **{name: tensor})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("scales", (1, 1, 5), float("nan"), r"scales: expected finite values, got nan at row 37, plane 1"),
        ("scales", (0, 0, 2), -0.5, r"scales: expected >= 0, got -0.5 at row 2, plane 0"),
        ("scales", (0, 1, 2), 0.75, r"largest plane first, got 0\.\d+ then 0.75 at row 2, plane 1"),
        ("column_scales", (7,), 0.0, r"column_scales: expected > 0, got 0.0 at column 7"),
        ("column_scales", (7,), -1.0, r"column_scales: expected > 0, got -1.0 at column 7"),
        ("outlier_scales", (1, 0), float("inf"), r"outlier_scales: expected finite values, got inf at row 32"),
        ("means", (0, 31), float("nan"), r"means: expected finite values, got nan at row 31"),
        ("column_scales", (69,), float("nan"), r"column_scales: expected finite values, got nan at column 69"),
        ("outlier_columns", (0, 2, 4), 70, r"below in_features = 70, got 70 at row 4, slot 2"),
        ("outlier_columns", (1, 2, 4), 65535, r"below in_features = 70, got 65535 at row 36, slot 2"),
        ("outlier_columns", (0, 2, 4), 0, r"expected ascending columns .* then 0 at row 4, slot 2"),
    ],
)
def test_validate_names_tensor_row_and_value(name: str, index: tuple[int, ...], value: float, message: str) -> None:
    packed = random_packed_weight(40, 70, means=True)
    packed.validate()
    with pytest.raises(ValueError, match=message):
        _changed(packed, name, index, value).validate()


def test_validate_ignores_padded_rows_and_accepts_padding_slots() -> None:
    packed = random_packed_weight(40, 70)
    column = int(packed.outlier_columns[0, 1, 4])
    packed = _changed(_changed(packed, "outlier_columns", (0, 2, 4), column), "outlier_deltas", (0, 2, 4), 0)
    packed = _changed(packed, "scales", (1, 0, 8), float("nan"))
    packed = _changed(packed, "outlier_columns", (1, 0, 8), 65535)
    packed.validate()
    with pytest.raises(ValueError, match="expected ascending columns"):
        _changed(packed, "outlier_deltas", (0, 2, 4), 1).validate()


def test_rows_are_a_weight_of_their_own() -> None:
    packed = random_packed_weight(100, 70, means=True)
    whole = reference_dequantize(packed)
    for first, count in [(0, 32), (32, 64), (64, 36), (96, 4), (0, 100), (32, 5)]:
        block = packed.rows(first, count)
        assert torch.equal(reference_dequantize(block), whole[first : first + count])
        assert block.signs.untyped_storage().data_ptr() == packed.signs.untyped_storage().data_ptr()
    for first, count in [(16, 32), (96, 5), (0, 0), (-32, 32)]:
        with pytest.raises(ValueError, match="rows: expected a first row"):
            packed.rows(first, count)


def test_dequantize_and_linear_use_the_operators() -> None:
    packed = random_packed_weight(40, 70, means=True)
    assert torch.equal(packed.dequantize(), reference_dequantize(packed, torch.float32))
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16
    input, bias = torch.randn(3, 70), torch.randn(40)
    expected = torch.nn.functional.linear(input, packed.dequantize(), bias)
    torch.testing.assert_close(packed.linear(input, bias, "exact"), expected, rtol=1e-5, atol=1e-5)


def test_to_another_device() -> None:
    packed = random_packed_weight(40, 70).to("meta")
    assert packed.device.type == "meta"
    assert packed.layout == random_packed_weight(40, 70).layout
