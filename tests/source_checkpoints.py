"""Small random checkpoints on disk, written without Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from loop_singular_bit.safetensors_stream import SafetensorsWriter, dtype_name

VOCABULARY = 1100  # above the size from which embeddings are packed; more rows than column scales are fitted on


def llama_config(layers: int = 2, *, tied: bool = False, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 136,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        **changes,
    }


def llama_tensors(
    layers: int = 2, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of odd sizes: 136 columns are no multiple of 32, the embedding's rows neither."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (0.05 * torch.randn(shape, generator=generator)).to(dtype)

    # In alphabetical order, as many checkpoints come: execution order has to be found.
    tensors = {"lm_head.weight": weight(VOCABULARY, 64)} if not tied else {}
    tensors |= {"model.embed_tokens.weight": weight(VOCABULARY, 64), "model.norm.weight": weight(64)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": weight(64),
            f"{prefix}.mlp.down_proj.weight": weight(64, 136),
            f"{prefix}.mlp.gate_proj.weight": weight(136, 64),
            f"{prefix}.mlp.up_proj.weight": weight(136, 64),
            f"{prefix}.post_attention_layernorm.weight": weight(64),
            f"{prefix}.self_attn.k_proj.weight": weight(32, 64),
            f"{prefix}.self_attn.o_proj.weight": weight(64, 64),
            f"{prefix}.self_attn.q_proj.weight": weight(64, 64),
            f"{prefix}.self_attn.v_proj.weight": weight(32, 64),
        }
    return tensors


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    writer = SafetensorsWriter(
        path, [(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()], {"format": "pt"}
    )
    for name, tensor in tensors.items():
        writer.write_tensor(name, 0, tensor)
    writer.finish()


def write_source(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """A directory as Transformers' save_pretrained leaves it, with a tokenizer file and a model card."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_safetensors(directory / name, part)
        weight_map |= {tensor: name for tensor in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_llama(directory: Path, layers: int = 2, *, tied: bool = False, shards: int = 1, seed: int = 0) -> Path:
    return write_source(
        directory, llama_config(layers, tied=tied), llama_tensors(layers, tied=tied, seed=seed), shards=shards
    )


def hashed_files(directory: Path) -> dict[str, bytes]:
    """Everything in an output except the report, which holds times."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "compression_report.json"
    }
