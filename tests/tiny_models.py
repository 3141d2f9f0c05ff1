"""Small random models of the architectures that the Transformers tests cover."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 1056  # above the size from which embeddings are packed, and not a multiple of any tile

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def tiny_language_model(architecture: str, *, tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random causal language model whose biases and norms are not what initialization leaves them at."""
    torch.manual_seed(1)
    config = CONFIGS[architecture](**_SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    return with_random_vectors(model).eval()


def write_tiny_checkpoint(directory: Path) -> None:
    """A random one-layer Llama with the tokenizer of the bundled model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, bos_token_id=0, eos_token_id=1, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parents[1] / "examples" / "books-llama-7m" / name, directory)


def tiny_encoder() -> BertModel:
    torch.manual_seed(1)
    return with_random_vectors(BertModel(BertConfig(**_SIZES, type_vocab_size=2))).eval()


def with_random_vectors(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_(noise if name.endswith("bias") else 1 + noise)
    return model


def random_tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)
