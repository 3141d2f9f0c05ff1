"""Packed weights in Transformers: loading packed checkpoints, quantizing while loading, saving. The only file that
imports Transformers' quantizer classes.

Importing this module registers both classes below; `import loop_singular_bit` is enough, see transformers_registration.
Without it Transformers does not know the method, warns, and would run with random weights; so that it fails instead, a
packed checkpoint holds one empty tensor under the name of a dense weight, whose shape can match no model (see
`guard_tensor`).
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming, apply_renamings
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .packed_weight import FORMAT_VERSION, PackedLayout
from .quantization.eligibility import embedding_skip_reason, linear_skip_reason
from .quantization.presets import DEFAULT_PRESET, check_calibration, find_preset, outlier_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .packed_linear import PackedEmbedding, PackedLinear

QUANT_METHOD = "loop_singular_bit"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


class LoopSingularBitConfig(QuantizationConfigMixin):
    """How a model is, or is to be, packed. For `from_pretrained(..., quantization_config=LoopSingularBitConfig("b4"))`.

    Args:
        preset: "b1", "b2", "b3", "b4" or "historic".
        outlier_fraction: outliers of a row over its columns, 0 to 1; None means the preset's.
        modules_to_not_convert: modules to leave as they are: full names, names they start or end with at a dot, or
            regular expressions that match the full name.
        quantize_embeddings: also pack embeddings and output heads.
        activation_precision: of the packed linears, "int8", "int16" or "exact": see `ops.packed_linear`. The only field
            that counts when a packed checkpoint is loaded; the others are the checkpoint's own.
        force: allow presets that make models unusable without calibration.
        format_version, modules, tied_modules, options: written by this package into packed checkpoints: version of the
            tensor format, layout of each packed module, heads that use the weight of an embedding, provenance.

    Raises:
        ValueError: an unknown preset or format version, or a value out of range.
        TypeError: a field that this version does not know.
    """

    def __init__(
        self,
        preset: str | None = DEFAULT_PRESET,
        outlier_fraction: float | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        quantize_embeddings: bool = True,
        activation_precision: str = "int8",
        force: bool = False,
        format_version: int = FORMAT_VERSION,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        tied_modules: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        # Not at the top: registering with Transformers must not load the operators.
        from .ops import ACTIVATION_PRECISIONS

        if unknown:
            raise TypeError(f"LoopSingularBitConfig: unknown fields {sorted(unknown)}")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: this version of loop_singular_bit reads {FORMAT_VERSION}, the checkpoint has "
                f"{format_version!r}"
            )
        if modules is None:
            find_preset(preset if preset is not None else "None")
        if outlier_fraction is not None and not 0 <= outlier_fraction <= 1:
            raise ValueError(f"outlier_fraction: expected 0 to 1, got {outlier_fraction}")
        if activation_precision not in ACTIVATION_PRECISIONS:
            raise ValueError(
                f"activation_precision: expected one of {', '.join(ACTIVATION_PRECISIONS)}, "
                f"got {activation_precision!r}"
            )
        if isinstance(modules_to_not_convert, str):
            raise TypeError(f"modules_to_not_convert: expected a list of names, got {modules_to_not_convert!r}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.preset = preset
        self.outlier_fraction = outlier_fraction
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.quantize_embeddings = quantize_embeddings
        self.activation_precision = activation_precision
        self.force = force
        self.format_version = format_version
        self.modules = None if modules is None else {name: dict(fields) for name, fields in modules.items()}
        self.tied_modules = dict(tied_modules or {})
        self.options = dict(options or {})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a configuration given to `from_pretrained` changes of the one in a packed checkpoint."""
        return {"activation_precision": self.activation_precision}

    def to_dict(self) -> dict[str, Any]:
        """As written into `config.json`; what a packed checkpoint does not need is left out."""
        fields = dict(super().to_dict())
        if self.modules is not None:
            for name in ("outlier_fraction", "quantize_embeddings", "force"):
                del fields[name]
        else:
            for name in ("modules", "tied_modules", "options"):
                del fields[name]
        return fields


@dataclass
class _Plan:
    """What is to be packed while a dense checkpoint is loaded.

    Attributes:
        modules: name -> whether it is an embedding or an output head, which have planes of their own.
        owners: name -> the empty packed module that others, which use its weight, refer to already.
        skipped: name and reason of what is left alone.
    """

    modules: dict[str, bool] = field(default_factory=dict)
    owners: dict[str, PackedLinear | PackedEmbedding] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


class LoopSingularBitQuantizer(HfQuantizer):
    """What Transformers calls while it loads and saves packed models.

    Attributes:
        skipped: after quantizing while loading: name and reason of every module that was left as it was.
    """

    requires_calibration = False

    quantization_config: LoopSingularBitConfig

    def __init__(self, quantization_config: LoopSingularBitConfig, **kwargs: Any) -> None:
        # A copy: the layouts of this model are written into it, and the user may load another one with the same object.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if not self.pre_quantized and quantization_config.modules is not None:
            raise ValueError(
                "quantization_config: this is the configuration of a packed checkpoint, and the checkpoint is not "
                "packed; pass LoopSingularBitConfig(preset=...)"
            )
        if self.pre_quantized and quantization_config.modules is None:
            raise ValueError(
                f"config.json: quant_method is {QUANT_METHOD!r}, but quantization_config has no 'modules': the "
                "checkpoint was not written by loop_singular_bit or is damaged"
            )
        self.skipped: list[tuple[str, str]] = []
        self._plan = _Plan()
        self._failure: ValueError | None = None

    # ---- before loading ---------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        from . import ops  # noqa: F401  Fails here, with a sentence, when the operators were not built.

        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        for device in devices - {None, "auto", "balanced", "balanced_low_0", "sequential"}:
            kind = "disk" if device == "disk" else "cuda" if isinstance(device, int) else torch.device(device).type
            if kind == "disk":
                raise ValueError(
                    "device_map: a packed model cannot be offloaded to disk by accelerate; it is a fifth of its size "
                    "already, load it with device_map='cpu'"
                )
            if kind not in ("cpu", "meta"):
                raise ValueError(f"device_map: packed weights run on the CPU, got {device!r}; use device_map='cpu'")

    def update_device_map(self, device_map: Any) -> Any:
        # "auto" and its kind would spread the model over accelerators, for which there are no operators.
        return {"": "cpu"} if isinstance(device_map, str) else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        return dtype

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and name in self._plan.modules

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        name = param_name.rpartition(".")[0]
        return self._layout(model.get_submodule(name), self._plan.modules[name]).bits_per_weight / 8

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._install_packed_modules(model)
        else:
            self._plan_quantization(model)

    def _install_packed_modules(self, model: PreTrainedModel) -> None:
        """Replaces every module that the checkpoint holds packed by an empty packed one."""
        config = self.quantization_config
        assert config.modules is not None
        names = _module_names(model, [*config.modules, *config.tied_modules])
        replaced: dict[str, PackedLinear | PackedEmbedding] = {}
        for stored_name, entry in config.modules.items():
            name = names.get(stored_name)
            if name is None:
                continue  # The head of a checkpoint that is loaded without it; Transformers reports its tensors.
            where = f"config.json: quantization_config.modules[{stored_name!r}]"
            module = model.get_submodule(name)
            replaced[name] = _empty(module, _checked_layout(where, entry, module), config.activation_precision)
        if not replaced:
            raise ValueError(
                f"config.json: none of the {len(config.modules)} packed modules of the checkpoint is in "
                f"{type(model).__name__}; the first is {next(iter(config.modules), None)!r}"
            )
        for stored_name, stored_owner in config.tied_modules.items():
            name, owner = names.get(stored_name), names.get(stored_owner)
            if name is None:
                continue
            module = model.get_submodule(name)
            where = f"config.json: quantization_config.tied_modules[{stored_name!r}]"
            if owner is None or owner not in replaced:
                raise ValueError(f"{where}: expected a packed module, got {stored_owner!r}")
            _checked_layout(where, config.modules[stored_owner], module, any_kind=True)
            replaced[name] = _tied(module, replaced[owner], config.activation_precision)
        for name, packed in replaced.items():
            _replace(model, name, packed)
        _drop_ties(model, set(replaced))
        _ignore_dense_weights(model, {*config.modules, *replaced})

    def _plan_quantization(self, model: PreTrainedModel) -> None:
        """Decides what to pack; each dense module is replaced when its weight arrives."""
        config = self.quantization_config
        preset = find_preset(config.preset or DEFAULT_PRESET)
        check_calibration(preset, force=config.force, stacklevel=6)
        _refuse_fused_experts(model)
        ties = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in model.all_tied_weights_keys.items()
            if target.endswith(".weight") and source.endswith(".weight")
        }
        plan = self._packable(model, ties)
        tied = _keep_ties_whole(plan, ties)
        if not plan.modules:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.skipped)
            raise ValueError(f"nothing to quantize in {type(model).__name__}: {reasons or 'it has no linear layers'}")
        for owner in dict.fromkeys(tied.values()):
            module = model.get_submodule(owner)
            plan.owners[owner] = _empty(module, self._layout(module, True), config.activation_precision)
        for name, owner in tied.items():
            del plan.modules[name]
            _replace(model, name, _tied(model.get_submodule(name), plan.owners[owner], config.activation_precision))
        _drop_ties(model, set(tied))
        # Some checkpoints store a shared weight twice.
        _ignore_dense_weights(model, set(tied))
        self._plan = plan
        self.skipped = plan.skipped
        for name, reason in plan.skipped:
            logger.info("%s stays as it is: %s", name, reason)

    def _packable(self, model: PreTrainedModel, ties: Mapping[str, str]) -> _Plan:
        """Every module that is worth packing for itself, and why the others are not."""
        from .quantization.quantize_model import matches_any

        config = self.quantization_config
        in_float32 = list(model._keep_in_fp32_modules or ())
        head = model.get_output_embeddings()
        plan = _Plan()
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            is_head = module is head or name.rpartition(".")[2] == "lm_head" or name in ties
            is_embedding_or_head = isinstance(module, nn.Embedding) or is_head
            if matches_any(name, config.modules_to_not_convert):
                reason: str | None = "named in modules_to_not_convert"
            elif matches_any(name, in_float32):
                reason = "the model keeps it in float32"
            elif type(module) not in (nn.Linear, nn.Embedding):
                reason = f"{type(module).__name__}: a subclass, whose forward may be another"
            elif is_embedding_or_head and not config.quantize_embeddings:
                reason = "an embedding or output head, and quantize_embeddings is off"
            elif isinstance(module, nn.Embedding) and module.max_norm is not None:
                reason = "max_norm is set: it rewrites the weight in every call"
            else:
                skip_reason = embedding_skip_reason if isinstance(module, nn.Embedding) else linear_skip_reason
                reason = skip_reason(*_weight_shape(module))
            if reason is None:
                plan.modules[name] = is_embedding_or_head
            else:
                plan.skipped.append((name, reason))
        return plan

    def _layout(self, module: nn.Module, is_embedding_or_head: bool) -> PackedLayout:
        """The layout that `quantize_weight` or `quantize_embedding_weight` will give the weight of a module."""
        preset = find_preset(self.quantization_config.preset or DEFAULT_PRESET)
        planes = preset.embedding_planes if is_embedding_or_head else preset.planes
        if is_embedding_or_head and preset.name == "historic":
            preset = find_preset(DEFAULT_PRESET)
        fraction = self.quantization_config.outlier_fraction
        out_features, in_features = _weight_shape(module)
        outliers = outlier_count(in_features, preset.outlier_fraction if fraction is None else fraction)
        column_scales = preset.column_scales and not is_embedding_or_head
        return PackedLayout(out_features, in_features, planes, outliers, column_scales, preset.means)

    # ---- while loading ----------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self)

    def pack_loaded_weight(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
        """Packs the dense weight of module `name`, which has just been read, and puts the packed module in its place.

        A weight that cannot be packed is remembered and raised after loading: the loader turns every exception of this
        call into a row of a table, and its own error says only that there is one.
        """
        from .packed_linear import PackedEmbedding, PackedLinear
        from .quantization.quantize_weight import quantize_embedding_weight, quantize_weight

        if self._failure is not None:
            return
        config = self.quantization_config
        quantize = quantize_embedding_weight if self._plan.modules[name] else quantize_weight
        try:
            packed_weight = quantize(weight, config.preset or DEFAULT_PRESET, outlier_fraction=config.outlier_fraction)
        except ValueError as error:
            self._failure = ValueError(f"{name}: {error}")
            self._failure.__cause__ = error
            return
        module = model.get_submodule(name)
        packed: PackedLinear | PackedEmbedding
        if name in self._plan.owners:
            # Filled, not made: others refer to this module.
            packed = self._plan.owners[name]
            for tensor_name, tensor in packed_weight.tensors().items():
                setattr(packed, tensor_name, tensor)
            if isinstance(packed, PackedLinear) and isinstance(module, nn.Linear):
                packed.bias = module.bias
        elif isinstance(module, nn.Linear):
            packed = PackedLinear.from_packed_weight(
                packed_weight, module.bias, activation_precision=config.activation_precision
            )
        else:
            assert isinstance(module, nn.Embedding)
            packed = PackedEmbedding.from_packed_weight(packed_weight, module.padding_idx, dtype=module.weight.dtype)
        _replace(model, name, packed)

    # ---- after loading ----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from .huge_pages import move_to_huge_pages
        from .linear_groups import group_linears

        if self._failure is not None:
            raise self._failure
        if "disk" in set((getattr(model, "hf_device_map", None) or {}).values()):
            raise ValueError("device_map: a packed model cannot be offloaded to disk; load it with device_map='cpu'")
        packed_modules = dict(_packed_modules(model))
        for module in packed_modules.values():
            module.__dict__.pop("weight", None)  # see _replace
        group_linears(model)
        if not self.pre_quantized:
            left = [name for name in self._plan.modules if name not in packed_modules]
            if left:
                raise ValueError(f"the checkpoint lacks {left[0]}.weight ({len(left)} weights missing in all)")
            for name, module in packed_modules.items():
                _check_loaded(name, module)
            _describe(model, self.quantization_config)
            self._plan = _Plan()
            move_to_huge_pages(model)
            return
        missing = [name for name, tensor in _state(model) if not getattr(tensor, "_is_hf_initialized", False)]
        packed_prefixes = tuple(f"{name}." for name in packed_modules)
        same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        # A new head on a packed base model is the user's business; Transformers reports that it is untrained.
        fatal = missing if same_class else [name for name in missing if name.startswith(packed_prefixes)]
        if fatal:
            raise ValueError(
                f"the packed checkpoint lacks {fatal[0]} ({len(fatal)} tensors missing in all); it is incomplete or "
                "config.json belongs to another checkpoint"
            )
        for name, module in packed_modules.items():
            _check_loaded(name, module)
        # The last: what the loader has marked as loaded are the tensors of the checkpoint.
        move_to_huge_pages(model)

    # ---- saving and properties --------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        _describe(model, self.quantization_config)
        state = dict(model.state_dict())
        assert self.quantization_config.modules is not None
        name, tensor = guard_tensor(next(iter(self.quantization_config.modules)))
        state[name] = tensor
        return state, {"quant_method": QUANT_METHOD, "format_version": str(FORMAT_VERSION)}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from .linear_groups import ungroup_linears
        from .packed_linear import PackedLinear

        ungroup_linears(model)
        dense: dict[int, nn.Parameter] = {}
        for name, module in list(_packed_modules(model)):
            packed_weight = module.packed_weight
            key = packed_weight.signs.data_ptr()
            if key not in dense:
                dense[key] = nn.Parameter(packed_weight.dequantize(dtype or model.dtype))
            weight = dense[key]
            replacement: nn.Module
            if isinstance(module, PackedLinear):
                replacement = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                replacement.register_parameter("bias", module.bias)
            else:
                replacement = nn.Embedding(
                    module.num_embeddings, module.embedding_dim, module.padding_idx, _weight=weight.data
                )
            replacement.weight = weight
            _set_module(model, name, replacement)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top: gradients pass through packed layers to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _QuantizeOnLoad(ConversionOps):
    """Takes one dense weight from the loader, puts the packed module into the model and gives nothing back."""

    def __init__(self, quantizer: LoopSingularBitQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        self.quantizer.pack_loaded_weight(model, full_layer_name.removesuffix(".weight"), weight)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def register() -> None:
    """Makes Transformers know the method; calling it again is harmless."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(LoopSingularBitConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(LoopSingularBitQuantizer)
    # Configurations that may change a packed checkpoint's own one on loading, in what they call loading attributes.
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    if LoopSingularBitConfig not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, LoopSingularBitConfig)


def attach_quantizer(model: PreTrainedModel, preset: str, modules_to_not_convert: Sequence[str] = ()) -> None:
    """Lets `save_pretrained` write a model whose modules were packed in memory as a packed checkpoint."""
    config = LoopSingularBitConfig(preset=preset, modules_to_not_convert=modules_to_not_convert)
    _describe(model, config)
    _drop_ties(model, {name for name, _ in _packed_modules(model)})
    quantizer = LoopSingularBitQuantizer(config, pre_quantized=True)
    for attribute, value in (
        ("hf_quantizer", quantizer),
        ("is_quantized", True),
        ("quantization_method", QUANT_METHOD),
    ):
        setattr(model, attribute, value)
    model.config.quantization_config = quantizer.quantization_config


def guard_tensor(module_name: str) -> tuple[str, torch.Tensor]:
    """Name and value of the empty tensor that stops readers which do not know the format.

    Its name is that of a dense weight which the model has; a reader that ignores `quantization_config` finds that the
    shapes differ and fails, instead of initializing every packed weight at random.
    """
    return f"{module_name}.weight", torch.empty(0, dtype=torch.int8)


def _describe(model: PreTrainedModel, config: LoopSingularBitConfig) -> None:
    """Writes the layouts of the packed modules that the model has now into its configuration."""
    from .packed_linear import PackedLinear

    packed_modules = dict(_packed_modules(model))
    names = {id(module): name for name, module in packed_modules.items()}
    modules: dict[str, dict[str, Any]] = {}
    tied_modules = {}
    for name, module in packed_modules.items():
        if module.weight_owner is not None:
            tied_modules[name] = names[id(module.weight_owner)]
        else:
            kind = "linear" if isinstance(module, PackedLinear) else "embedding"
            modules[name] = {"kind": kind, **module.packed_weight.layout.to_dict()}
    if not modules:
        raise ValueError(f"{type(model).__name__} has no packed modules; there is nothing to save as packed")
    config.modules = modules
    config.tied_modules = tied_modules


def _packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedEmbedding]]:
    from .packed_linear import PackedEmbedding, PackedLinear

    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            yield name, module


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers themselves; a state dict holds detached copies, without the loader's marks."""
    yield from model.state_dict(keep_vars=True).items()


def _check_loaded(name: str, module: PackedLinear | PackedEmbedding) -> None:
    if any(tensor.is_meta for tensor in module.buffers(recurse=False)):
        raise ValueError(f"{name}: the packed tensors were not loaded")
    try:
        module.packed_weight.validate()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _checked_layout(where: str, entry: Mapping[str, Any], module: nn.Module, *, any_kind: bool = False) -> PackedLayout:
    """The layout of a checkpoint's entry, after making sure that it is one of the module it names, or is to be used by.

    Args:
        any_kind: a linear may use the weight of an embedding, and the other way round.
    """
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise ValueError(f"{where}: expected an nn.Linear or nn.Embedding in the model, got {type(module).__name__}")
    stored_kind = entry.get("kind")
    kind = "linear" if isinstance(module, nn.Linear) else "embedding"
    out_features, in_features = _weight_shape(module)
    try:
        layout = PackedLayout.from_dict(entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    is_same_kind = any_kind or stored_kind == kind
    if not is_same_kind or (layout.out_features, layout.in_features) != (out_features, in_features):
        raise ValueError(
            f"{where}: the model has a {kind} {out_features} x {in_features} there, the checkpoint a {stored_kind} "
            f"{layout.out_features} x {layout.in_features}"
        )
    return layout


def _module_names(model: PreTrainedModel, stored_names: Sequence[str]) -> dict[str, str]:
    """Name in the checkpoint -> name in the model, as Transformers maps the tensors: with its renamings for old
    checkpoints, and with or without the prefix of the base model. Names that the model lacks are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    names = {}
    for stored_name in stored_names:
        renamed = apply_renamings(f"{stored_name}.weight", renamings).removesuffix(".weight")
        for name in (stored_name, renamed, renamed.removeprefix(prefix), prefix + renamed):
            if name in present:
                names[stored_name] = name
                break
    return names


def _drop_ties(model: PreTrainedModel, packed: set[str]) -> None:
    """Makes Transformers forget the ties of weights that are now packed (they are tied as packed modules)."""
    from transformers import PreTrainedModel

    ties = dict(model.all_tied_weights_keys)
    weights = {f"{name}.weight" for name in packed}
    kept = {target: source for target, source in ties.items() if not {target, source} & weights}
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            start = f"{prefix}." if prefix else ""
            own = {
                target.removeprefix(start): source.removeprefix(start)
                for target, source in kept.items()
                if target.startswith(start) and source.startswith(start)
            }
            module.all_tied_weights_keys = own
            if module._tied_weights_keys is not None and len(kept) < len(ties):
                module._tied_weights_keys = own


def _ignore_dense_weights(model: PreTrainedModel, names: set[str]) -> None:
    """Keeps Transformers from reporting dense weights of packed modules, such as the guard, as unexpected."""
    pattern = "|".join(re.escape(name) for name in sorted(names))
    ignored = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *([rf"(^|\.)({pattern})\.weight$"] if names else [])}


def _refuse_fused_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name.lower():
            raise ValueError(
                f"{name}: {list(parameter.shape)} is a fused weight of experts; only models whose weights are "
                "nn.Linear and nn.Embedding can be quantized while loading"
            )


def _keep_ties_whole(plan: _Plan, ties: Mapping[str, str]) -> dict[str, str]:
    """Takes modules that share a weight with one that stays dense out of the plan; the ties that are left in it.

    Packing some of them would keep the dense weight of the others: more memory, not less.
    """
    for owner in dict.fromkeys(ties.values()):
        group = [owner, *(name for name, source in ties.items() if source == owner)]
        dense = [name for name in group if name not in plan.modules]
        if dense:
            for name in group:
                if plan.modules.pop(name, None) is not None:
                    plan.skipped.append((name, f"shares its weight with {dense[0]}, which stays as it is"))
    return {name: owner for name, owner in ties.items() if name in plan.modules}


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module, nn.Embedding)
    return module.num_embeddings, module.embedding_dim


def _empty(module: nn.Module, layout: PackedLayout, activation_precision: str) -> PackedLinear | PackedEmbedding:
    """An empty packed module on meta in place of a dense one."""
    from .packed_linear import PackedEmbedding, PackedLinear

    if isinstance(module, nn.Linear):
        dtype = None if module.bias is None else module.bias.dtype
        has_bias = module.bias is not None
        return PackedLinear.empty(layout, has_bias, "meta", dtype, activation_precision=activation_precision)
    assert isinstance(module, nn.Embedding)
    return PackedEmbedding.empty(layout, module.padding_idx, "meta", module.weight.dtype)


def _tied(
    module: nn.Module, owner: PackedLinear | PackedEmbedding, activation_precision: str
) -> PackedLinear | PackedEmbedding:
    """A packed module without a weight of its own in place of a dense one."""
    from .packed_linear import PackedEmbedding, PackedLinear

    if isinstance(module, nn.Linear):
        return PackedLinear.tied_to(owner, module.bias, activation_precision=activation_precision)
    assert isinstance(module, nn.Embedding)
    return PackedEmbedding.tied_to(owner, module.padding_idx, dtype=module.weight.dtype)


def _replace(model: nn.Module, name: str, replacement: PackedLinear | PackedEmbedding) -> None:
    """Puts a packed module into a model that Transformers is loading."""
    # Transformers initializes what it was not told is initialized. Packed modules have nothing to initialize, but the
    # code of their parents may reach for their weight in order to do it: it gets one of the right shape,
    # without memory.
    layout = replacement.packed_weight.layout
    stand_in = torch.empty(layout.out_features, layout.in_features, device="meta")
    loaded = [buffer for buffer in replacement.buffers(recurse=False) if not buffer.is_meta]
    for initialized in (replacement, stand_in, *loaded):
        initialized._is_hf_initialized = True  # type: ignore[union-attr]
    replacement.__dict__["weight"] = stand_in
    _set_module(model, name, replacement)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, child_name = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child_name, module.train(model.training))


register()
