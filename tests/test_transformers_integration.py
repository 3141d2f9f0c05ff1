"""Packed models in Transformers: quantizing while loading, packed checkpoints and their faults, text, compilation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loop_singular_bit
from loop_singular_bit import LoopSingularBitConfig, PackedEmbedding, PackedLinear
from loop_singular_bit.quantization.presets import UncalibratedWarning
from loop_singular_bit.quantization.quantize_model import QuantizationConfig, quantize_model

transformers = pytest.importorskip("transformers")

from tiny_models import CONFIGS, VOCABULARY, random_tokens, tiny_encoder, tiny_language_model  # noqa: E402

AutoModelForCausalLM = transformers.AutoModelForCausalLM

B4 = LoopSingularBitConfig("b4")
ARCHITECTURES = [(name, tied) for name in CONFIGS for tied in (True, False)]


def logits(model: nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens() if tokens is None else tokens).logits


def relative_difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm())


def use_exact_activations(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.activation_precision = "exact"
    return model


@pytest.fixture(scope="module")
def dense_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    made: dict[tuple[str, bool], Path] = {}

    def make(architecture: str, tied: bool) -> Path:
        if (architecture, tied) not in made:
            directory = tmp_path_factory.mktemp(f"{architecture}-{tied}")
            tiny_language_model(architecture, tied=tied).save_pretrained(directory)
            made[architecture, tied] = directory
        return made[architecture, tied]

    return make


@pytest.fixture(scope="module")
def packed_directory(
    dense_directory: Callable[[str, bool], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], Path]:
    made: dict[tuple[str, bool], Path] = {}

    def make(architecture: str, tied: bool) -> Path:
        if (architecture, tied) not in made:
            model = AutoModelForCausalLM.from_pretrained(dense_directory(architecture, tied), quantization_config=B4)
            made[architecture, tied] = tmp_path_factory.mktemp(f"packed-{architecture}-{tied}")
            model.save_pretrained(made[architecture, tied])
        return made[architecture, tied]

    return make


@pytest.fixture
def damaged(packed_directory: Callable[[str, bool], Path], tmp_path: Path) -> Callable[..., Path]:
    """A packed Llama whose tensors or configuration a test has changed."""

    def make(change: Callable[[dict[str, torch.Tensor], dict], None]) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(packed_directory("llama", True), directory)
        tensors = load_file(directory / "model.safetensors")
        config = json.loads((directory / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


# ---- quantizing while loading, saving, loading ----------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_quantizing_while_loading_equals_quantizing_in_memory(
    dense_directory: Callable[[str, bool], Path], architecture: str, tied: bool
) -> None:
    directory = dense_directory(architecture, tied)
    loaded = AutoModelForCausalLM.from_pretrained(directory, quantization_config=B4)
    in_memory = AutoModelForCausalLM.from_pretrained(directory)
    original = logits(in_memory)
    quantize_model(in_memory, QuantizationConfig("b4"))

    assert not [name for name, module in loaded.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding)
    assert loaded.state_dict().keys() == in_memory.state_dict().keys()
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded), logits(in_memory))
    assert 0.001 < relative_difference(logits(loaded), original) < 0.5
    assert ("lm_head.signs" in loaded.state_dict()) is not tied


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_saving_and_loading_changes_nothing(
    packed_directory: Callable[[str, bool], Path],
    dense_directory: Callable[[str, bool], Path],
    architecture: str,
    tied: bool,
    tmp_path: Path,
) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(dense_directory(architecture, tied), quantization_config=B4)
    packed = AutoModelForCausalLM.from_pretrained(packed_directory(architecture, tied))
    packed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(packed), logits(quantized))
    assert torch.equal(logits(again), logits(quantized))
    before = load_file(packed_directory(architecture, tied) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [
        json.loads((path / "config.json").read_text()) for path in (packed_directory(architecture, tied), tmp_path)
    ]
    assert configs[0] == configs[1]
    assert packed.model.embed_tokens.signs.dtype == torch.int32
    assert packed.model.embed_tokens.outlier_columns.dtype == torch.uint16
    assert packed.model.embed_tokens.outlier_deltas.dtype == torch.int8
    assert packed.model.embed_tokens.scales.dtype == torch.float16


def test_saved_configuration_is_the_one_of_the_format(packed_directory: Callable[[str, bool], Path]) -> None:
    directory = packed_directory("llama", True)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "loop_singular_bit"
    assert config["format_version"] == 1
    assert config["preset"] == "b4"
    assert config["tied_modules"] == {"lm_head": "model.embed_tokens"}
    assert config["modules"]["model.layers.1.mlp.down_proj"] == {
        "kind": "linear",
        "out_features": 64,
        "in_features": 96,
        "planes": 4,
        "outliers": 1,
        "column_scales": True,
        "means": False,
    }
    assert config["modules"]["model.embed_tokens"]["kind"] == "embedding"
    names = set(load_file(directory / "model.safetensors"))
    assert {"model.layers.0.self_attn.q_proj.signs", "model.norm.weight"} <= names
    assert not [name for name in names if name.startswith("lm_head")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtype_of_the_model_never_touches_packed_tensors(
    packed_directory: Callable[[str, bool], Path], dtype: torch.dtype | str
) -> None:
    directory = packed_directory("qwen2", True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    expected_dtype = torch.float32 if dtype == "auto" else dtype
    assert logits(model).dtype == expected_dtype
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == expected_dtype
    assert model.model.layers[0].self_attn.q_proj.column_scales.dtype == torch.float16
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, tensor in reference.state_dict().items():
        if not name.endswith((".weight", ".bias")):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert relative_difference(logits(model), logits(reference)) < 0.05


def test_quantizing_a_bfloat16_checkpoint_while_loading(tmp_path: Path) -> None:
    tiny_language_model("llama", tied=True, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=B4)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert relative_difference(logits(model), logits(dense)) < 0.5


def test_quantizing_in_memory_can_be_saved(tmp_path: Path) -> None:
    model = tiny_language_model("qwen3", tied=True)
    quantize_model(model, QuantizationConfig("b4", skip_modules=("model.layers.0",)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(loaded.model.layers[1].mlp.up_proj) is PackedLinear


def test_sharded_checkpoint(packed_directory: Callable[[str, bool], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_directory("llama", False))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_loaded_models_have_their_packed_tensors_on_huge_pages(
    packed_directory: Callable[[str, bool], Path], dense_directory: Callable[[str, bool], Path]
) -> None:
    packed = AutoModelForCausalLM.from_pretrained(packed_directory("llama", False))
    quantized = AutoModelForCausalLM.from_pretrained(dense_directory("llama", False), quantization_config=B4)
    for model in (packed, quantized):
        modules = [module for module in model.modules() if isinstance(module, (PackedEmbedding, PackedLinear))]
        tensors = [tensor for module in modules for tensor in module.buffers(recurse=False)]
        expected = tensors[0].data_ptr()
        assert expected % (2 << 20) == 0
        for tensor in tensors:
            assert tensor.data_ptr() == expected
            expected += -(-tensor.nbytes // 64) * 64


def test_base_model_of_a_packed_language_model(packed_directory: Callable[[str, bool], Path]) -> None:
    directory = packed_directory("llama", False)
    whole = AutoModelForCausalLM.from_pretrained(directory)
    base = transformers.AutoModel.from_pretrained(directory)
    with torch.no_grad():
        expected = whole.model(input_ids=random_tokens()).last_hidden_state
        assert torch.equal(base(input_ids=random_tokens()).last_hidden_state, expected)


def test_new_head_on_a_packed_base_model_is_left_to_the_user(packed_directory: Callable[[str, bool], Path]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        packed_directory("llama", True), num_labels=3
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert type(model.score) is nn.Linear


# ---- options --------------------------------------------------------------------------------------------------------


def test_modules_and_embeddings_can_be_left_dense(dense_directory: Callable[[str, bool], Path], tmp_path: Path) -> None:
    config = LoopSingularBitConfig(
        "b4", modules_to_not_convert=["model.layers.0.mlp", r".*k_proj"], quantize_embeddings=False
    )
    model = AutoModelForCausalLM.from_pretrained(dense_directory("llama", True), quantization_config=config)
    packed = {name for name, module in model.named_modules() if isinstance(module, (PackedLinear, PackedEmbedding))}
    assert packed == {
        *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qvo"),
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    skipped = dict(model.hf_quantizer.skipped)
    assert "quantize_embeddings" in skipped["lm_head"]
    assert "modules_to_not_convert" in skipped["model.layers.0.mlp.up_proj"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_tied_head_that_is_kept_keeps_the_embedding(dense_directory: Callable[[str, bool], Path]) -> None:
    config = LoopSingularBitConfig("b4", modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(dense_directory("llama", True), quantization_config=config)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "shares its weight" in dict(model.hf_quantizer.skipped)["model.embed_tokens"]


def test_outlier_fraction_and_activation_precision(
    dense_directory: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    config = LoopSingularBitConfig("b4", outlier_fraction=0.1, activation_precision="exact")
    model = AutoModelForCausalLM.from_pretrained(dense_directory("llama", False), quantization_config=config)
    up = model.model.layers[0].mlp.up_proj
    assert up.packed_weight.outliers == 7
    assert up.activation_precision == "exact"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.activation_precision == "exact"
    assert torch.equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="activation_precision"):
        other = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=LoopSingularBitConfig("b2", activation_precision="int16")
        )
    assert other.lm_head.activation_precision == "int16"
    assert other.config.quantization_config.preset == "b4"


def test_presets_say_what_they_do_without_calibration(dense_directory: Callable[[str, bool], Path]) -> None:
    directory = dense_directory("llama", True)
    with pytest.warns(UncalibratedWarning):
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=LoopSingularBitConfig())
    assert model.model.layers[0].mlp.up_proj.packed_weight.planes == 2
    assert model.model.embed_tokens.packed_weight.planes == 6
    with pytest.raises(ValueError, match="force"):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=LoopSingularBitConfig("b1"))
    with pytest.warns(UncalibratedWarning):
        forced = LoopSingularBitConfig("b1", force=True)
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=forced)
    assert model.model.layers[0].mlp.up_proj.packed_weight.planes == 1


@pytest.mark.filterwarnings("ignore::loop_singular_bit.quantization.presets.UncalibratedWarning")
def test_historic_preset_while_loading_equals_in_memory(dense_directory: Callable[[str, bool], Path]) -> None:
    directory = dense_directory("llama", True)
    loaded = AutoModelForCausalLM.from_pretrained(directory, quantization_config=LoopSingularBitConfig("historic"))
    in_memory = AutoModelForCausalLM.from_pretrained(directory)
    quantize_model(in_memory, QuantizationConfig("historic"))
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"preset": "b9"}, ValueError, "b9"),
        ({"outlier_fraction": 2.0}, ValueError, "outlier_fraction"),
        ({"activation_precision": "int4"}, ValueError, "int4"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "list of names"),
        ({"group_size": 64}, TypeError, "group_size"),
        ({"quant_method": "gptq"}, ValueError, "gptq"),
        ({"format_version": 2, "modules": {}}, ValueError, "reads 1"),
    ],
)
def test_wrong_configurations(fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoopSingularBitConfig(**fields)


def test_device_maps(packed_directory: Callable[[str, bool], Path]) -> None:
    directory = packed_directory("llama", True)
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)), expected)
    with pytest.raises(ValueError, match="offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(
            directory, device_map={"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"}
        )
    with pytest.raises(ValueError, match="run on the CPU"):
        AutoModelForCausalLM.from_pretrained(directory, device_map={"": 0})


def test_dequantize_gives_an_ordinary_model(packed_directory: Callable[[str, bool], Path]) -> None:
    model = use_exact_activations(AutoModelForCausalLM.from_pretrained(packed_directory("qwen2", True)))
    expected = logits(model)
    dense = model.dequantize()
    assert type(dense.model.layers[0].self_attn.q_proj) is nn.Linear
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert relative_difference(logits(dense), expected) < 1e-4
    assert not hasattr(dense.config, "quantization_config")


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2, vocab_size=VOCABULARY,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fused weight of experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=B4)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_language_model("llama", tied=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*row 3, column 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=B4)


def test_a_dense_weight_that_is_missing_is_named(dense_directory: Callable[[str, bool], Path], tmp_path: Path) -> None:
    shutil.copytree(dense_directory("llama", True), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=B4)


# ---- damaged checkpoints --------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


def _entry(config: dict, name: str = UP) -> dict:
    return config["quantization_config"]["modules"][name]


def _drop_tensor(name: str) -> Callable[[dict, dict], None]:
    return lambda tensors, config: tensors.pop(name)


def _set_tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    return lambda tensors, config: tensors.update({name: value(tensors[name])})


def _with_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.to(torch.int32) if tensor.dtype == torch.uint16 else tensor.clone()
        changed.view(-1)[0] = value
        return changed.to(tensor.dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_tensor(f"{UP}.signs"), r"lacks model\.layers\.1\.mlp\.up_proj\.signs"),
        (_drop_tensor(f"{UP}.column_scales"), r"lacks model\.layers\.1\.mlp\.up_proj\.column_scales"),
        (_drop_tensor("model.norm.weight"), r"lacks model\.norm\.weight"),
        (_set_tensor(f"{UP}.outlier_columns", _with_first(64)), r"up_proj: outlier_columns: .*64"),
        (_set_tensor(f"{UP}.scales", _with_first(float("nan"))), r"up_proj: scales: .*nan"),
        (_set_tensor(f"{UP}.outlier_scales", _with_first(float("inf"))), r"up_proj: outlier_scales: .*inf"),
        (_set_tensor(f"{UP}.signs", lambda tensor: tensor.long()), r"up_proj: signs: expected dtype torch\.int32"),
        (lambda tensors, config: _entry(config).update(out_features=128), r"the model has a linear 96 x 64 there"),
        (lambda tensors, config: _entry(config).update(planes=9), r"planes: expected 1 to 8, got 9"),
        (lambda tensors, config: _entry(config).pop("outliers"), r"missing keys \['outliers'\]"),
        (lambda tensors, config: _entry(config).update(kind="embedding"), r"the checkpoint a embedding"),
        (lambda tensors, config: config["quantization_config"].update(format_version=2), "reads 1"),
        (lambda tensors, config: config["quantization_config"].pop("modules"), "has no 'modules'"),
        (lambda tensors, config: config["quantization_config"].update(modules={}), "none of the 0 packed modules"),
        (lambda tensors, config: config["quantization_config"].update(tied_modules={"lm_head": UP}), "tied_modules"),
        (lambda tensors, config: config["quantization_config"].update(tied_modules={"lm_head": "x"}), "tied_modules"),
    ],
)
def test_damaged_checkpoints_do_not_load(
    damaged: Callable[..., Path], change: Callable[[dict, dict], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged(change))


def test_a_tensor_of_the_wrong_shape_does_not_load(damaged: Callable[..., Path]) -> None:
    directory = damaged(_set_tensor(f"{UP}.signs", lambda tensor: tensor[:1].clone()))
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(directory)


# ---- other architectures --------------------------------------------------------------------------------------------


def test_encoder_decoder_whose_embeddings_are_shared(tmp_path: Path) -> None:
    """T5 ties three embeddings, keeps some linears in float32, and initializes weights from their parents."""
    torch.manual_seed(4)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    dense = transformers.T5ForConditionalGeneration(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", quantization_config=B4)
    owner = model.shared
    assert isinstance(owner, PackedEmbedding)
    assert model.encoder.embed_tokens.weight_owner is model.decoder.embed_tokens.weight_owner is owner
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear
    model.save_pretrained(tmp_path / "packed")
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert loaded.decoder.embed_tokens.weight_owner is loaded.shared
    inputs = {"input_ids": random_tokens(), "decoder_input_ids": random_tokens(length=5)}
    with torch.no_grad():
        values = [each(**inputs).logits for each in (dense, model, loaded)]
    assert torch.equal(values[1], values[2])
    assert relative_difference(values[1], values[0]) < 0.5


def test_parents_that_initialize_the_weights_of_their_children(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ChineseCLIPConfig(
        text_config={"vocab_size": VOCABULARY, **sizes},
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        projection_dim=64,
    )
    transformers.ChineseCLIPModel(config).save_pretrained(tmp_path / "dense")
    model = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "dense", quantization_config=B4)
    model.save_pretrained(tmp_path / "packed")
    loaded = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "packed")
    packed = [name for name, module in loaded.named_modules() if isinstance(module, PackedLinear)]
    assert any("vision" in name for name in packed) and any("text" in name for name in packed)
    inputs = {"input_ids": random_tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert not [name for name, module in loaded.named_modules() if "weight" in vars(module)]


# ---- registration ---------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(loop_singular_bit.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "error::RuntimeWarning"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


IMPORT_ORDERS = {
    "ours first": "import loop_singular_bit; assert 'torch' not in sys.modules; import transformers",
    "theirs first": "import transformers.modeling_utils; import loop_singular_bit",
    "integration first": "import loop_singular_bit.transformers_integration",
}
PEFT_IMPORT_ORDERS = {
    "PEFT first": "import peft; import loop_singular_bit",
    "integration first": "import loop_singular_bit.peft_integration",
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_registration_in_any_order_of_imports(order: str) -> None:
    result = run_python(
        f"import sys; {IMPORT_ORDERS[order]}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING\n"
        "assert 'loop_singular_bit' in AUTO_QUANTIZER_MAPPING\n"
        "assert 'loop_singular_bit' in AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "assert 'loop_singular_bit.ops' not in sys.modules\n"
        "loop_singular_bit.transformers_registration.install()\n"
        "print('registered')"
    )
    assert result.stdout.strip() == "registered", result.stderr


@pytest.mark.parametrize("order", PEFT_IMPORT_ORDERS)
def test_registration_with_peft_in_any_order_of_imports(order: str) -> None:
    pytest.importorskip("peft")
    result = run_python(
        f"import sys; {PEFT_IMPORT_ORDERS[order]}\n"
        "from peft.tuners.lora import LoraModel\n"
        "assert LoraModel._create_new_module.accepts_packed_linear\n"
        "assert 'loop_singular_bit.ops' not in sys.modules\n"
        "print('registered')"
    )
    assert result.stdout.strip() == "registered", result.stderr


def test_without_our_import_a_packed_directory_fails_loudly(packed_directory: Callable[[str, bool], Path]) -> None:
    """And with it, in the same process, it loads."""
    result = run_python(
        "import sys, transformers\n"
        "for loader in (transformers.AutoModelForCausalLM, transformers.AutoModel):\n"
        "    for directory in sys.argv[1:]:\n"
        "        try:\n"
        "            loader.from_pretrained(directory)\n"
        "        except RuntimeError:\n"
        "            print('refused')\n"
        "assert 'loop_singular_bit' not in sys.modules\n"
        "print('with our import', file=sys.stderr, flush=True)\n"
        "import loop_singular_bit\n"
        "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head).__name__)",
        str(packed_directory("llama", True)),
        str(packed_directory("qwen2", False)),
    )
    assert result.stdout.split() == ["refused"] * 4 + ["PackedLinear"], result.stderr
    before, _, after = result.stderr.partition("with our import")
    assert "got loop_singular_bit" in before and "MISMATCH" in before
    assert "UNEXPECTED" not in after and "MISSING" not in after


# ---- generation and compilation -------------------------------------------------------------------------------------


def test_greedy_generation_equals_that_of_the_dequantized_model(packed_directory: Callable[[str, bool], Path]) -> None:
    packed = use_exact_activations(AutoModelForCausalLM.from_pretrained(packed_directory("llama", True)))
    dense = AutoModelForCausalLM.from_pretrained(packed_directory("llama", True)).dequantize()
    tokens = random_tokens(batch=1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = packed.generate(tokens, **options)
    assert written.shape == (1, tokens.shape[1] + 12)
    assert torch.equal(written, dense.generate(tokens, **options))
    assert torch.equal(written, packed.generate(tokens, cache_implementation="static", **options))


def test_sampling_and_batches(packed_directory: Callable[[str, bool], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_directory("qwen3", False))
    torch.manual_seed(0)
    first = model.generate(
        random_tokens(), max_new_tokens=8, do_sample=True, top_p=0.9, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    second = model.generate(
        random_tokens(), max_new_tokens=8, do_sample=True, top_p=0.9, eos_token_id=None, pad_token_id=0
    )
    assert first.shape == (2, 20)
    assert torch.equal(first, second)


def test_compiled_forward_is_one_graph_for_any_length(packed_directory: Callable[[str, bool], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_directory("llama", True))
    assert model.hf_quantizer.is_compileable
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=True, backend=backend)  # a graph break raises
    for length in (5, 9, 17):
        tokens = random_tokens(length=length)
        with torch.no_grad():
            assert relative_difference(compiled(input_ids=tokens, use_cache=False).logits, logits(model, tokens)) < 1e-5
    assert len(graphs) == 1
    packed_calls = [node for node in graphs[0].graph.nodes if "packed_linear" in str(node.target)]
    assert len(packed_calls) == 15


def test_compiled_by_inductor(packed_directory: Callable[[str, bool], Path]) -> None:
    layer = AutoModelForCausalLM.from_pretrained(packed_directory("llama", True)).model.layers[0].mlp
    torch._dynamo.reset()
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert relative_difference(torch.compile(layer, fullgraph=True)(x), layer(x)) < 1e-4


# ---- encoder --------------------------------------------------------------------------------------------------------


def test_encoder_round_trip(tmp_path: Path) -> None:
    dense = tiny_encoder()
    dense.save_pretrained(tmp_path / "dense")
    model = transformers.AutoModel.from_pretrained(tmp_path / "dense", quantization_config=B4)
    model.save_pretrained(tmp_path / "packed")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    mask = torch.ones_like(random_tokens())
    mask[1, 7:] = 0
    with torch.no_grad():
        outputs = [each(random_tokens(), attention_mask=mask).last_hidden_state for each in (dense, model, loaded)]
    assert torch.equal(outputs[1], outputs[2])
    assert 0.001 < relative_difference(outputs[1], outputs[0]) < 0.2
    assert isinstance(loaded.embeddings.word_embeddings, PackedEmbedding)
    assert type(loaded.embeddings.position_embeddings) is nn.Embedding


def test_masked_language_model_with_a_tied_head_and_bias(tmp_path: Path) -> None:
    config = tiny_encoder().config
    torch.manual_seed(3)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", quantization_config=B4)
    model.save_pretrained(tmp_path / "packed")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    dense = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")
    assert isinstance(loaded.cls.predictions.decoder, PackedLinear)
    assert loaded.cls.predictions.decoder.bias is loaded.cls.predictions.bias
    assert torch.equal(logits(loaded), logits(model))
    assert relative_difference(logits(model), logits(dense)) < 0.5
    base = transformers.BertModel.from_pretrained(tmp_path / "packed", add_pooling_layer=False)
    assert isinstance(base.encoder.layer[0].attention.self.query, PackedLinear)
