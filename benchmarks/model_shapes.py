"""Shapes of real models, for checkpoints whose weights mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rope_theta": 1000000.0,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "small": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "rope_theta": 10000.0,
    },
    "tiny": {
        "model_type": "mistral",
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "rope_theta": 1000000.0,
    },
}


def model_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": [f"{sizes['model_type'].capitalize()}ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }


def norm_sizes(sizes: dict[str, Any]) -> Iterator[tuple[str, int]]:
    hidden = sizes["hidden_size"]
    for index in range(sizes["num_hidden_layers"]):
        yield f"model.layers.{index}.input_layernorm.weight", hidden
        yield f"model.layers.{index}.post_attention_layernorm.weight", hidden
    yield "model.norm.weight", hidden
