"""Which tensors of a checkpoint are packed, in which order they are stored, and how many bytes each takes.

Decided by names, shapes and config.json alone, before any weight is read: no module is built. Everything that follows,
the headers of the shards included, is a function of the plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import QUANT_METHOD
from .checkpoint_directory import SINGLE_FILE, CheckpointDirectory
from .errors import CheckpointError
from .packed_weight import PackedLayout
from .quantization.eligibility import embedding_skip_reason, linear_skip_reason
from .quantization.presets import DEFAULT_PRESET, PRESETS, Preset, outlier_count
from .quantization.quantize_model import matches_any
from .safetensors_stream import TensorEntry, dtype_name, safetensors_header

PACKABLE_DTYPES = ("BF16", "F16", "F32")

# Linears stored as [in_features, out_features] under the name `weight`.
_CONV1D_MODEL_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
# Their embedding modules multiply what they look up: packed ones would not.
_SCALED_EMBEDDING_MODEL_TYPES = {
    *("bart", "mbart", "plbart", "m2m_100", "nllb-moe", "blenderbot", "blenderbot-small", "pegasus_x"),
    *("bigbird_pegasus", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "xglm"),
}
# Modules that Transformers wants in float32 (`_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` of the models'
# classes), of those that hold 2-D weights.
FLOAT32_MODULES = {
    **dict.fromkeys(("t5", "mt5", "umt5", "pop2piano", "udop"), ("wo",)),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2", "mistral_large4"), ("indexer.weights_proj",)),
    "blip-2": ("qformer",),
    "hy_v4": ("weights_proj", "lm_head"),
    "longcat_flash": ("classifier",),
    "nemotron3_5_transcribe": ("audio_tower", "multi_modal_projector"),
    "deepseek_v4": (
        "self_attn.compressor.kv_proj",
        "self_attn.compressor.gate_proj",
        "self_attn.compressor.indexer.kv_proj",
        "self_attn.compressor.indexer.gate_proj",
        "self_attn.compressor.indexer.scorer.weights_proj",
    ),
}
# Every decoder layer has the same tensors: one that lacks some is damaged, and not of another kind.
_UNIFORM_MODEL_TYPES = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "olmo", "olmo2"),
    *("stablelm", "starcoder2", "bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "gpt_neox"),
}
_HEADS_BY_MODEL_TYPE = {
    "gpt_neox": "embed_out",
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "distilbert": "vocab_projector",
}
_HEAD_NAMES = {"lm_head", *_HEADS_BY_MODEL_TYPE.values()}
_HEAD_ARCHITECTURES = re.compile(r"For(CausalLM|MaskedLM|PreTraining|ConditionalGeneration)$|LMHeadModel$")

_TOKEN_EMBEDDINGS = {"embed_tokens", "word_embeddings", "tok_embeddings", "wte", "embed_in", "shared"}
_LAYER = re.compile(r"^(?:(?P<stack>.*?)\.)?(?:layers?|h|blocks?)\.(?P<number>\d+)\.(?P<rest>.+)$")
_ORDER_IN_LAYER = (
    *("q_proj", "query", "q_lin", "k_proj", "key", "k_lin", "v_proj", "value", "v_lin"),
    *("qkv_proj", "query_key_value", "Wqkv", "qkv"),
    *("o_proj", "out_proj", "out_lin", "attention.output.dense", "attention.dense", "attn.Wo"),
    *("gate_proj", "up_proj", "gate_up_proj", "intermediate.dense", "fc1", "lin1", "dense_h_to_4h", "mlp.Wi"),
    *("down_proj", "output.dense", "fc2", "lin2", "dense_4h_to_h", "mlp.Wo"),
)
_STAGE_EMBEDDING, _STAGE_LAYERS, _STAGE_FINAL, _STAGE_HEAD = range(4)


@dataclass(frozen=True)
class PackedModule:
    """A linear or an embedding whose weight is packed.

    Attributes:
        kind: "linear" or "embedding".
        source: the dense weight in the source checkpoint.
    """

    name: str
    kind: str
    source: TensorEntry
    layout: PackedLayout
    is_embedding_or_head: bool

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def stored_tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, safetensors dtype, shape) in the order of the file: 32 bits first, then 16, then 8."""
        tensors = sorted(self.layout.tensors().items(), key=lambda item: -item[1][0].itemsize)
        return [(f"{self.name}.{part}", dtype_name(dtype), shape) for part, (dtype, shape) in tensors]

    def to_config(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.layout.to_dict()}


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is stored as it is.

    Attributes:
        reason: why a 2-D weight is not packed; None for what never is, such as norms and biases.
    """

    source: TensorEntry
    reason: str | None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def stored_tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(self.source.name, self.source.dtype, self.source.shape)]


Unit = PackedModule | KeptTensor


@dataclass(frozen=True)
class Shard:
    """A file of the packed checkpoint.

    Attributes:
        guard: name of an empty tensor at its end, or None. It has the name of a dense weight that the model expects:
            readers that do not know the format fail on its shape, instead of running with random weights.
    """

    file_name: str
    units: tuple[Unit, ...]
    guard: str | None = None

    def stored_tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        tensors = [tensor for unit in self.units for tensor in unit.stored_tensors()]
        return tensors if self.guard is None else [*tensors, (self.guard, "I8", (0,))]

    @property
    def file_bytes(self) -> int:
        return len(safetensors_header(self.stored_tensors(), SHARD_METADATA)) + sum(unit.nbytes for unit in self.units)


SHARD_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class CompressionPlan:
    """What a packed checkpoint will hold, down to the byte.

    Attributes:
        tied_modules: heads that have no weight of their own, and the embedding whose they use.
        dropped: tensors of the source that are not stored, and why.
    """

    preset: Preset
    outlier_fraction: float | None
    shards: tuple[Shard, ...]
    tied_modules: dict[str, str]
    dropped: dict[str, str]

    @property
    def units(self) -> list[Unit]:
        return [unit for shard in self.shards for unit in shard.units]

    @property
    def packed_modules(self) -> list[PackedModule]:
        return [unit for unit in self.units if isinstance(unit, PackedModule)]

    @property
    def kept_weights(self) -> dict[str, str]:
        """Modules whose 2-D weight stays as it is, and why."""
        return {
            unit.name.removesuffix(".weight"): unit.reason
            for unit in self.units
            if isinstance(unit, KeptTensor) and unit.reason is not None
        }

    @property
    def output_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """As it stands in config.json of the packed checkpoint."""
        from .packed_weight import FORMAT_VERSION

        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "preset": self.preset.name,
            "options": dict(options),
            "modules": {module.name: module.to_config() for module in self.packed_modules},
            "tied_modules": self.tied_modules,
            "modules_to_not_convert": list(self.kept_weights),
        }


def plan_compression(
    source: CheckpointDirectory,
    preset: Preset,
    *,
    outlier_fraction: float | None = None,
    skip_modules: Sequence[str] = (),
    quantize_embeddings: bool = True,
    max_layers: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    layouts: Mapping[str, tuple[int, int]] | None = None,
) -> CompressionPlan:
    """Sorts the tensors of a checkpoint into packed and kept ones, in execution order, and cuts them into shards.

    Args:
        outlier_fraction: outliers of a row over its columns; None means the preset's.
        skip_modules: as in `QuantizationConfig`.
        quantize_embeddings: also pack token embeddings and output heads.
        max_layers: keep decoder layers from this number on as they are; None packs all.
        max_shard_bytes: a shard ends before the module that would make it larger.
        layouts: planes and outliers per row of modules that do not get the preset's.

    Raises:
        CheckpointError: the checkpoint is quantized already, lacks a tensor, has weights of an unsupported dtype, or
            nothing in it can be packed.
    """
    if max_layers is not None and max_layers < 0:
        raise ValueError(f"max_layers: expected 0 or more, got {max_layers}")
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    config = source.config
    _check_supported(source, config)
    _check_layers_complete(source, config)
    tied, dropped = _tied_heads(source, config)
    rules = _Rules(
        source, preset, outlier_fraction, tuple(skip_modules), quantize_embeddings, max_layers, dict(layouts or {})
    )
    units = [rules.unit(name) for name in source.tensor_names if name not in dropped]
    units.sort(key=_execution_order)
    if not any(isinstance(unit, PackedModule) for unit in units):
        reasons = {unit.reason for unit in units if isinstance(unit, KeptTensor) and unit.reason}
        raise CheckpointError(
            f"{source.path}: nothing to pack: " + ("; ".join(sorted(reasons)) or "no tensor is a 2-D weight")
        )
    packed = {unit.name for unit in units if isinstance(unit, PackedModule)}
    return CompressionPlan(
        preset=preset,
        outlier_fraction=outlier_fraction,
        shards=_cut_into_shards(units, max_shard_bytes),
        tied_modules={head: embedding for head, embedding in tied.items() if embedding in packed},
        dropped=dropped,
    )


@dataclass(frozen=True)
class _Rules:
    """What becomes of each tensor."""

    source: CheckpointDirectory
    preset: Preset
    outlier_fraction: float | None
    skip_modules: tuple[str, ...]
    quantize_embeddings: bool
    max_layers: int | None
    layouts: dict[str, tuple[int, int]]

    def unit(self, tensor: str) -> Unit:
        entry = self.source.entry(tensor)
        if not tensor.endswith(".weight") or len(entry.shape) != 2 or 0 in entry.shape:
            fused = len(entry.shape) == 3 and ("expert" in tensor or tensor.endswith("_proj"))
            return KeptTensor(entry, "experts fused into 3-D: only 2-D weights are packed" if fused else None)
        module = tensor.removesuffix(".weight")
        kind, is_head = self._kind(module, entry)
        reason = self._reason_to_keep(module, kind, is_head, entry)
        if reason is not None:
            return KeptTensor(entry, reason)
        if entry.dtype not in PACKABLE_DTYPES:
            raise CheckpointError(
                f"{self.source.reader(tensor).path}: tensor {tensor}: expected dtype {', '.join(PACKABLE_DTYPES)}, "
                f"got {entry.dtype}"
            )
        special = kind == "embedding" or is_head
        return PackedModule(module, kind, entry, self._layout(module, entry, special), special)

    def _kind(self, module: str, entry: TensorEntry) -> tuple[str, bool]:
        leaf = module.rpartition(".")[2]
        if "embed" in leaf or leaf in _TOKEN_EMBEDDINGS | {"wpe"} or "relative_attention_bias" in leaf:
            # GPT-NeoX calls its output head embed_out.
            return ("linear", True) if module in _HEAD_NAMES else ("embedding", False)
        is_head = module in _HEAD_NAMES or (
            _LAYER.match(module) is None and entry.shape[0] == _text_config(self.source.config).get("vocab_size")
        )
        return "linear", is_head

    def _reason_to_keep(self, module: str, kind: str, is_head: bool, entry: TensorEntry) -> str | None:
        out_features, in_features = entry.shape
        if matches_any(module, self.skip_modules):
            return "asked for with skip_modules"
        if entry.dtype.startswith(("I", "U", "BOOL")):
            return f"dtype {entry.dtype}: not a floating-point weight"
        float32_modules = FLOAT32_MODULES.get(str(self.source.config.get("model_type")), ())
        if any(f".{part}." in f".{module}." for part in float32_modules):
            return "the model wants it in float32 (_keep_in_fp32_modules)"
        if (kind == "embedding" or is_head) and not self.quantize_embeddings:
            return "embeddings and output heads were asked to stay as they are"
        if kind == "embedding":
            if module.rpartition(".")[2] not in _TOKEN_EMBEDDINGS:
                return "an embedding, but not of tokens"
            if self.source.config.get("model_type") in _SCALED_EMBEDDING_MODEL_TYPES:
                return f"embeddings of {self.source.config['model_type']} multiply what they look up"
            return embedding_skip_reason(out_features, in_features)
        if match := _LAYER.match(module):
            if self.max_layers is not None and int(match["number"]) >= self.max_layers:
                return f"max_layers: only the first {self.max_layers} layers were asked for"
            if ".experts." in module:
                return "one of many experts: Transformers fuses them into 3-D tensors, only 2-D weights are packed"
            if module.rpartition(".")[2] in {"gate", "router", "shared_expert_gate"}:
                return "routes tokens to experts: small, and every error of it is a wrong expert"
        if "norm" in module.rpartition(".")[2].lower():
            return "a norm"
        return linear_skip_reason(out_features, in_features)

    def _layout(self, module: str, entry: TensorEntry, special: bool) -> PackedLayout:
        out_features, in_features = entry.shape
        # The old documents say nothing about embeddings and heads.
        preset = PRESETS[DEFAULT_PRESET] if special and self.preset.name == "historic" else self.preset
        fraction = preset.outlier_fraction if self.outlier_fraction is None else self.outlier_fraction
        planes = self.preset.embedding_planes if special else preset.planes
        outliers = outlier_count(in_features, fraction)
        if not special:
            planes, outliers = self.layouts.get(module, (planes, outliers))
        return PackedLayout(
            out_features=out_features,
            in_features=in_features,
            planes=planes,
            outliers=outliers,
            column_scales=preset.column_scales and not special,
            means=preset.means,
        )


def _check_supported(source: CheckpointDirectory, config: Mapping[str, Any]) -> None:
    if isinstance(quantization := config.get("quantization_config"), dict):
        raise CheckpointError(
            f"{source.path}: quantized already ({quantization.get('quant_method', 'unknown method')}); "
            "give the original checkpoint"
        )
    if (model_type := config.get("model_type")) in _CONV1D_MODEL_TYPES:
        raise CheckpointError(
            f"{source.path}: models of type {model_type} keep their linears transposed (Conv1D, [in_features, "
            "out_features]); these cannot be packed yet"
        )


def _check_layers_complete(source: CheckpointDirectory, config: Mapping[str, Any]) -> None:
    """A checkpoint that lacks tensors must not come out as a smaller one that looks complete."""
    layers: dict[int, set[str]] = {}
    for tensor in source.tensor_names:
        if match := _LAYER.match(tensor):
            layers.setdefault(int(match["number"]), set()).add(match["rest"])
    count = _text_config(config).get("num_hidden_layers")
    if not layers or not isinstance(count, int):
        return
    for number in range(count):
        if number not in layers:
            raise CheckpointError(
                f"{source.path}: the tensors of layer {number} are missing; config.json says there are {count} layers"
            )
    if config.get("model_type") not in _UNIFORM_MODEL_TYPES:
        return
    expected = set().union(*(layers[number] for number in range(count)))
    for number in range(count):
        if missing := sorted(rest for rest in expected - layers[number] if rest.endswith(("weight", "bias"))):
            prefix = next(tensor for tensor in source.tensor_names if _layer_number(tensor) == number)
            match = _LAYER.match(prefix)
            assert match is not None
            name = prefix.removesuffix(match["rest"]) + missing[0]
            raise CheckpointError(f"{source.path}: tensor {name} is missing; other layers have theirs")


def _tied_heads(source: CheckpointDirectory, config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Heads that use the token embedding's weight, and tensors that repeat it."""
    embeddings = [
        name.removesuffix(".weight")
        for name in source.tensor_names
        if name.endswith(".weight") and name.split(".")[-2] in _TOKEN_EMBEDDINGS and len(source.entry(name).shape) == 2
    ]
    architectures = config.get("architectures") or []
    if not embeddings or not any(_HEAD_ARCHITECTURES.search(str(name)) for name in architectures):
        return {}, {}
    head = _HEADS_BY_MODEL_TYPE.get(str(config.get("model_type")), "lm_head")
    tie = config.get("tie_word_embeddings", _text_config(config).get("tie_word_embeddings"))
    stored = f"{head}.weight" in source
    if not stored and tie is False:
        raise CheckpointError(
            f"{source.path}: tensor {head}.weight is missing; config.json says it is not tied to the embedding"
        )
    if stored and tie is not True:
        return {}, {}
    dropped = {f"{head}.weight": f"tied to {embeddings[0]}"} if stored else {}
    return {head: embeddings[0]}, dropped


def _execution_order(unit: Unit) -> tuple[Any, ...]:
    name = unit.name if isinstance(unit, PackedModule) else unit.name.rpartition(".")[0]
    is_bias = isinstance(unit, KeptTensor) and unit.name.endswith("bias")
    match = _LAYER.match(unit.name)
    if match is None:
        return (_stage(unit, name), 0, "", 0, 0, name, is_bias, unit.name)
    stack = match["stack"] or ""
    rest = name[match.start("rest") :]
    layer = (_STAGE_LAYERS, _stack_order(stack), stack, int(match["number"]))
    return (*layer, _order_in_layer(rest), name, is_bias, unit.name)


def _stage(unit: Unit, module: str) -> int:
    is_packed_head = isinstance(unit, PackedModule) and unit.kind == "linear" and unit.is_embedding_or_head
    if module in _HEAD_NAMES or is_packed_head:
        return _STAGE_HEAD
    if "embed" in module or set(module.split(".")) & {"wte", "wpe", "shared"}:
        return _STAGE_EMBEDDING
    if set(module.split(".")) & {"pooler", "classifier", "score", "cls", "lm_head", "qa_outputs"}:
        return _STAGE_HEAD
    return _STAGE_FINAL


def _stack_order(stack: str) -> int:
    if "vision" in stack or "visual" in stack or "audio" in stack:
        return 0
    return 1 if "encoder" in stack else 2


def _order_in_layer(rest: str) -> int:
    for position, suffix in enumerate(_ORDER_IN_LAYER):
        if rest == suffix or rest.endswith(f".{suffix}"):
            return position
    return len(_ORDER_IN_LAYER) + ("norm" in rest.lower())


def _layer_number(tensor: str) -> int | None:
    match = _LAYER.match(tensor)
    return int(match["number"]) if match else None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where multimodal configurations keep the language model's."""
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" not in config else config


def _cut_into_shards(units: Sequence[Unit], max_shard_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[Unit]] = [[]]
    group_bytes = 0
    for unit in units:
        if groups[-1] and group_bytes + unit.nbytes > max_shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(unit)
        group_bytes += unit.nbytes
    guard = f"{next(unit.name for unit in units if isinstance(unit, PackedModule))}.weight"
    if len(groups) == 1:
        return (Shard(SINGLE_FILE, tuple(groups[0]), guard),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group), guard if number == 1 else None)
        for number, group in enumerate(groups, start=1)
    )
