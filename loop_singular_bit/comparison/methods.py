"""The methods that `CompressionBenchmark` compares, and the settings in which each is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from loop_singular_bit.packed_weight import PackedLayout, PackedWeight
from loop_singular_bit.quantization.allocation import Candidate, allocate, measure_candidates
from loop_singular_bit.quantization.calibration import StatisticsStore, collect_statistics
from loop_singular_bit.quantization.presets import PRESETS
from loop_singular_bit.quantization.quantize_calibrated import CalibratedQuantizer
from loop_singular_bit.quantization.quantize_weight import quantize_weight

from .eight_bit import absmax_int8, apply_llm_int8, apply_smoothquant, int8_bits
from .gptq import apply_gptq
from .half_quadratic import half_quadratic, half_quadratic_bits
from .linears import REFERENCE_FEATURES, CompressedSize, StoredBits, linears_of, replace_weights, size_of
from .round_to_nearest import grid_bits, round_to_nearest
from .sign_and_ternary import absmean_ternary, binary, binary_bits, ternary_bits

PRESET_NAMES = ("b1", "b2", "b3", "b4")
MIXED_TARGET_BITS = (1.25, 1.57, 2.31, 2.57, 3.31, 4.31)
_GRID_BITS = (2, 3, 4)
_GRID_GROUPS = (128, 64)
_HALF_QUADRATIC_GROUP = 64
_SENSITIVITY_WINDOWS = 8


class CalibrationInputs:
    """What methods may know about the inputs of a model's linears; computed when the first method asks.

    Args:
        original: the model that is compressed; stays as it is.
        windows: int64 [windows, tokens] of calibration text.
    """

    def __init__(self, original: nn.Module, windows: torch.Tensor) -> None:
        self.original = original
        self.windows = windows

    @cached_property
    def statistics(self) -> StatisticsStore:
        return collect_statistics(self.original, self.windows, linears_of(self.original))

    @cached_property
    def candidates(self) -> dict[str, list[Candidate]]:
        """Layouts for each linear and what they do to the model's loss, bits counted as in a model 4096 wide."""
        linears = linears_of(self.original)
        narrowest = min(linear.in_features for linear in linears.values())
        return measure_candidates(
            self.original,
            {name: linear.weight for name, linear in linears.items() if name in self.statistics},
            self.statistics,
            self.windows[:: max(1, len(self.windows) // _SENSITIVITY_WINDOWS)],
            enlargement=max(1, REFERENCE_FEATURES // narrowest),
        )


Apply = Callable[[nn.Module, CalibrationInputs], CompressedSize]


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        method: a name of `METHODS`.
        name: unique.
        curve: variants of one curve differ in bits only.
        description: settings in words.
        data: what it knows besides the weights: "none", or what it takes from the calibration text.
        apply: compresses a float32 model in place.
    """

    method: str
    name: str
    curve: str
    description: str
    data: str
    apply: Apply


def _from_weights(quantize: Callable[[torch.Tensor], torch.Tensor], stored_bits: StoredBits) -> Apply:
    def apply(model: nn.Module, _: CalibrationInputs) -> CompressedSize:
        replace_weights(model, quantize)
        return size_of(linears_of(model), stored_bits)

    return apply


def _int8_activations(change: Callable[[nn.Module, CalibrationInputs], None]) -> Apply:
    def apply(model: nn.Module, inputs: CalibrationInputs) -> CompressedSize:
        size = size_of(linears_of(model), int8_bits)
        change(model, inputs)
        return size

    return apply


def _gptq(bits: int, group_size: int) -> Apply:
    def apply(model: nn.Module, inputs: CalibrationInputs) -> CompressedSize:
        apply_gptq(model, inputs.windows, bits, group_size)
        return size_of(linears_of(model), partial(grid_bits, bits=bits, group_size=group_size))

    return apply


def _preset(name: str) -> Apply:
    def apply(model: nn.Module, _: CalibrationInputs) -> CompressedSize:
        return _put_packed(model, lambda _, linear: quantize_weight(linear.weight, name))

    return apply


def _calibrated_preset(name: str) -> Apply:
    def apply(model: nn.Module, inputs: CalibrationInputs) -> CompressedSize:
        quantizer = CalibratedQuantizer(inputs.statistics, preset=name, measure_before=False)
        return _put_packed(model, lambda module, linear: quantizer.quantize_weight(linear.weight, module))

    return apply


def _mixed(target_bits: float) -> Apply:
    def apply(model: nn.Module, inputs: CalibrationInputs) -> CompressedSize:
        layouts = allocate(inputs.candidates, target_bits)
        quantizer = CalibratedQuantizer(inputs.statistics, layouts=layouts, measure_before=False)
        return _put_packed(model, lambda module, linear: quantizer.quantize_weight(linear.weight, module))

    return apply


@torch.no_grad()
def _put_packed(model: nn.Module, pack: Callable[[str, nn.Linear], PackedWeight]) -> CompressedSize:
    stored = weights = 0
    reference = 0.0
    for name, linear in linears_of(model).items():
        layout = (packed := pack(name, linear)).layout
        linear.weight.copy_(packed.dequantize())
        outliers = -(-layout.outliers * REFERENCE_FEATURES // layout.in_features)
        as_reference = PackedLayout(
            REFERENCE_FEATURES,
            REFERENCE_FEATURES,
            layout.planes,
            outliers,
            column_scales=layout.column_scales,
            means=layout.means,
        )
        count = layout.out_features * layout.in_features
        stored += 8 * layout.nbytes
        reference += as_reference.bits_per_weight * count
        weights += count
    return CompressedSize(stored / weights, reference / weights)


def _ours() -> list[Variant]:
    name = "loop_singular_bit"
    variants = []
    for preset in PRESET_NAMES:
        planes = PRESETS[preset].planes
        words = f"preset {preset}: {planes} plane{'s' * (planes > 1)}"
        variants += [
            Variant(name, f"{name}-{preset}", name, words, "none", _preset(preset)),
            Variant(
                name,
                f"{name}-{preset}-calibrated",
                f"{name}, calibrated",
                f"{words}, calibrated",
                "X'X",
                _calibrated_preset(preset),
            ),
        ]
    variants += [
        Variant(
            name,
            f"{name}-{target:g}bit-calibrated",
            f"{name}, mixed planes, calibrated",
            f"planes chosen by sensitivity, at most {target:g} bits at a width of {REFERENCE_FEATURES}, calibrated",
            "X'X, gradients",
            _mixed(target),
        )
        for target in MIXED_TARGET_BITS
    ]
    return variants


def _grids(method: str, data: str, words: str, apply: Callable[[int, int], Apply]) -> list[Variant]:
    return [
        Variant(
            method,
            f"{method}-{bits}bit-g{group}",
            method,
            f"{bits} bit, groups of {group}{words}",
            data,
            apply(bits, group),
        )
        for bits in _GRID_BITS
        for group in _GRID_GROUPS
    ]


def _round_to_nearest(bits: int, group_size: int) -> Apply:
    return _from_weights(
        partial(round_to_nearest, bits=bits, group_size=group_size),
        partial(grid_bits, bits=bits, group_size=group_size),
    )


def _half_quadratic(bits: int) -> Variant:
    apply = _from_weights(
        partial(half_quadratic, bits=bits, group_size=_HALF_QUADRATIC_GROUP),
        partial(half_quadratic_bits, bits=bits, group_size=_HALF_QUADRATIC_GROUP),
    )
    words = f"{bits} bit, groups of {_HALF_QUADRATIC_GROUP}"
    return Variant("hqq", f"hqq-{bits}bit-g{_HALF_QUADRATIC_GROUP}", "hqq", words, "none", apply)


VARIANTS: tuple[Variant, ...] = (
    *_ours(),
    Variant(
        "binary",
        "binary",
        "binary",
        "sign x mean magnitude of the row",
        "none",
        _from_weights(binary, binary_bits),
    ),
    Variant(
        "bitnet",
        "bitnet",
        "bitnet",
        "absmean ternary of a model that was trained without",
        "none",
        _from_weights(absmean_ternary, ternary_bits),
    ),
    *_grids("rtn", "none", "", _round_to_nearest),
    *(_half_quadratic(bits) for bits in _GRID_BITS),
    *_grids("gptq", "X'X", ", act-order", _gptq),
    Variant("int8", "int8", "int8", "weights only, absmax of the row", "none", _from_weights(absmax_int8, int8_bits)),
    Variant(
        "llm_int8",
        "llm_int8",
        "llm_int8",
        "8-bit weights and activations but for columns above 6",
        "none",
        _int8_activations(lambda model, _: apply_llm_int8(model)),
    ),
    Variant(
        "smoothquant",
        "smoothquant",
        "smoothquant",
        "8-bit weights and activations, alpha 0.5",
        "max abs x",
        _int8_activations(lambda model, inputs: apply_smoothquant(model, inputs.windows.split(1))),
    ),
)

METHODS: tuple[str, ...] = tuple(dict.fromkeys(variant.method for variant in VARIANTS))


def find_variants(names: Sequence[str] | None) -> list[Variant]:
    """Variants of the methods, or single variants, of those names, in their order; None for all.

    Raises:
        ValueError: an unknown name; the message lists the methods, or the variants of the method it begins with.
    """
    if names is None:
        return list(VARIANTS)
    if isinstance(names, str):
        raise TypeError(f"compression_methods: expected a sequence of names, got the string {names!r}")
    found: dict[str, Variant] = {}
    for name in names:
        of_name = [variant for variant in VARIANTS if name in (variant.method, variant.name)]
        if not of_name:
            method = name.partition("-")[0]
            choices = [variant.name for variant in VARIANTS if variant.method == method] or METHODS
            raise ValueError(f"compression_methods: expected some of {', '.join(choices)}; got {name!r}")
        found |= {variant.name: variant for variant in of_name}
    if not found:
        raise ValueError(f"compression_methods: expected some of {', '.join(METHODS)}; got none")
    return list(found.values())
