"""Speed of the quantizer: million weights per second and core, for every instruction set, plane count and input type.

    python benchmarks/bench_quantize.py [--planes 1 2 3 4 6] [--rows N] [--columns K] [--repetitions R] [--json]

The weight is Gaussian, column scales are given, outliers are columns / 128 a row; P = 2 is the default preset. The best
of several runs counts. Before timing, every instruction set must have given the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loop_singular_bit import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_same_bytes(weight: torch.Tensor, planes: int, outliers: int, column_scales: torch.Tensor) -> None:
    """Raises unless all instruction sets agree on the first rows."""
    sample = weight[:64]
    results = {}
    for name in ops.supported_isas():
        ops.set_isa(name)
        packed = ops.quantize(sample, planes, outliers, column_scales)
        results[name] = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in packed)
    if len(set(results.values())) != 1:
        raise SystemExit(f"P = {planes}: instruction sets disagree: {', '.join(results)}")


def weights_per_second(
    weight: torch.Tensor, planes: int, outliers: int, column_scales: torch.Tensor, repetitions: int
) -> float:
    best = math.inf
    for _ in range(repetitions):
        start = time.perf_counter()
        ops.quantize(weight, planes, outliers, column_scales)
        best = min(best, time.perf_counter() - start)
    return weight.numel() / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    outliers = max(1, math.ceil(arguments.columns / 128))
    weight = torch.randn(arguments.rows, arguments.columns, generator=torch.Generator().manual_seed(0)) * 0.02
    column_scales = ops.fit_column_scales(weight)
    threads = sorted({1, min(2, os.cpu_count() or 1)})
    chosen = ops.isa()
    rows: list[dict[str, Any]] = []
    for planes in arguments.planes:
        check_same_bytes(weight, planes, outliers, column_scales)
    for isa in ops.supported_isas():
        ops.set_isa(isa)
        # The portable table is for machines without the others: a part of the matrix is enough to see its speed.
        part = weight[: max(32, arguments.rows // 16)] if isa == "scalar" else weight
        for dtype_name, dtype in DTYPES.items():
            typed = part.to(dtype)
            for planes in arguments.planes:
                row: dict[str, Any] = {"isa": isa, "dtype": dtype_name, "planes": planes}
                for count in threads:
                    torch.set_num_threads(count)
                    speed = weights_per_second(typed, planes, outliers, column_scales, arguments.repetitions)
                    row[f"million_weights_per_second_per_core_{count}"] = speed / count / 1e6
                rows.append(row)
    ops.set_isa(chosen)

    if arguments.json:
        print(json.dumps({"rows": arguments.rows, "columns": arguments.columns, "outliers": outliers, "results": rows}))
        return
    shape = f"{arguments.rows} x {arguments.columns}, {outliers} outliers a row"
    print(f"Quantizing {shape}; million weights per second and core.\n")
    print("| instruction set | input | " + " | ".join(f"P = {planes}" for planes in arguments.planes) + " |")
    print("|---|---|" + "---:|" * len(arguments.planes))
    for isa in ops.supported_isas():
        for dtype_name in DTYPES:
            for count in threads:
                label = f"{dtype_name}, {count} thread{'s' if count > 1 else ''}"
                speeds = [
                    row[f"million_weights_per_second_per_core_{count}"]
                    for row in rows
                    if row["isa"] == isa and row["dtype"] == dtype_name
                ]
                print(f"| {isa} | {label} | " + " | ".join(f"{speed:.0f}" for speed in speeds) + " |")


if __name__ == "__main__":
    main()
