"""Error that each activation precision adds to packed_linear, by the kind of input, and what massive activations cost.

    python benchmarks/bench_activation_precision.py

Error: relative Frobenius error of the output against the float64 product with the dequantized weight (512 x 4096, b2);
decode is 1 token, prefill 64. Time: int8 on 4096 x 4096, b2, against Gaussian input of the same shape in the same
rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loop_singular_bit import quantize_weight
from loop_singular_bit.packed_weight import PackedWeight

COLUMNS = 4096
PRECISIONS = ("int8", "int16", "exact")
DECODE_CALLS = 32
PREFILL_TOKENS = 64
TIMED_TOKENS = (1, 8, 64, 256)
TIMED_ROUNDS = 25


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    shape = (tokens, COLUMNS)
    massive = torch.randn(shape)
    massive[:, 7 : 7 + 14 * 251 : 251] *= 12
    massive[:, 100:300:150] *= 40
    return {
        "Gaussian": torch.randn(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "Student-t, 3 degrees of freedom": torch.distributions.StudentT(3.0).sample(shape),
        "massive activations (2 columns x 40, 14 x 12)": massive,
    }


def print_errors(packed: PackedWeight) -> None:
    dense = packed.dequantize().double()
    print("| input | " + " | ".join(f"{p}, {r}" for p in PRECISIONS for r in ("decode", "prefill")) + " |")
    print("|---|" + "---:|" * 6)
    for name, x in inputs(PREFILL_TOKENS).items():
        expected = x.double() @ dense.T
        cells = []
        for precision in PRECISIONS:
            calls = [packed.linear(x[i : i + 1], activation_precision=precision) for i in range(DECODE_CALLS)]
            decode = (torch.cat(calls) - expected[:DECODE_CALLS]).norm() / expected[:DECODE_CALLS].norm()
            prefill = (packed.linear(x, activation_precision=precision) - expected).norm() / expected.norm()
            cells += [f"{100 * error:.2g} %" for error in (decode, prefill)]
        print(f"| {name} | " + " | ".join(cells) + " |")


def seconds(packed: PackedWeight, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    packed.linear(x)
    return time.perf_counter() - begin


def print_times(packed: PackedWeight) -> None:
    heads = " | ".join("1 token" if tokens == 1 else f"{tokens} tokens" for tokens in TIMED_TOKENS)
    print(f"\n| input, {torch.get_num_threads()} threads | {heads} |")
    print("|---|" + "---:|" * len(TIMED_TOKENS))
    columns = []
    for tokens in TIMED_TOKENS:
        kinds = inputs(tokens)
        rounds = [[seconds(packed, x) for x in kinds.values()] for _ in range(TIMED_ROUNDS + 2)][2:]
        plain = statistics.median(times[0] for times in rounds)
        ratios = [statistics.median(times[i] / times[0] for times in rounds) for i in range(1, len(kinds))]
        columns.append([f"{1e3 * plain:.3g} ms", *(f"{ratio:.3f} x" for ratio in ratios)])
    for i, name in enumerate(inputs(1)):
        print(f"| {name} | " + " | ".join(column[i] for column in columns) + " |")


def main() -> None:
    torch.manual_seed(0)
    print_errors(quantize_weight(torch.randn(512, COLUMNS) * 0.02, preset="b2"))
    print_times(quantize_weight(torch.randn(4096, COLUMNS) * 0.02, preset="b2"))


if __name__ == "__main__":
    main()
