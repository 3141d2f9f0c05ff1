"""Presets: their numbers, outlier counts, and how loudly they speak."""

from __future__ import annotations

import warnings

import pytest

from loop_singular_bit.packed_weight import PackedLayout
from loop_singular_bit.quantization.eligibility import embedding_skip_reason, linear_skip_reason
from loop_singular_bit.quantization.presets import (
    DEFAULT_PRESET,
    PRESETS,
    Preset,
    UncalibratedWarning,
    check_calibration,
    find_preset,
    outlier_count,
)


@pytest.mark.parametrize(
    ("name", "bits"), [("b1", 1.199), ("b2", 2.203), ("b3", 3.207), ("b4", 4.211), ("historic", 1.492)]
)
def test_bits_per_weight_of_every_preset(name: str, bits: float) -> None:
    preset = PRESETS[name]
    outliers = outlier_count(4096, preset.outlier_fraction)
    layout = PackedLayout(4096, 4096, preset.planes, outliers, preset.column_scales, preset.means)
    assert layout.bits_per_weight == pytest.approx(bits, abs=5e-4)


def test_the_default_is_two_planes_and_embeddings_have_more() -> None:
    assert DEFAULT_PRESET == "b2" and PRESETS["b2"].planes == 2
    assert {name: preset.embedding_planes for name, preset in PRESETS.items()} == {
        "b1": 6,
        "b2": 6,
        "b3": 6,
        "b4": 8,
        "historic": 6,
    }


@pytest.mark.parametrize(
    ("in_features", "fraction", "count"),
    [
        (4096, 1 / 128, 32),
        (4097, 1 / 128, 33),
        (64, 1 / 128, 1),
        (1, 1 / 128, 1),
        (1, 0.0, 1),
        (4096, 0.0, 1),
        (50, 0.02, 1),
        (4096, 0.02, 82),
        (100, 0.07, 7),
        (7, 1.0, 7),
    ],
)
def test_outlier_count(in_features: int, fraction: float, count: int) -> None:
    assert outlier_count(in_features, fraction) == count


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_outlier_count_refuses_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="outlier_fraction: expected 0 to 1"):
        outlier_count(100, fraction)


def test_find_preset() -> None:
    assert find_preset("b3") is PRESETS["b3"]
    own = Preset("own", 5, 0.0, 8, column_scales=False, means=False, without_calibration="fine")
    assert find_preset(own) is own
    with pytest.raises(ValueError, match="expected one of b1, b2, b3, b4, historic, got 'b9'"):
        find_preset("b9")


def test_presets_without_calibration_speak_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_calibration("b4")
    for name in ("b2", "b3", "historic"):
        with pytest.warns(UncalibratedWarning, match=f"preset '{name}' without calibration visibly damages"):
            check_calibration(name)
    with pytest.raises(ValueError, match=r"preset 'b1' without calibration .* force=True"):
        check_calibration("b1")
    with pytest.warns(UncalibratedWarning):
        check_calibration("b1", force=True)


def test_the_warning_points_at_the_caller() -> None:
    def caller() -> None:
        check_calibration("b2")

    with pytest.warns(UncalibratedWarning) as caught:
        caller()
    assert caught[0].filename == __file__


def test_which_weights_are_worth_packing() -> None:
    assert linear_skip_reason(32, 32) is None
    assert linear_skip_reason(31, 4096) == "tiny: 31 x 4096, packing needs at least 32 features on both sides"
    assert "at most 65536" in str(linear_skip_reason(64, 65537))
    assert embedding_skip_reason(32000, 4096) is None
    assert embedding_skip_reason(512, 384) == "small: 512 embeddings, packing starts at 1024"
    assert "embedding_dim 16" in str(embedding_skip_reason(32000, 16))
    assert "at most 65536" in str(embedding_skip_reason(32000, 65537))
