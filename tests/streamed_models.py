"""Packed checkpoints for the tests of the native runtime, and what Transformers computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, with_random_vectors
from transformers import AutoModelForCausalLM, PreTrainedModel

from loop_singular_bit import LoopSingularBitConfig, PackedLinear
from loop_singular_bit.streaming import StreamingManager

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Name -> model type and what differs from SIZES: each exercises something of its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 6.0,
                "beta_slow": 0.4,
                "mscale": 1.3,
                "mscale_all_dim": 0.7,
                "truncate": False,
            }
        },
    ),
    "llama-dynamic-rope": (
        "llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
        },
    ),
    "llama-longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
                "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
            },
        },
    ),
    "llama-odd-sizes": (
        "llama",
        {
            "head_dim": 24,
            "intermediate_size": 70,
            "hidden_size": 72,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
        },
    ),
    "llama-dense-embeddings": ("llama", {"vocab_size": 200}),
    # Layers of 1.6 MB at b4: linears are cut into units, with their scales and outliers in units of their own.
    "llama-large": ("llama", {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


def make_packed(directory: Path, name: str, preset: str = "b4") -> Path:
    """A small random model of MODELS as a packed checkpoint."""
    from transformers import AutoConfig

    torch.manual_seed(3)
    model_type, changes = MODELS[name]
    config = AutoConfig.for_model(model_type, **{"tie_word_embeddings": False, **SIZES, **changes})
    dense = directory / "dense"
    with_random_vectors(AutoModelForCausalLM.from_config(config)).save_pretrained(dense)
    packed = directory / "packed"
    settings = LoopSingularBitConfig(preset, force=True)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings).save_pretrained(packed)
    return packed


def transformers_model(directory: Path, activation_precision: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.activation_precision = activation_precision
    return model.eval()


def transformers_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0]


def native_logits(manager: StreamingManager, tokens: Sequence[int]) -> torch.Tensor:
    view = manager.logits(tokens)
    return torch.frombuffer(view, dtype=torch.float32).view(view.shape).clone()


def token_ids(count: int, vocabulary: int = 200, seed: int = 5) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def relative_difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())
