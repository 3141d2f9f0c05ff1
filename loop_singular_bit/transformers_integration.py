"""Packed weights in Transformers: loading packed checkpoints, quantizing while loading, saving. The only file that
imports Transformers' quantizer classes.

Importing this module registers both classes below; `import loop_singular_bit` is enough, see transformers_registration.
Without it Transformers does not know the method, warns, and would run with random weights; so that it fails instead, a
packed checkpoint holds one empty tensor under the name of a dense weight, whose shape can match no model (see
`guard_tensor`).
"""

from __future__ import annotations

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
        activation_precision: of the packed linears, "int8", "int16" or "exact": see `ops.packed_linear`.
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
    """What is to be packed while a dense checkpoint is loaded; names of modules."""

    linears: dict[str, int] = field(default_factory=dict)
    """Linear -> planes."""
    embeddings: dict[str, PackedEmbedding] = field(default_factory=dict)
    """Embedding -> the empty module its tied heads refer to already."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Left alone, with the reason."""


class LoopSingularBitQuantizer(HfQuantizer):
    """What Transformers calls while it loads and saves packed models.

    Attributes:
        skipped: after quantizing while loading: name and reason of every module that was left as it was.
    """

    requires_calibration = False

    quantization_config: LoopSingularBitConfig

    def __init__(self, quantization_config: LoopSingularBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
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
        return kind == "weight" and (name in self._plan.linears or name in self._plan.embeddings)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        name = param_name.rpartition(".")[0]
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        if name in self._plan.embeddings:
            return self._plan.embeddings[name].packed_weight.bits_per_weight / 8
        return self._linear_layout(model.get_submodule(name), self._plan.linears[name]).bits_per_weight / 8

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Meta tensors are made here; what the model's own code would call to fill them must not run on them.
        if self.pre_quantized:
            self._install_packed_modules(model)
        else:
            self._plan_quantization(model)

    def _install_packed_modules(self, model: PreTrainedModel) -> None:
        """Replaces every module that the checkpoint holds packed by an empty packed one."""
        from .packed_linear import PackedEmbedding, PackedLinear

        config = self.quantization_config
        assert config.modules is not None
        names = _module_names(model, [*config.modules, *config.tied_modules])
        ties = dict(model.all_tied_weights_keys)
        replaced: dict[str, PackedLinear | PackedEmbedding] = {}
        for stored_name, entry in config.modules.items():
            name = names.get(stored_name)
            if name is None:
                continue  # The head of a checkpoint that is loaded without it; Transformers reports its tensors.
            where = f"config.json: quantization_config.modules[{stored_name!r}]"
            module = model.get_submodule(name)
            layout = _checked_layout(where, entry, module)
            if isinstance(module, nn.Linear):
                replaced[name] = PackedLinear.empty(
                    layout,
                    bias=module.bias is not None,
                    device="meta",
                    dtype=model.dtype if module.bias is None else module.bias.dtype,
                    activation_precision=config.activation_precision,
                )
            else:
                assert isinstance(module, nn.Embedding)
                replaced[name] = PackedEmbedding.empty(layout, module.padding_idx, "meta", module.weight.dtype)
        if not replaced:
            raise ValueError(
                f"config.json: none of the {len(config.modules)} packed modules of the checkpoint is in "
                f"{type(model).__name__}; the first is {next(iter(config.modules), None)!r}"
            )
        for stored_name, stored_owner in config.tied_modules.items():
            name, owner = names.get(stored_name), names.get(stored_owner)
            if name is None:
                continue
            embedding = None if owner is None else replaced.get(owner)
            module = model.get_submodule(name)
            if not isinstance(embedding, PackedEmbedding) or not isinstance(module, nn.Linear):
                raise ValueError(
                    f"config.json: quantization_config.tied_modules[{stored_name!r}]: expected a linear tied to a "
                    f"packed embedding, got {stored_owner!r}"
                )
            replaced[name] = PackedLinear.tied_to(
                embedding, module.bias, activation_precision=config.activation_precision
            )
        for name, packed in replaced.items():
            _replace(model, name, packed)
        _drop_ties(model, ties, set(replaced))
        guards = "|".join(re.escape(name) for name in {*config.modules, *replaced})
        ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), rf"(^|\.)({guards})\.weight$"}

    def _plan_quantization(self, model: PreTrainedModel) -> None:
        """Decides what to pack; each dense module is replaced when its weight arrives."""
        from .packed_linear import PackedEmbedding, PackedLinear
        from .quantization.quantize_model import matches_any

        config = self.quantization_config
        preset = find_preset(config.preset or DEFAULT_PRESET)
        check_calibration(preset, force=config.force, stacklevel=6)
        skip_patterns = [*config.modules_to_not_convert, *(model._keep_in_fp32_modules or ())]
        head = model.get_output_embeddings()
        ties = dict(model.all_tied_weights_keys)
        tied_to = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in ties.items()}
        heads = {name for name, module in model.named_modules() if module is head or name.split(".")[-1] == "lm_head"}
        plan = _Plan()
        for name, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and "expert" in f"{name}.{parameter_name}".lower():
                    raise ValueError(
                        f"{name}.{parameter_name}: {list(parameter.shape)} is a fused weight of experts; only models "
                        "whose weights are nn.Linear and nn.Embedding can be quantized while loading"
                    )
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            is_word_level = isinstance(module, nn.Embedding) or name in heads or name in tied_to
            if matches_any(name, skip_patterns):
                reason: str | None = "named in modules_to_not_convert, or kept in float32 by the model"
            elif type(module) not in (nn.Linear, nn.Embedding):
                reason = f"{type(module).__name__}: a subclass, whose forward may be another"
            elif is_word_level and not config.quantize_embeddings:
                reason = "an embedding or output head, and quantize_embeddings is off"
            elif isinstance(module, nn.Embedding):
                reason = embedding_skip_reason(module.num_embeddings, module.embedding_dim)
                if module.max_norm is not None:
                    reason = "max_norm is set: it rewrites the weight in every call"
            else:
                reason = linear_skip_reason(module.out_features, module.in_features)
            if reason is not None:
                plan.skipped.append((name, reason))
            elif isinstance(module, nn.Embedding):
                layout = self._layout(module.num_embeddings, module.embedding_dim, preset.embedding_planes)
                plan.embeddings[name] = PackedEmbedding.empty(layout, module.padding_idx, "meta", module.weight.dtype)
            else:
                plan.linears[name] = preset.embedding_planes if is_word_level else preset.planes
        tied_heads = {}
        for name, owner in tied_to.items():
            if name in plan.linears and owner in plan.embeddings:
                del plan.linears[name]
                tied_heads[name] = owner
            elif name in plan.linears or owner in plan.embeddings:
                # Packing one of the two would keep the other one's dense weight: more memory, not less.
                reason = f"shares its weight with {owner if name in plan.linears else name}, which stays as it is"
                plan.skipped.append((name if name in plan.linears else owner, reason))
                plan.linears.pop(name, None)
                plan.embeddings.pop(owner, None)
        if not plan.linears and not plan.embeddings:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.skipped)
            raise ValueError(f"nothing to quantize in {type(model).__name__}: {reasons or 'it has no linear layers'}")
        for name, owner in tied_heads.items():
            head_module = model.get_submodule(name)
            assert isinstance(head_module, nn.Linear)
            packed_head = PackedLinear.tied_to(
                plan.embeddings[owner], head_module.bias, activation_precision=config.activation_precision
            )
            _replace(model, name, packed_head)
        _drop_ties(model, ties, set(tied_heads))
        ignored = model._keys_to_ignore_on_load_unexpected
        duplicates = {rf"(^|\.){re.escape(name)}\.weight$" for name in tied_heads}
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *duplicates}
        self._plan = plan
        self.skipped = plan.skipped
        for name, reason in plan.skipped:
            logger.info("%s stays as it is: %s", name, reason)

    def _layout(self, out_features: int, in_features: int, planes: int) -> PackedLayout:
        preset = find_preset(self.quantization_config.preset or DEFAULT_PRESET)
        fraction = self.quantization_config.outlier_fraction
        outliers = outlier_count(in_features, preset.outlier_fraction if fraction is None else fraction)
        # Embeddings and heads of "historic" are packed as those of the default preset: see quantize_embedding_weight.
        like = find_preset(DEFAULT_PRESET) if preset.name == "historic" and planes > 1 else preset
        if like is not preset and fraction is None:
            outliers = outlier_count(in_features, like.outlier_fraction)
        return PackedLayout(out_features, in_features, planes, outliers, like.column_scales, like.means)

    def _linear_layout(self, module: nn.Module, planes: int) -> PackedLayout:
        assert isinstance(module, nn.Linear)
        return self._layout(module.out_features, module.in_features, planes)

    # ---- while loading ----------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self)

    def pack_loaded_weight(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
        """Packs the dense weight of module `name`, which has just been read, and puts the packed module in its place.

        A weight that cannot be packed is remembered and raised after loading: the loader turns every exception of this
        call into a row of a table, and its own error says only that there is one.
        """
        from .packed_linear import PackedLinear
        from .quantization.quantize_weight import quantize_embedding_weight, quantize_weight

        if self._failure is not None:
            return
        config = self.quantization_config
        preset = find_preset(config.preset or DEFAULT_PRESET)
        planes = self._plan.linears.get(name)
        quantize = quantize_weight if planes == preset.planes else quantize_embedding_weight
        try:
            packed_weight = quantize(weight, preset, outlier_fraction=config.outlier_fraction)
        except ValueError as error:
            self._failure = ValueError(f"{name}: {error}")
            self._failure.__cause__ = error
            return
        packed: PackedLinear | PackedEmbedding
        if planes is not None:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            packed = PackedLinear.from_packed_weight(
                packed_weight, linear.bias, activation_precision=config.activation_precision
            )
        else:
            # Filled, not made: tied heads refer to this module.
            packed = self._plan.embeddings[name]
            for tensor_name, tensor in packed_weight.tensors().items():
                setattr(packed, tensor_name, tensor)
        for buffer in packed.buffers():
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
        _replace(model, name, packed)

    # ---- after loading ----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self._failure is not None:
            raise self._failure
        if "disk" in set((getattr(model, "hf_device_map", None) or {}).values()):
            raise ValueError("device_map: a packed model cannot be offloaded to disk; load it with device_map='cpu'")
        packed_modules = dict(_packed_modules(model))
        if not self.pre_quantized:
            left = [name for name in [*self._plan.linears, *self._plan.embeddings] if name not in packed_modules]
            if left:
                raise ValueError(f"the checkpoint lacks {left[0]}.weight ({len(left)} weights missing in all)")
            for name, module in packed_modules.items():
                _check_loaded(name, module)
            _describe(model, self.quantization_config)
            self._plan = _Plan()
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

    # ---- saving and properties --------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        _describe(model, self.quantization_config)
        state = dict(model.state_dict())
        assert self.quantization_config.modules is not None
        name, tensor = guard_tensor(next(iter(self.quantization_config.modules)))
        state[name] = tensor
        return state, {"quant_method": QUANT_METHOD, "format_version": str(FORMAT_VERSION)}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from .packed_linear import PackedLinear

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
            _replace(model, name, replacement)
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


def attach_quantizer(model: PreTrainedModel, preset: str, modules_to_not_convert: Sequence[str] = ()) -> None:
    """Lets `save_pretrained` write a model whose modules were packed in memory as a packed checkpoint."""
    config = LoopSingularBitConfig(preset=preset, modules_to_not_convert=modules_to_not_convert)
    _describe(model, config)
    _drop_ties(model, dict(model.all_tied_weights_keys), {name for name, _ in _packed_modules(model)})
    for attribute, value in (
        ("hf_quantizer", LoopSingularBitQuantizer(config, pre_quantized=True)),
        ("is_quantized", True),
        ("quantization_method", QUANT_METHOD),
    ):
        setattr(model, attribute, value)
    model.config.quantization_config = config


def guard_tensor(module_name: str) -> tuple[str, torch.Tensor]:
    """Name and value of the empty tensor that stops readers which do not know the format.

    Its name is that of a dense weight which the model has; a reader that ignores `quantization_config` finds that the
    shapes differ and fails, instead of initializing every packed weight at random.
    """
    return f"{module_name}.weight", torch.empty(0, dtype=torch.int8)


def _describe(model: PreTrainedModel, config: LoopSingularBitConfig) -> None:
    """Writes the layouts of the packed modules that the model has now into its configuration."""
    from .packed_linear import PackedLinear

    owners: dict[int, str] = {}
    modules: dict[str, Mapping[str, Any]] = {}
    tied_modules = {}
    for name, module in _packed_modules(model):
        key = module.packed_weight.signs.data_ptr()
        if key in owners:
            tied_modules[name] = owners[key]
            continue
        owners[key] = name
        kind = "linear" if isinstance(module, PackedLinear) else "embedding"
        modules[name] = {"kind": kind, **module.packed_weight.layout.to_dict()}
    if not modules:
        raise ValueError(f"{type(model).__name__} has no packed modules; there is nothing to save as packed")
    config.modules = {name: dict(entry) for name, entry in modules.items()}
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


def _checked_layout(where: str, entry: Mapping[str, Any], module: nn.Module) -> PackedLayout:
    """The layout of a checkpoint's entry, after making sure that it is one of the module it names."""
    kind = entry.get("kind")
    if isinstance(module, nn.Linear):
        expected = ("linear", module.out_features, module.in_features)
    elif isinstance(module, nn.Embedding):
        expected = ("embedding", module.num_embeddings, module.embedding_dim)
    else:
        raise ValueError(f"{where}: expected an nn.Linear or nn.Embedding in the model, got {type(module).__name__}")
    try:
        layout = PackedLayout.from_dict(entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if (kind, layout.out_features, layout.in_features) != expected:
        raise ValueError(
            f"{where}: the model has a {expected[0]} {expected[1]} x {expected[2]} there, the checkpoint a {kind} "
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


def _drop_ties(model: PreTrainedModel, ties: Mapping[str, str], replaced: set[str]) -> None:
    """Makes Transformers forget the ties of weights that are now packed (they are tied in the packed modules)."""
    from transformers import PreTrainedModel

    kept = {
        target: source
        for target, source in ties.items()
        if not (target.endswith(".weight") and target.removesuffix(".weight") in replaced)
        and not (source.endswith(".weight") and source.removesuffix(".weight") in replaced)
    }
    model.all_tied_weights_keys = dict(kept)
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            start = f"{prefix}." if prefix else ""
            own = {
                target.removeprefix(start): source.removeprefix(start)
                for target, source in kept.items()
                if target.startswith(start) and source.startswith(start)
            }
            if module._tied_weights_keys is not None and set(ties) - set(kept):
                module._tied_weights_keys = own
            module.all_tied_weights_keys = own


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent_name, _, child_name = name.rpartition(".")
    # Transformers initializes what it was not told is initialized; packed modules have nothing to initialize.
    replacement._is_hf_initialized = True  # type: ignore[assignment]
    replacement.train(model.training)
    setattr(model.get_submodule(parent_name), child_name, replacement)


register()
