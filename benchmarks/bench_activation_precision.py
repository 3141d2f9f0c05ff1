"""Error that each activation precision adds to packed_linear, by the kind of input; decode is 1 token, prefill 64.

    python benchmarks/bench_activation_precision.py

Relative Frobenius error of the output against the float64 product with the dequantized weight (512 x 4096, b2).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loop_singular_bit import quantize_weight

DECODE_CALLS = 32
PREFILL_TOKENS = 64


def inputs(columns: int) -> dict[str, torch.Tensor]:
    shape = (PREFILL_TOKENS, columns)
    massive = torch.randn(shape)
    massive[:, 7 : 7 + 14 * 251 : 251] *= 12
    massive[:, 100:300:150] *= 40
    return {
        "Gaussian": torch.randn(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "Student-t, 3 degrees of freedom": torch.distributions.StudentT(3.0).sample(shape),
        "massive activations (2 columns x 40, 14 x 12)": massive,
    }


def main() -> None:
    torch.manual_seed(0)
    packed = quantize_weight(torch.randn(512, 4096) * 0.02, preset="b2")
    dense = packed.dequantize().double()
    print(
        "| input | " + " | ".join(f"{p}, {r}" for p in ("int8", "int16", "exact") for r in ("decode", "prefill")) + " |"
    )
    print("|---|" + "---:|" * 6)
    for name, x in inputs(4096).items():
        expected = x.double() @ dense.T
        cells = []
        for precision in ("int8", "int16", "exact"):
            calls = [packed.linear(x[i : i + 1], activation_precision=precision) for i in range(DECODE_CALLS)]
            decode = (torch.cat(calls) - expected[:DECODE_CALLS]).norm() / expected[:DECODE_CALLS].norm()
            prefill = (packed.linear(x, activation_precision=precision) - expected).norm() / expected.norm()
            cells += [f"{100 * error:.2g} %" for error in (decode, prefill)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
