"""Writes a seeded checkpoint of Mistral-7B's shapes as a stream: heavy tails, loud columns, a few super weights.

    python benchmarks/make_checkpoint.py /tmp/mistral-7b-shaped          # 14.5 GB in bfloat16
    python benchmarks/make_checkpoint.py /tmp/small --layers 2
    python benchmarks/make_checkpoint.py /tmp/tiny --shape tiny
    python benchmarks/make_checkpoint.py /tmp/mistral-7b-b2 --packed b2                              # 2.1 GB
    python benchmarks/make_checkpoint.py /tmp/llama-3-70b-b2 --shape llama-3-70b --packed b2 --hollow  # 20 GB, at once

The weights mean nothing; what a compression costs (memory, time, bytes) depends on the shapes and on the distribution.
Real weights are closer to a Student t distribution than to a normal one, some of their columns are several times louder
than others, and single weights lie at 20 to 175 standard deviations. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from make_packed_checkpoint import write_packed_checkpoint  # noqa: E402
from model_shapes import SHAPES, model_config  # noqa: E402

from loop_singular_bit.safetensors_stream import SafetensorsWriter  # noqa: E402

_STANDARD_DEVIATION = 0.02
_DEGREES_OF_FREEDOM = 5.0
_QUANTILES = 1 << 16
_LOUD_COLUMN_FRACTION = 1 / 256
_LOUD_COLUMN_FACTOR = 6.0
_SUPER_WEIGHTS = 2
_SUPER_WEIGHT_DEVIATIONS = 60.0
_ROWS_AT_ONCE_VALUES = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the shape's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-gb", type=float, default=5.0)
    parser.add_argument(
        "--packed",
        nargs="?",
        const="b2",
        choices=("b1", "b2", "b3", "b4"),
        metavar="PRESET",
        help="already packed, with random signs: to be run, not to be compressed (default preset b2)",
    )
    parser.add_argument(
        "--hollow",
        action="store_true",
        help="with --packed: reserve the space only; all weights are 0, for memory only",
    )
    arguments = parser.parse_args()
    if arguments.hollow and arguments.packed is None:
        parser.error("--hollow: needs --packed")
    start = time.perf_counter()
    if arguments.packed is not None:
        nbytes = write_packed_checkpoint(
            arguments.output, arguments.shape, arguments.packed, arguments.layers, hollow=arguments.hollow
        )
    else:
        nbytes = write_checkpoint(
            arguments.output,
            arguments.shape,
            layers=arguments.layers,
            seed=arguments.seed,
            max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        )
    seconds = time.perf_counter() - start
    print(f"{arguments.output}: {nbytes:,} bytes in {seconds:.1f} s", file=sys.stderr)


def write_checkpoint(
    output: Path, shape: str = "tiny", *, layers: int | None = None, seed: int = 0, max_shard_bytes: int = 5 * 10**9
) -> int:
    """Writes the directory; the bytes of its shards."""
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    output.mkdir(parents=True, exist_ok=True)
    shards = cut_into_shards(list(tensor_shapes(sizes)), max_shard_bytes)
    quantiles = student_t_quantiles()
    weight_map: dict[str, str] = {}
    nbytes = 0
    for number, tensors in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        writer = SafetensorsWriter(
            output / name, [(tensor, "BF16", dimensions) for tensor, dimensions in tensors], {"format": "pt"}
        )
        for tensor, dimensions in tensors:
            position = 0
            for rows in random_rows(tensor, dimensions, seed, quantiles):
                writer.write_tensor(tensor, position, rows)
                position += rows.nbytes
            weight_map[tensor] = name
        writer.finish()
        nbytes += writer.file_bytes
    if len(shards) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (output / "config.json").write_text(json.dumps(model_config(sizes), indent=2) + "\n")
    return nbytes


def tensor_shapes(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def cut_into_shards(
    tensors: list[tuple[str, tuple[int, ...]]], max_shard_bytes: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    shard_bytes = 0
    for name, dimensions in tensors:
        nbytes = 2 * torch.Size(dimensions).numel()
        if shards[-1] and shard_bytes + nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, dimensions))
        shard_bytes += nbytes
    return shards


def student_t_quantiles() -> torch.Tensor:
    """float32 [65536]: drawing evenly from it is drawing from a Student t distribution of unit variance.

    The quantile function is inverted from the density, summed over a fine grid of the substitution x = sinh(u).
    """
    degrees = _DEGREES_OF_FREEDOM
    grid = torch.linspace(-6.0, 6.0, 1 << 18, dtype=torch.float64)
    density = (1 + grid.sinh().square() / degrees) ** (-(degrees + 1) / 2) * grid.cosh()
    distribution = density.cumsum(0)
    wanted = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES * distribution[-1]
    values = grid[torch.searchsorted(distribution, wanted)].sinh()
    return (values / values.square().mean().sqrt()).float()


def random_rows(name: str, dimensions: tuple[int, ...], seed: int, quantiles: torch.Tensor) -> Iterator[torch.Tensor]:
    """bfloat16 row blocks of one tensor, top to bottom."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if len(dimensions) == 1:
        yield (1 + 0.1 * torch.randn(dimensions, generator=generator)).bfloat16()
        return
    rows, columns = dimensions
    column_factors = torch.exp(0.3 * torch.randn(columns, generator=generator))
    loud = torch.randperm(columns, generator=generator)[: max(1, int(columns * _LOUD_COLUMN_FRACTION))]
    column_factors[loud] *= _LOUD_COLUMN_FACTOR
    column_factors *= _STANDARD_DEVIATION
    super_weights = {
        int(torch.randint(rows, (), generator=generator)): int(torch.randint(columns, (), generator=generator))
        for _ in range(_SUPER_WEIGHTS)
    }
    step = max(1, _ROWS_AT_ONCE_VALUES // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        # Four 16-bit indices out of each random 64-bit number.
        bits = torch.empty(-(-count * columns // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        indices = bits.view(torch.uint16)[: count * columns].to(torch.int32)
        block = quantiles.index_select(0, indices).view(count, columns).mul_(column_factors).bfloat16()
        for row, column in super_weights.items():
            if first <= row < first + count:
                block[row - first, column] = _SUPER_WEIGHT_DEVIATIONS * _STANDARD_DEVIATION
        yield block


if __name__ == "__main__":
    main()
