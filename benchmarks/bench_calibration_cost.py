"""What calibrating costs, and what that comes to for a whole model: processor time by stage, and memory.

    python benchmarks/bench_calibration_cost.py [--columns 4096 8192] [--planes 2] [--rounds 5] [--tokens 65536]

For each number of columns one linear of a few rows is measured with one thread. Rows do not depend on each other: the
time of a linear is a part that its columns alone decide (factorizing the second moment) and one for each row, and two
numbers of rows tell them apart. The same for the layouts that a mixed allocation compares. The pass over the text is
measured on one window: the linears' products in float32, and the second moments.

The extrapolation counts every linear of --shape with the columns nearest to its own, scaled by their number.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from model_shapes import SHAPES  # noqa: E402

from loop_singular_bit.memory_budget import forget_earlier_peak, peak_resident_mb, resident_mb  # noqa: E402
from loop_singular_bit.quantization.allocation import SAMPLED_ROWS, candidate_layouts  # noqa: E402
from loop_singular_bit.quantization.quantize_calibrated import (  # noqa: E402
    REPORTED_ROWS,
    output_error,
    quantize_weight_calibrated,
)

FEW_ROWS, MANY_ROWS = 32, 160
WINDOW = 512


def processor_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def second_moment(columns: int) -> torch.Tensor:
    """Of inputs that are correlated as those of language models are: a few loud columns, a common direction."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(min(columns, 2048), columns, generator=generator)
    tokens[:, ::97] *= 8
    tokens += 0.5 * torch.randn(columns, generator=generator)
    hessian = tokens.T @ tokens / len(tokens)
    hessian.diagonal().add_(0.1)
    return hessian


def measure(columns: int, planes: int, rounds: int) -> dict[str, float]:
    """Seconds: fixed (for the columns), per_row (of packing, comparing layouts, reporting errors), per_token."""
    hessian = second_moment(columns)
    generator = torch.Generator().manual_seed(1)
    weight = 0.02 * torch.randn(MANY_ROWS, columns, generator=generator)
    forget_earlier_peak()
    before = resident_mb()

    def fit(rounds: int) -> tuple[float, float]:
        """Seconds for the columns and for a row."""

        def pack(rows: int) -> Any:
            return quantize_weight_calibrated(weight[:rows], hessian, planes=planes, rounds=rounds)

        few, many = (processor_seconds(lambda rows=rows: pack(rows)) for rows in (FEW_ROWS, MANY_ROWS))
        per_row = (many - few) / (MANY_ROWS - FEW_ROWS)
        return few - FEW_ROWS * per_row, per_row

    fixed, per_row = fit(rounds)
    memory = peak_resident_mb() - before
    compare_fixed, compare_row = fit(1)
    # Work grows with planes + 2.
    layouts = [count for count, _ in candidate_layouts(columns, 1 / 128)]
    compare_row *= sum(count + 2 for count in layouts) / (planes + 2)
    packed = quantize_weight_calibrated(weight[:FEW_ROWS], hessian, planes=planes, rounds=0).packed_weight
    errors = processor_seconds(lambda: output_error(weight[:FEW_ROWS], packed, hessian)) / FEW_ROWS
    inputs = torch.randn(WINDOW, columns, generator=generator)
    moments = processor_seconds(lambda: inputs.T @ inputs) / WINDOW
    forward = processor_seconds(lambda: torch.nn.functional.linear(inputs, weight)) / WINDOW / MANY_ROWS
    return {
        "columns": columns,
        "fixed": fixed,
        "per_row": per_row,
        "errors_per_row": 2 * errors,  # with calibration and without
        "compare_fixed": len(layouts) * compare_fixed,
        "compare_per_row": compare_row,
        "moments_per_token": moments,
        "forward_per_token_and_row": forward,
        "memory_mb": memory + 4e-6 * columns * columns,
    }


def linears_of(shape: dict[str, Any]) -> list[tuple[int, int, bool]]:
    """(rows, columns, whether its input is its own) of the linears of a layer; the others share one's moments."""
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [
        *((hidden, hidden, True), (keys, hidden, False), (keys, hidden, False), (hidden, hidden, True)),
        *((intermediate, hidden, True), (intermediate, hidden, False), (hidden, intermediate, True)),
    ]


def extrapolate(shape: dict[str, Any], measured: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Processor seconds by stage for all layers."""
    stages = dict.fromkeys(("packing", "errors in the report", "comparing layouts", "pass over the text"), 0.0)
    for rows, columns, own_input in linears_of(shape):
        costs = min(measured, key=lambda one: abs(one["columns"] - columns))
        ratio = columns / costs["columns"]
        stages["packing"] += costs["fixed"] * ratio**3 + rows * costs["per_row"] * ratio**2
        stages["errors in the report"] += min(rows, REPORTED_ROWS) * costs["errors_per_row"] * ratio**2
        compared = min(rows, SAMPLED_ROWS) * costs["compare_per_row"]
        stages["comparing layouts"] += costs["compare_fixed"] * ratio**3 + compared * ratio**2
        forward = rows * costs["forward_per_token_and_row"] * ratio
        stages["pass over the text"] += tokens * (forward + own_input * costs["moments_per_token"] * ratio**2)
    return {name: seconds * shape["num_hidden_layers"] for name, seconds in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--planes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = [measure(columns, arguments.planes, arguments.rounds) for columns in sorted(arguments.columns)]
    shape = SHAPES[arguments.shape]
    stages = extrapolate(shape, measured, arguments.tokens)
    weights = shape["num_hidden_layers"] * sum(rows * columns for rows, columns, _ in linears_of(shape))
    if arguments.json:
        print(json.dumps({"measured": measured, "stages": stages, "weights": weights}))
        return
    print("Seconds of one core per million weights, 4096 rows:\n")
    print("| columns | packing | of it for columns alone | comparing layouts | memory MB |")
    print("|---:|---:|---:|---:|---:|")
    for one in measured:
        millions = 4096 * one["columns"] / 1e6
        packing = (one["fixed"] + 4096 * one["per_row"]) / millions
        comparing = (one["compare_fixed"] + SAMPLED_ROWS * one["compare_per_row"]) / millions
        print(
            f"| {one['columns']:.0f} | {packing:.2f} | {one['fixed'] / millions:.2f} | {comparing:.2f} "
            f"| {one['memory_mb']:.0f} |"
        )
    print(f"\n{arguments.shape}, {weights / 1e9:.2f} G weights in linears, {arguments.tokens:,} tokens, one core:\n")
    print("| stage | hours | s per M weights |")
    print("|---|---:|---:|")
    for name, seconds in [*stages.items(), ("all", sum(stages.values()))]:
        print(f"| {name} | {seconds / 3600:.2f} | {seconds / weights * 1e6:.2f} |")


if __name__ == "__main__":
    main()
