"""Packed checkpoints of real models' shapes, written directly: `make_checkpoint.py --packed`.

The signs are random and mean nothing; scales are such that activations stay in a plausible range. What a token costs in
time, memory and bytes depends on shapes only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from model_shapes import SHAPES, model_config, norm_sizes

from loop_singular_bit.packed_weight import PackedLayout
from loop_singular_bit.quantization.presets import find_preset, outlier_count
from loop_singular_bit.safetensors_stream import SafetensorsWriter, dtype_name

# The order of docs/packed_format.md: 32-bit tensors first, then 16-bit ones, then the 8-bit one.
_STORED_ORDER = ("signs", "scales", "outlier_columns", "outlier_scales", "column_scales", "outlier_deltas")
_NOISE_BYTES = 64 << 20
_PLANE_LEVELS = {1: (126,), 2: (84, 42), 3: (72, 36, 18), 4: (66, 33, 18, 9)}


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


def packed_config(sizes: dict[str, Any], preset: str, modules: dict[str, PackedLayout]) -> dict[str, object]:
    entries = {
        name: {"kind": "embedding" if name == "model.embed_tokens" else "linear", **layout.to_dict()}
        for name, layout in modules.items()
    }
    return {
        **model_config(sizes),
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


def module_layouts(sizes: dict[str, Any], preset_name: str) -> Iterator[tuple[str, PackedLayout]]:
    preset = find_preset(preset_name)
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]

    def layout(out_features: int, in_features: int, planes: int) -> PackedLayout:
        return PackedLayout(out_features, in_features, planes, outlier_count(in_features, preset.outlier_fraction))

    yield "model.embed_tokens", layout(sizes["vocab_size"], hidden, preset.embedding_planes)
    for index in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.self_attn.q_proj", layout(hidden, hidden, preset.planes)
        yield f"{prefix}.self_attn.k_proj", layout(keys, hidden, preset.planes)
        yield f"{prefix}.self_attn.v_proj", layout(keys, hidden, preset.planes)
        yield f"{prefix}.self_attn.o_proj", layout(hidden, hidden, preset.planes)
        yield f"{prefix}.mlp.gate_proj", layout(intermediate, hidden, preset.planes)
        yield f"{prefix}.mlp.up_proj", layout(intermediate, hidden, preset.planes)
        yield f"{prefix}.mlp.down_proj", layout(hidden, intermediate, preset.planes)
    yield "lm_head", layout(sizes["vocab_size"], hidden, preset.embedding_planes)


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
