"""Compression methods side by side on the bundled model: benchmarks/results/method_comparison.md, .json and .png.

    python benchmarks/bench_methods.py [--methods NAME...] [--metrics NAME...] [--output DIRECTORY]

Calibration on the three books of examples/text/calibration (64 windows of 512 tokens), figures of 20,440 tokens, half
from each book of examples/text/held_out. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loop_singular_bit.benchmark import BenchmarkProgress, CompressionBenchmark  # noqa: E402
from loop_singular_bit.comparison.report import comparison_markdown, save_comparison  # noqa: E402

EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "benchmarks" / "results"


def texts_of(directory: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.txt"))]


def show(progress: BenchmarkProgress) -> None:
    print(f"{progress.done}/{progress.total} {progress.description}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "books-llama-7m")
    parser.add_argument("--methods", nargs="+", help="methods or single variants (default: all)")
    parser.add_argument("--metrics", nargs="+", help="(default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = CompressionBenchmark().run_comprehensive_test(
        arguments.model,
        arguments.methods,
        arguments.metrics,
        texts=texts_of(EXAMPLES / "text" / "held_out"),
        calibration_texts=texts_of(EXAMPLES / "text" / "calibration"),
        progress=show,
    )
    results["model"] = arguments.model.name
    save_comparison(results, arguments.output)
    print(comparison_markdown(results))


if __name__ == "__main__":
    main()
