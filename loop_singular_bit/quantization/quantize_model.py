"""Swaps the linears and embeddings of a model in memory for packed ones, and reports what was and was not replaced."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from loop_singular_bit import ops
from loop_singular_bit.huge_pages import move_to_huge_pages
from loop_singular_bit.linear_groups import group_linears
from loop_singular_bit.packed_linear import PackedEmbedding, PackedLinear
from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.eligibility import MIN_FEATURES, embedding_skip_reason, linear_skip_reason
from loop_singular_bit.quantization.outlier_preserving_quantizer import OutlierPreservingQuantizer
from loop_singular_bit.quantization.presets import DEFAULT_PRESET, Preset, check_calibration, find_preset
from loop_singular_bit.quantization.quantize_weight import quantize_embedding_weight, quantize_weight
from loop_singular_bit.quantization.weight_errors import measure_weight_errors


@dataclass(frozen=True)
class QuantizationConfig:
    """How `quantize_model` packs a model.

    Args:
        preset: name of a preset, or a `Preset`.
        outlier_fraction: outliers of a row over its columns, 0 to 1; None means the preset's.
        skip_modules: modules to leave as they are: full names, names they start or end with at a dot ("lm_head",
            "mlp.gate", "model.layers.0"), or regular expressions that match the full name.
        quantize_embeddings: also pack embeddings and output heads, at the preset's embedding_planes.
        activation_precision: of the packed linears: "int8", "int16" or "exact"; see `ops.packed_linear`.
        force: allow presets that make models unusable without calibration.
        quantizer: packs the linears, not embeddings and heads, instead of preset and outlier_fraction.
    """

    preset: str | Preset = DEFAULT_PRESET
    outlier_fraction: float | None = None
    skip_modules: Sequence[str] = ()
    quantize_embeddings: bool = True
    activation_precision: str = "int8"
    force: bool = False
    quantizer: OutlierPreservingQuantizer | None = None

    def __post_init__(self) -> None:
        find_preset(self.preset)
        if self.outlier_fraction is not None and not 0 <= self.outlier_fraction <= 1:
            raise ValueError(f"outlier_fraction: expected 0 to 1, got {self.outlier_fraction}")
        if isinstance(self.skip_modules, str):
            raise TypeError(f"skip_modules: expected a sequence of names, got the string {self.skip_modules!r}")
        for pattern in self.skip_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"skip_modules: {pattern!r} is not a regular expression: {error}") from error
        if self.activation_precision not in ops.ACTIVATION_PRECISIONS:
            raise ValueError(
                f"activation_precision: expected one of {', '.join(ops.ACTIVATION_PRECISIONS)}, "
                f"got {self.activation_precision!r}"
            )


@dataclass(frozen=True)
class ReplacedModule:
    """What happened to one module: sizes in bytes, errors of the packed weight against the dense one."""

    name: str
    kind: str
    out_features: int
    in_features: int
    planes: int
    outliers: int
    bits_per_weight: float
    original_nbytes: int
    packed_nbytes: int
    relative_error: float
    sqnr_db: float
    tied_to: str | None = None


@dataclass
class QuantizationReport:
    """What `quantize_model` did.

    Attributes:
        replaced: one record per module that was swapped, in the order of the model.
        skipped: name and reason of every module or parameter that could have been meant but was left alone.
    """

    preset: str
    replaced: list[ReplacedModule] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def original_nbytes(self) -> int:
        return sum(module.original_nbytes for module in self.replaced)

    @property
    def packed_nbytes(self) -> int:
        return sum(module.packed_nbytes for module in self.replaced)

    @property
    def bits_per_weight(self) -> float:
        """8 x stored bytes over the weights of the replaced modules; a tied weight counts once."""
        owned = [module for module in self.replaced if module.tied_to is None]
        return 8 * self.packed_nbytes / sum(module.out_features * module.in_features for module in owned)

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} modules packed with preset {self.preset}: "
            f"{self.bits_per_weight:.2f} bits per weight, {self.original_nbytes:,} -> {self.packed_nbytes:,} bytes"
        ]
        lines += [
            f"  {module.name}: tied to {module.tied_to}"
            if module.tied_to is not None
            else f"  {module.name}: {module.kind} {module.out_features} x {module.in_features}, "
            f"{module.bits_per_weight:.2f} bits per weight, relative error {module.relative_error:.3f} "
            f"({module.sqnr_db:.1f} dB)"
            for module in self.replaced
        ]
        if self.skipped:
            lines.append(f"{len(self.skipped)} left as they are")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's full name is one of the patterns, starts or ends with one at a dot, or matches one fully."""
    return any(
        name == pattern
        or name.startswith(f"{pattern}.")
        or name.endswith(f".{pattern}")
        or re.fullmatch(pattern, name) is not None
        for pattern in patterns
    )


def quantize_linear(linear: nn.Linear, config: QuantizationConfig | None = None) -> PackedLinear:
    """A packed linear for a single `nn.Linear`, which stays as it is.

    Warns:
        UncalibratedWarning: see `check_calibration`.

    Raises:
        ValueError, TypeError: see `check_calibration` and `quantize_weight`.
    """
    config = config or QuantizationConfig()
    check_calibration(config.preset, force=config.force, stacklevel=3)
    packed_weight = quantize_weight(linear.weight, config.preset, outlier_fraction=config.outlier_fraction)
    return PackedLinear.from_packed_weight(packed_weight, linear.bias, activation_precision=config.activation_precision)


def quantize_model(model: nn.Module, config: QuantizationConfig | None = None) -> QuantizationReport:
    """Swaps the linears and embeddings inside a model for packed ones, in place, one weight at a time.

    Any `nn.Module` with `nn.Linear`s inside works. A weight that an embedding and an output head share is packed once
    and stays shared. Norms, biases, convolutions and everything else keep their values. The dense weights are freed as
    soon as nothing else refers to them. Linears of Transformers models that take the same input run in one call (see
    `linear_groups`); packed tensors lie on huge pages (see `huge_pages`).

    Warns:
        UncalibratedWarning: the preset visibly damages a model without calibration.

    Raises:
        ValueError: nothing was replaced, `model` itself is a linear or an embedding (see `quantize_linear`), the
            preset needs calibration (see `check_calibration`), or a weight holds NaN or infinity (named).
    """
    config = config or QuantizationConfig()
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"model: expected a module with linears inside, got a bare {type(model).__name__}, which cannot be swapped "
            "in place; use quantize_linear or PackedEmbedding.from_embedding"
        )
    if config.quantizer is None or config.quantizer.calibration == "none":
        check_calibration(config.preset, force=config.force, stacklevel=3)
    report = _ModelQuantizer(model, config).run()
    move_to_huge_pages(model)
    group_linears(model)
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        from loop_singular_bit.transformers_integration import attach_quantizer

        attach_quantizer(model, report.preset, config.skip_modules)
    return report


_Packed = PackedLinear | PackedEmbedding


class _ModelQuantizer:
    """One run over one model. Holds names and identities of dense weights, never the weights: they must be freed."""

    def __init__(self, model: nn.Module, config: QuantizationConfig) -> None:
        self.model = model
        self.config = config
        self.preset = find_preset(config.preset)
        self.report = QuantizationReport(preset=self.preset.name)
        modules = dict(model.named_modules(remove_duplicate=False))
        self.names = list(modules)
        self.head_ids = _output_head_ids(modules)
        self.float32_names = _float32_names(modules)
        self.swapped: dict[int, _Packed] = {}  # by identity of the dense module, which several parents may hold
        self.owners: dict[int, tuple[str, _Packed]] = {}  # by identity of a dense weight that several modules share
        self.kept: dict[int, str] = {}  # by identity of a dense weight: name of the module that keeps it dense

        users: dict[int, dict[int, str]] = {}  # weight -> module -> name
        for name, module in modules.items():
            if (weight := _dense_weight(module)) is not None:
                users.setdefault(id(weight), {}).setdefault(id(module), name)
        self.shared_ids = {weight_id for weight_id, modules_of in users.items() if len(modules_of) > 1}
        for weight_id in self.shared_ids:
            names = list(users[weight_id].values())
            if any(isinstance(modules[name], nn.Embedding) for name in names):
                self.head_ids.update(users[weight_id])
            for name in names:
                if self._skip_reason(name, modules[name]) is not None:
                    self.kept.setdefault(weight_id, name)

    def run(self) -> QuantizationReport:
        for name in self.names:
            self._visit(name)
        if not self.report.replaced:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.report.skipped)
            raise ValueError(
                f"model: nothing to quantize in {type(self.model).__name__}: {reasons or 'it has no linear layers'}"
            )
        return self.report

    def _visit(self, name: str) -> None:
        module = self.model.get_submodule(name)
        if id(module) in self.swapped:
            _replace(self.model, name, self.swapped[id(module)])
            return
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            self.report.skipped += _unpackable(name, module)
            return
        reason = self._skip_reason(name, module)
        if reason is None and (keeper := self.kept.get(id(module.weight))) is not None:
            reason = f"shares its weight with {keeper}, which stays as it is"
        if reason is not None:
            self.report.skipped.append((name, reason))
            return
        packed = self._pack(name, module)
        self.swapped[id(module)] = packed
        _replace(self.model, name, packed)

    def _skip_reason(self, name: str, module: nn.Module) -> str | None:
        assert isinstance(module, (nn.Linear, nn.Embedding))
        if matches_any(name, self.config.skip_modules):
            return "named in skip_modules"
        if not self.float32_names.isdisjoint(name.split(".")):
            return "the model wants it in float32 (_keep_in_fp32_modules)"
        if type(module) not in (nn.Linear, nn.Embedding):
            base = "Linear" if isinstance(module, nn.Linear) else "Embedding"
            return f"{type(module).__name__} is a subclass of nn.{base}, whose forward may be another"
        if not self.config.quantize_embeddings:
            if isinstance(module, nn.Embedding):
                return "an embedding, and quantize_embeddings is off"
            if id(module) in self.head_ids:
                return "an output head, and quantize_embeddings is off"
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None:
                return "max_norm is set: it rewrites the weight in every call"
            return embedding_skip_reason(module.num_embeddings, module.embedding_dim)
        return linear_skip_reason(module.out_features, module.in_features)

    def _pack(self, name: str, module: nn.Linear | nn.Embedding) -> _Packed:
        weight = module.weight
        owner_name, owner = self.owners.get(id(weight), (None, None))
        is_embedding = isinstance(module, nn.Embedding)
        if owner is None:
            is_linear = not is_embedding and id(module) not in self.head_ids
            quantize = quantize_weight if is_linear else quantize_embedding_weight
            try:
                if is_linear and self.config.quantizer is not None:
                    packed_weight = self.config.quantizer.quantize_weight(weight, name)
                else:
                    packed_weight = quantize(weight, self.preset, outlier_fraction=self.config.outlier_fraction)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        else:
            packed_weight = owner.packed_weight
        errors = measure_weight_errors(weight, packed_weight)
        self.report.replaced.append(
            ReplacedModule(
                name=name,
                kind="embedding" if is_embedding else "linear",
                out_features=packed_weight.out_features,
                in_features=packed_weight.in_features,
                planes=packed_weight.planes,
                outliers=packed_weight.outliers,
                bits_per_weight=packed_weight.bits_per_weight,
                original_nbytes=weight.nbytes if owner is None else 0,
                packed_nbytes=packed_weight.nbytes if owner is None else 0,
                relative_error=errors.relative_error,
                sqnr_db=errors.sqnr_db,
                tied_to=owner_name,
            )
        )
        packed = self._packed_module(module, packed_weight, owner)
        packed.train(module.training)
        if owner is None and id(weight) in self.shared_ids:
            self.owners[id(weight)] = (name, packed)
        return packed

    def _packed_module(
        self, module: nn.Linear | nn.Embedding, packed_weight: PackedWeight, owner: _Packed | None
    ) -> _Packed:
        precision = self.config.activation_precision
        if isinstance(module, nn.Embedding):
            dtype = module.weight.dtype
            if owner is None:
                return PackedEmbedding.from_packed_weight(packed_weight, module.padding_idx, dtype=dtype)
            return PackedEmbedding.tied_to(owner, module.padding_idx, dtype=dtype)
        if owner is None:
            return PackedLinear.from_packed_weight(packed_weight, module.bias, activation_precision=precision)
        return PackedLinear.tied_to(owner, module.bias, activation_precision=precision)


def _dense_weight(module: nn.Module) -> nn.Parameter | None:
    # Not module.weight: a parametrized module computes another tensor in every access.
    return module._parameters.get("weight") if isinstance(module, (nn.Linear, nn.Embedding)) else None


def _output_head_ids(modules: dict[str, nn.Module]) -> set[int]:
    """Identities of the linears that turn hidden states into logits of the vocabulary."""
    heads = {id(module) for name, module in modules.items() if name.rpartition(".")[2] == "lm_head"}
    for module in modules.values():
        # Hugging Face models name their head themselves.
        if (get_output_embeddings := getattr(module, "get_output_embeddings", None)) is not None:
            heads.add(id(get_output_embeddings()))
    return heads


def _float32_names(modules: dict[str, nn.Module]) -> set[str]:
    """Parts of names that Hugging Face models list as too delicate for a lower precision, such as T5's "wo"."""
    names: set[str] = set()
    for module in modules.values():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            names.update(getattr(module, attribute, None) or ())
    return names


def _unpackable(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters that hold a weight but not as an `nn.Linear` or `nn.Embedding`, with the reason to leave them."""
    for parameter_name, parameter in module.named_parameters(recurse=False):
        full_name = f"{name}.{parameter_name}" if name else parameter_name
        shape = " x ".join(str(size) for size in parameter.shape)
        if type(module).__name__ == "Conv1D" and parameter.dim() == 2:
            yield name, f"Conv1D ({shape}) is not supported: its weight is the transpose of a linear's"
        elif parameter.dim() == 3 and min(parameter.shape[1:]) >= MIN_FEATURES:
            yield full_name, f"a fused 3-D weight ({shape}), as of experts: only nn.Linear and nn.Embedding are packed"
        elif parameter.dim() >= 2 and parameter.numel() >= MIN_FEATURES**2:
            yield (
                full_name,
                f"a weight of {type(module).__name__} ({shape}): only nn.Linear and nn.Embedding are packed",
            )


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child_name, replacement)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # The fast paths of the layer and of the encoder around it read dense weights; without these flags they call
        # the linears.
        parent.activation_relu_or_gelu = 0
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and parent in encoder.layers.children():
                encoder.use_nested_tensor = False
