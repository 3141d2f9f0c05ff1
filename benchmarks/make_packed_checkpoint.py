"""Writes a packed checkpoint of a real model's shapes directly, for measurements of the native runtime.

    python benchmarks/make_packed_checkpoint.py /tmp/mistral-7b-b2                        # 2.2 GB
    python benchmarks/make_packed_checkpoint.py /tmp/llama-3-70b-b2 --shape llama-3-70b --hollow   # 21 GB, at once

The signs are random and mean nothing; scales are such that activations stay in a plausible range. What a token costs in
time, memory and bytes depends on shapes only. benchmarks/make_checkpoint.py makes unpacked ones, to be compressed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loop_singular_bit.packed_weight import PackedLayout  # noqa: E402
from loop_singular_bit.quantization.presets import find_preset, outlier_count  # noqa: E402
from loop_singular_bit.safetensors_stream import SafetensorsWriter, dtype_name  # noqa: E402

SHAPES = {
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
}
# The order of docs/packed_format.md: 32-bit tensors first, then 16-bit ones, then the 8-bit one.
_STORED_ORDER = ("signs", "scales", "outlier_columns", "outlier_scales", "column_scales", "outlier_deltas")
_NOISE_BYTES = 64 << 20
_PLANE_LEVELS = {1: (126,), 2: (84, 42), 3: (72, 36, 18), 4: (66, 33, 18, 9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--preset", choices=("b1", "b2", "b3", "b4"), default="b2")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the shape's")
    parser.add_argument(
        "--hollow", action="store_true", help="reserve the space only: all weights are 0, for memory only"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    nbytes = write_packed_checkpoint(
        arguments.output, arguments.shape, arguments.preset, arguments.layers, hollow=arguments.hollow
    )
    print(f"{arguments.output}: {nbytes:,} bytes in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def write_packed_checkpoint(
    output: Path, shape: str, preset: str = "b2", layers: int | None = None, *, hollow: bool = False
) -> int:
    """Writes the directory; the bytes of its one shard. A hollow one is read faster than any disk can."""
    sizes = {**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
    modules = dict(module_layouts(sizes, preset))
    vectors = dict(norm_sizes(sizes))
    output.mkdir(parents=True, exist_ok=True)
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, layout in modules.items():
        stored = layout.tensors()
        tensors += [(f"{name}.{part}", dtype_name(stored[part][0]), stored[part][1]) for part in _STORED_ORDER]
    tensors += [(name, "BF16", (size,)) for name, size in vectors.items()]
    writer = SafetensorsWriter(output / "model.safetensors", tensors, {"format": "pt"})
    noise = torch.randint(-(2**63), 2**63 - 1, (_NOISE_BYTES // 8,), generator=torch.Generator().manual_seed(0))
    for index, (name, layout) in enumerate(() if hollow else modules.items()):
        for part, pieces in module_tensors(layout, noise, index).items():
            position = 0
            for piece in pieces:
                writer.write_tensor(f"{name}.{part}", position, piece)
                position += piece.nbytes
    for name, size in vectors.items():
        writer.write_tensor(name, 0, torch.ones(size, dtype=torch.bfloat16))
    writer.finish()
    (output / "config.json").write_text(json.dumps(packed_config(sizes, preset, modules), indent=2) + "\n")
    return writer.file_bytes


def packed_config(sizes: dict[str, object], preset: str, modules: dict[str, PackedLayout]) -> dict[str, object]:
    entries = {
        name: {"kind": "embedding" if name == "model.embed_tokens" else "linear", **layout.to_dict()}
        for name, layout in modules.items()
    }
    return {
        "architectures": [f"{str(sizes['model_type']).capitalize()}ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **sizes,
        "quantization_config": {
            "quant_method": "loop_singular_bit",
            "format_version": 1,
            "preset": preset,
            "options": {"random": True},
            "modules": entries,
            "tied_modules": {},
            "modules_to_not_convert": [],
        },
    }


def module_layouts(sizes: dict[str, object], preset_name: str) -> Iterator[tuple[str, PackedLayout]]:
    preset = find_preset(preset_name)
    hidden, intermediate = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    keys = hidden // int(sizes["num_attention_heads"]) * int(sizes["num_key_value_heads"])

    def layout(out_features: int, in_features: int, planes: int) -> PackedLayout:
        return PackedLayout(out_features, in_features, planes, outlier_count(in_features, preset.outlier_fraction))

    yield "model.embed_tokens", layout(int(sizes["vocab_size"]), hidden, preset.embedding_planes)
    for index in range(int(sizes["num_hidden_layers"])):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.self_attn.q_proj", layout(hidden, hidden, preset.planes)
        yield f"{prefix}.self_attn.k_proj", layout(keys, hidden, preset.planes)
        yield f"{prefix}.self_attn.v_proj", layout(keys, hidden, preset.planes)
        yield f"{prefix}.self_attn.o_proj", layout(hidden, hidden, preset.planes)
        yield f"{prefix}.mlp.gate_proj", layout(intermediate, hidden, preset.planes)
        yield f"{prefix}.mlp.up_proj", layout(intermediate, hidden, preset.planes)
        yield f"{prefix}.mlp.down_proj", layout(hidden, intermediate, preset.planes)
    yield "lm_head", layout(int(sizes["vocab_size"]), hidden, preset.embedding_planes)


def norm_sizes(sizes: dict[str, object]) -> Iterator[tuple[str, int]]:
    hidden = int(sizes["hidden_size"])
    for index in range(int(sizes["num_hidden_layers"])):
        yield f"model.layers.{index}.input_layernorm.weight", hidden
        yield f"model.layers.{index}.post_attention_layernorm.weight", hidden
    yield "model.norm.weight", hidden


def module_tensors(layout: PackedLayout, noise: torch.Tensor, index: int) -> dict[str, Iterator[torch.Tensor]]:
    """The tensors of one module as pieces that follow each other."""
    shapes = {name: shape for name, (_, shape) in layout.tensors().items()}
    tiles, planes = layout.row_tiles, layout.planes
    if planes in _PLANE_LEVELS:
        levels = torch.tensor(_PLANE_LEVELS[planes], dtype=torch.float32) / 126
    else:
        levels = 0.5 ** torch.arange(1, planes + 1, dtype=torch.float32)
    size = 1 / math.sqrt(layout.in_features)
    # One column from each of as many equal stretches: ascending, as the format wants it.
    edges = torch.arange(layout.outliers + 1) * layout.in_features // layout.outliers
    columns = edges[:-1].reshape(1, -1, 1).expand(tiles, -1, 32).to(torch.uint16)
    return {
        "signs": _noise_pieces(noise, 4 * math.prod(shapes["signs"]), 2 * index),
        "scales": iter([(levels.reshape(1, planes, 1) * size).half().expand(tiles, planes, 32).contiguous()]),
        "outlier_columns": iter([columns.contiguous()]),
        "outlier_scales": iter([torch.full(shapes["outlier_scales"], size / 64, dtype=torch.float16)]),
        "column_scales": iter([torch.ones(layout.in_features, dtype=torch.float16)]),
        "outlier_deltas": _noise_pieces(noise, math.prod(shapes["outlier_deltas"]), 2 * index + 1),
    }


def _noise_pieces(noise: torch.Tensor, nbytes: int, seed: int) -> Iterator[torch.Tensor]:
    """Random bytes, cut out of one buffer from another place each time: new ones would take longer than the disk."""
    data = noise.view(torch.uint8)
    start = seed * 7_654_321 * 4 % data.numel()
    while nbytes > 0:
        piece = data[start : start + nbytes]
        yield piece
        nbytes -= piece.numel()
        start = 0


if __name__ == "__main__":
    main()
