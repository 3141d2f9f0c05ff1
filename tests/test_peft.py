"""LoRA on packed models with PEFT: training, saving, loading, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from loop_singular_bit import LoopSingularBitConfig, PackedLinear
from loop_singular_bit.quantization.quantize_model import QuantizationConfig, quantize_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tiny_models import VOCABULARY, random_tokens, tiny_encoder, tiny_language_model  # noqa: E402

from loop_singular_bit.peft_integration import PackedLoraLinear  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def packed_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    model = tiny_language_model("qwen2", tied=True)
    quantize_model(model, QuantizationConfig("b4"))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def model(packed_directory: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(packed_directory)


def lora_config(**options: object) -> object:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def train(model: nn.Module, steps: int = 12) -> list[float]:
    tokens = random_tokens()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_tokens()).logits


def test_lora_trains_and_nothing_else_changes(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, lora_config())
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(TARGETS)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    losses = train(adapted.train())
    assert losses[-1] < losses[0] - 0.3
    assert not [name for name, each in adapted.named_parameters() if each.grad is not None and name not in trained]
    after = adapted.get_base_model().state_dict()
    for name, tensor in before.items():
        module, _, kind = name.rpartition(".")
        stored = name if name in after else f"{module}.base_layer.{kind}"
        assert torch.equal(after[stored], tensor), name


def test_a_new_adapter_changes_nothing_and_can_be_switched_off(model: nn.Module) -> None:
    expected = logits(model)
    adapted = peft.get_peft_model(model, lora_config())
    assert torch.equal(logits(adapted), expected)
    train(adapted.train())
    assert not torch.allclose(logits(adapted), expected, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected)
    assert torch.equal(logits(adapted.unload()), expected)


def test_saving_and_loading_an_adapter(model: nn.Module, packed_directory: Path, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model, lora_config())
    train(adapted.train())
    adapted.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 100_000
    base = transformers.AutoModelForCausalLM.from_pretrained(packed_directory)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    automatic = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # the adapter names its base model
    assert torch.equal(logits(automatic), logits(adapted))


def test_merging_is_refused(model: nn.Module) -> None:
    adapted = peft.get_peft_model(model, lora_config())
    with pytest.raises(ValueError, match="cannot be merged into a packed weight"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged into a packed weight"):
        adapted.merge_adapter()


@pytest.mark.parametrize("option", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_what_needs_the_dense_weight_is_refused(model: nn.Module, option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"dense weight|variant"):
        peft.get_peft_model(model, lora_config(**option))


def test_bfloat16_model_with_dropout_and_two_adapters(packed_directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(packed_directory, dtype=torch.bfloat16)
    adapted = peft.get_peft_model(model, lora_config(lora_dropout=0.1, init_lora_weights=False))
    adapted.add_adapter("other", lora_config(init_lora_weights=False, use_rslora=True))
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, PackedLoraLinear)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    first = logits(adapted)
    assert first.dtype == torch.bfloat16
    adapted.set_adapter("other")
    second = logits(adapted)
    assert not torch.equal(first, second)
    with torch.no_grad():
        mixed = adapted(input_ids=random_tokens(), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[0].float(), first[0].float(), atol=0.05, rtol=0.05)
    torch.testing.assert_close(mixed[1].float(), second[1].float(), atol=0.05, rtol=0.05)


def test_adapter_output_is_the_delta_weight(model: nn.Module) -> None:
    adapted = peft.get_peft_model(model, lora_config(init_lora_weights=False))
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_all_linear_targets_packed_layers(model: nn.Module) -> None:
    adapted = peft.get_peft_model(model, lora_config(target_modules="all-linear"))
    adapters = [name for name, module in adapted.named_modules() if isinstance(module, PackedLoraLinear)]
    assert len(adapters) == 2 * 7
    assert not [name for name in adapters if name.endswith("lm_head")]


def test_gradient_checkpointing(model: nn.Module) -> None:
    adapted = peft.get_peft_model(model, lora_config()).train()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable()
    assert train(adapted, 6)[-1] < train(adapted, 1)[0] * 2
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_encoder_and_plain_modules() -> None:
    encoder = tiny_encoder()
    quantize_model(encoder, QuantizationConfig("b4"))
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["query", "dense"]))
    adapted(input_ids=random_tokens()).last_hidden_state.square().mean().backward()
    assert any(parameter.grad is not None for parameter in adapted.parameters())

    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    quantize_model(plain, QuantizationConfig("b4"))
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(adapted.base_model.model[0], PackedLoraLinear)
    assert isinstance(adapted.base_model.model[2], PackedLinear)


def test_adapters_on_dense_models_are_unaffected() -> None:
    adapted = peft.get_peft_model(tiny_language_model("llama", tied=True), lora_config())
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, peft.tuners.lora.Linear)
    adapted.merge_and_unload()


def test_quantizing_while_loading_then_lora(tmp_path: Path) -> None:
    tiny_language_model("llama", tied=False).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LoopSingularBitConfig("b4"))
    adapted = peft.get_peft_model(model, lora_config(target_modules=["q_proj", "lm_head"]))
    losses = train(adapted.train(), 6)
    assert losses[-1] < losses[0]
    assert logits(adapted).shape[-1] == VOCABULARY
