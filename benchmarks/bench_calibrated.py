"""Quality of calibrated quantization on the bundled model: perplexity ratio and KL divergence on held-out text.

    python benchmarks/bench_calibrated.py [--planes P...] [--target-bits B...] [--tune scales|signs] [--json]

All linears are packed, embeddings and head are those of the original, as in the published comparisons. Calibration and
tuning see the three books of examples/text/calibration, the figures are those of the two books of
examples/text/held_out. Bits are counted from stored bytes, at this model's small matrices and as the same layouts would
be at 16 times the size.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from loop_singular_bit.calibrated_compression import read_texts  # noqa: E402
from loop_singular_bit.packed_weight import PackedLayout, PackedWeight  # noqa: E402
from loop_singular_bit.quantization.allocation import allocate, measure_candidates  # noqa: E402
from loop_singular_bit.quantization.calibration import (  # noqa: E402
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from loop_singular_bit.quantization.presets import outlier_count  # noqa: E402
from loop_singular_bit.quantization.quantize_calibrated import quantize_weight_calibrated  # noqa: E402
from loop_singular_bit.quantization.tuning import TuningOptions, TuningProgress, tune  # noqa: E402
from loop_singular_bit.validation import evaluate_language_model  # noqa: E402

EXAMPLES = ROOT / "examples"
# 256 columns here stand for 4096 there.
ENLARGEMENT = 16


def linears_of(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def bits(layouts: list[PackedLayout], enlargement: int = 1) -> float:
    stored = weights = 0
    for layout in layouts:
        rows, columns = layout.out_features * enlargement, layout.in_features * enlargement
        scaled = PackedLayout(rows, columns, layout.planes, layout.outliers * enlargement, layout.column_scales)
        stored += 8 * scaled.nbytes
        weights += rows * columns
    return stored / weights


def evaluate(
    original: torch.nn.Module, tokenizer: Any, texts: list[str], packed: dict[str, PackedWeight], tokens: int | None
) -> dict[str, float]:
    model = copy.deepcopy(original)
    for name, weight in packed.items():
        model.get_submodule(name).weight.data = weight.dequantize()
    figures = []
    for text in texts:
        limit = None if tokens is None else tokens // len(texts)
        figures.append(evaluate_language_model(model, tokenizer, text, original=original, max_tokens=limit))
    total = sum(figure.tokens for figure in figures)
    mean = {
        name: sum(getattr(figure, name) * figure.tokens for figure in figures) / total
        for name in ("kl_divergence", "top1_agreement")
    }
    log_ratio = sum(torch.tensor(figure.perplexity_ratio).log().item() * figure.tokens for figure in figures) / total
    return {"tokens": total, "perplexity_ratio": torch.tensor(log_ratio).exp().item(), **mean}


def show_step(progress: TuningProgress) -> None:
    if progress.step % 10 == 0:
        print(f"step {progress.step}: KL {progress.kl_divergence:.4f}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "books-llama-7m")
    parser.add_argument("--planes", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--target-bits", type=float, nargs="*", default=[], help="mixed layouts, at 16 times the size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--outlier-fraction", type=float, default=1 / 128)
    parser.add_argument("--windows", type=int, default=256, help="of calibration, at most")
    parser.add_argument("--tune", choices=["scales", "signs"], help="also with tuning")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=TuningOptions.learning_rate)
    parser.add_argument("--sign-learning-rate", type=float, default=TuningOptions.sign_learning_rate)
    parser.add_argument("--tokens", type=int, help="of held-out text, half of each book (default: all)")
    parser.add_argument("--statistics", type=Path, help="directory that keeps the statistics between runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = read_texts([EXAMPLES / "text" / "held_out"])
    texts = read_texts([EXAMPLES / "text" / "calibration"])
    windows = calibration_windows(tokenizer, texts, max_windows=arguments.windows)
    linears = linears_of(model)
    start = time.process_time()
    store = StatisticsStore(arguments.statistics, f"bench {arguments.windows}")
    collect_statistics(model, windows, linears, store=store)
    statistics_seconds = time.process_time() - start
    hessians = {name: store[name].hessian for name in linears}

    plans: list[tuple[str, dict[str, tuple[int, int]]]] = [
        (
            f"{planes} planes",
            {
                name: (planes, outlier_count(module.in_features, arguments.outlier_fraction))
                for name, module in linears.items()
            },
        )
        for planes in arguments.planes
    ]
    if arguments.target_bits:
        candidates = measure_candidates(
            model,
            {name: module.weight for name, module in linears.items()},
            store,
            windows[::16],
            enlargement=ENLARGEMENT,
        )
        plans += [(f"mixed, at most {target:g} bits", allocate(candidates, target)) for target in arguments.target_bits]
    rows: list[dict[str, Any]] = []
    for name, layouts in plans:
        start = time.process_time()
        packed = {
            module: quantize_weight_calibrated(
                linears[module].weight, hessians[module], planes=planes, outliers=outliers, rounds=arguments.rounds
            ).packed_weight
            for module, (planes, outliers) in layouts.items()
        }
        seconds = time.process_time() - start
        sizes = [weight.layout for weight in packed.values()]
        shared = {"bits": bits(sizes), "bits_enlarged": bits(sizes, ENLARGEMENT)}
        weights = sum(layout.out_features * layout.in_features for layout in sizes)
        figures = evaluate(model, tokenizer, held_out, packed, arguments.tokens)
        rows.append({"name": name, **shared, **figures, "seconds_per_million": seconds / weights * 1e6})
        print(rows[-1], file=sys.stderr, flush=True)
        if arguments.tune:
            start = time.process_time()
            options = TuningOptions(
                signs=arguments.tune == "signs",
                steps=arguments.steps,
                learning_rate=arguments.learning_rate,
                sign_learning_rate=arguments.sign_learning_rate,
            )
            result = tune(model, packed, windows, options, progress=show_step)
            seconds = time.process_time() - start
            figures = evaluate(model, tokenizer, held_out, result.packed_weights, arguments.tokens)
            rows.append(
                {
                    "name": f"{name}, {arguments.tune} tuned ({arguments.steps} steps)",
                    **shared,
                    **figures,
                    "seconds_per_million": seconds / weights * 1e6,
                    "kept": result.kept,
                    "kl_before": result.kl_before,
                    "kl_after": result.kl_after,
                    "changed_signs": result.changed_signs,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"statistics_seconds": statistics_seconds, "rows": rows}))
        return
    print(
        "| layout | bits/weight here | at 4096 columns | perplexity ratio | mean KL, nats | same top-1 "
        "| CPU s per M weights |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['name']} | {row['bits']:.3f} | {row['bits_enlarged']:.3f} | {row['perplexity_ratio']:.3f} "
            f"| {row['kl_divergence']:.4f} | {100 * row['top1_agreement']:.1f} % | {row['seconds_per_million']:.2f} |"
        )
    print(
        f"\n{len(windows)} windows of {windows.shape[1]} tokens for calibration ({statistics_seconds:.0f} CPU s for "
        f"the statistics), {int(rows[0]['tokens'])} tokens of held-out text."
    )


if __name__ == "__main__":
    main()
