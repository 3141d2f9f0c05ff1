"""`loop-singular-bit benchmark`: compression methods side by side on one model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import BenchmarkProgress

HELP = "compare compression methods on a model: ours, gptq, hqq, smoothquant, bitnet, int8, rtn, binary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("model", metavar="MODEL", help="unquantized model directory, or a Hub name")
    parser.add_argument(
        "--methods", metavar="NAME", nargs="+", help="methods, or single settings such as gptq-3bit-g64 (default: all)"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME",
        nargs="+",
        help="perplexity, kl_divergence, top1_agreement, bleu, rouge, relative_error (default: all)",
    )
    parser.add_argument(
        "--text",
        metavar="TEXT",
        nargs="+",
        help="UTF-8 text files, or directories of *.txt, that the model was not trained on (default: the model writes)",
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        nargs="+",
        help="texts for the methods that calibrate, others than those of --text (default: the model writes)",
    )
    parser.add_argument("--output", metavar="DIR", help="write method_comparison.json, .md and .png there")
    parser.add_argument("--window", metavar="N", type=int, default=512, help="positions per window (default 512)")
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=20_440, help="of evaluation, 0 for all (default 20440)"
    )
    parser.add_argument("--calibration-windows", metavar="N", type=int, default=64, help="at most so many (default 64)")
    add_output_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    from .benchmark import CompressionBenchmark
    from .calibration_texts import read_texts
    from .cli import EXIT_OK, make_console, print_json
    from .comparison.report import comparison_table, protocol_lines, without_infinities

    benchmark = CompressionBenchmark(
        window=parsed.window,
        max_tokens=parsed.max_tokens or None,
        calibration_window=parsed.window,
        calibration_windows=parsed.calibration_windows,
    )
    with _ProgressBar(disable=parsed.quiet) as progress:
        results = benchmark.run_comprehensive_test(
            parsed.model,
            parsed.methods,
            parsed.metrics,
            texts=None if parsed.text is None else read_texts(parsed.text),
            calibration_texts=None if parsed.calibration is None else read_texts(parsed.calibration),
            output_directory=parsed.output,
            progress=progress.update,
        )
    if parsed.json:
        print_json(without_infinities(results))
    elif not parsed.quiet:
        console = make_console()
        console.print(comparison_table(results))
        for line in protocol_lines(results):
            console.print(line, markup=False)
        if parsed.output is not None:
            console.print(f"written to {Path(parsed.output)}/method_comparison.json, .md, .png", markup=False)
    return EXIT_OK


class _ProgressBar:
    """The variant that is being measured and how many are done, on standard error."""

    def __init__(self, disable: bool) -> None:
        self._disable = disable
        self._bar: Any = None

    def update(self, progress: BenchmarkProgress) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=progress.total, unit=" variants", disable=self._disable, leave=False)
        self._bar.set_description(progress.description, refresh=False)
        self._bar.update(progress.done - self._bar.n)
        self._bar.refresh()

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
