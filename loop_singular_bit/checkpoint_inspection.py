"""What a packed checkpoint consists of, from config.json and the headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from .checkpoint import StoredModule, read_packed_checkpoint
from .packed_weight import PackedLayout

# Kinds of stored tensors as people ask for them.
_SHARES = {
    "signs": ("signs",),
    "scales": ("scales", "means", "column_scales"),
    "outliers": ("outlier_columns", "outlier_deltas", "outlier_scales"),
}


def inspect_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Modules, kept tensors, bits per weight and where the bytes go.

    Returns:
        path, preset, format_version, options, shards (name to bytes), bits_per_weight (of linears, of embeddings, of
        all packed weights), bits_per_parameter (every byte of every tensor), part_bytes, shares (of signs, scales,
        outliers and kept tensors in all bytes), modules, kept_tensors, tied_modules.

    Raises:
        CheckpointError: not a packed checkpoint, or damaged.
    """
    with read_packed_checkpoint(directory) as checkpoint:
        modules = list(checkpoint.modules.values())
        kept = [checkpoint.files.entry(name) for name in checkpoint.kept_tensors]
        kept_bytes = sum(entry.nbytes for entry in kept)
        part_bytes = _sum_parts(module.layout for module in modules)
        total_bytes = sum(part_bytes.values()) + kept_bytes
        parameters = sum(_weights(module) for module in modules) + sum(math.prod(entry.shape) for entry in kept)
        return {
            "path": str(checkpoint.path),
            "preset": checkpoint.quantization_config.get("preset"),
            "format_version": checkpoint.quantization_config["format_version"],
            "options": checkpoint.quantization_config.get("options", {}),
            "shards": checkpoint.files.shard_bytes(),
            "parameters": parameters,
            "bytes": total_bytes,
            "bits_per_weight": {
                "all": _bits_per_weight(modules),
                "linears": _bits_per_weight([module for module in modules if module.kind == "linear"]),
                "embeddings": _bits_per_weight([module for module in modules if module.kind == "embedding"]),
            },
            "bits_per_parameter": 8 * total_bytes / parameters if parameters else None,
            "part_bytes": {**part_bytes, "kept": kept_bytes},
            "shares": {
                **{
                    name: sum(part_bytes.get(part, 0) for part in parts) / total_bytes
                    for name, parts in _SHARES.items()
                },
                "kept": kept_bytes / total_bytes,
            },
            "modules": [
                {
                    "name": module.name,
                    "kind": module.kind,
                    **module.layout.to_dict(),
                    "bits_per_weight": module.layout.bits_per_weight,
                    "bytes": module.layout.nbytes,
                    "part_bytes": module.layout.part_nbytes(),
                }
                for module in modules
            ],
            "kept_tensors": [
                {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
                for entry in kept
            ],
            "tied_modules": checkpoint.tied_modules,
        }


def _sum_parts(layouts: Iterable[PackedLayout]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for layout in layouts:
        for name, nbytes in layout.part_nbytes().items():
            parts[name] = parts.get(name, 0) + nbytes
    return parts


def _weights(module: StoredModule) -> int:
    return module.layout.out_features * module.layout.in_features


def _bits_per_weight(modules: list[StoredModule]) -> float | None:
    weights = sum(_weights(module) for module in modules)
    return 8 * sum(module.layout.nbytes for module in modules) / weights if weights else None
