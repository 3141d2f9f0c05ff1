"""`loop-singular-bit evaluate`: perplexity of a model on text, and how far it is from its original."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HELP = "perplexity on text files, and against the original: perplexity ratio, KL divergence, top-1 agreement"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("model", metavar="DIR", help="packed or ordinary model directory")
    parser.add_argument("--against", metavar="SRC", help="the original; without it only perplexity is evaluated")
    parser.add_argument("--text", metavar="FILE", nargs="+", required=True, type=Path, help="UTF-8 text files")
    parser.add_argument("--window", metavar="N", type=int, default=512, help="positions per window (default 512)")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="stop after predicting N tokens")
    parser.add_argument(
        "--quality-threshold",
        metavar="PERCENT",
        type=float,
        help="fail (exit code 5) when perplexity rises by more than this over the original's; needs --against",
    )
    parser.add_argument(
        "--activation-precision", choices=("int8", "int16", "exact"), help="of packed layers, instead of the stored one"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of everything that is not packed: float32 (default) measures exactly, bfloat16 takes half the memory",
    )
    add_output_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_OK, EXIT_QUALITY, PROGRAM, print_json

    if parsed.quality_threshold is not None and parsed.against is None:
        raise ValueError("--quality-threshold compares with an original; name it with --against SRC")
    texts = [path.read_text(encoding="utf-8") for path in parsed.text]

    from .cli_models import load_language_model, load_tokenizer, peak_resident_mb
    from .validation import NOT_EVALUATED, QualityValidator

    show_progress = not parsed.quiet and not parsed.json
    tokenizer = load_tokenizer(parsed.model)
    model = load_language_model(parsed.model, parsed.dtype, parsed.activation_precision, show_progress)
    original = (
        None if parsed.against is None else load_language_model(parsed.against, parsed.dtype, None, show_progress)
    )
    start = time.perf_counter()
    threshold = parsed.quality_threshold
    with _ProgressBar(disable=parsed.quiet) as progress:
        results = QualityValidator(0.0 if threshold is None else threshold).validate_model(
            model,
            tokenizer,
            texts,
            original=original,
            window=parsed.window,
            max_tokens=parsed.max_tokens,
            progress=progress.update,
        )
    if threshold is None:
        results["quality_threshold"] = results["passed"] = NOT_EVALUATED
    results = {
        "model": str(parsed.model),
        "original": parsed.against if parsed.against is not None else NOT_EVALUATED,
        "texts": [str(path) for path in parsed.text],
        **results,
        "dtype": parsed.dtype,
        "seconds": time.perf_counter() - start,
        "peak_resident_mb": peak_resident_mb(),
    }
    if parsed.json:
        print_json(results)
    elif not parsed.quiet:
        _print_table(results)
    if results["passed"] is False:
        print(
            f"{PROGRAM}: quality below the threshold: perplexity rose by "
            f"{results['perplexity_increase_percent']:.2f} %, allowed are {threshold:g} %",
            file=sys.stderr,
        )
        return EXIT_QUALITY
    return EXIT_OK


class _ProgressBar:
    """tokens done / tokens on standard error, with the time that is left."""

    def __init__(self, disable: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=0, unit=" tokens", desc="evaluating", disable=disable, leave=False)

    def update(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _print_table(results: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from .cli import make_console

    def figure(name: str, digits: int, error: bool = True) -> str:
        value = results[name]
        if isinstance(value, str):
            return value
        deviation = results.get(f"{name}_standard_error") if error else None
        return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if isinstance(deviation, float) else "")

    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("perplexity of the original", figure("perplexity_original", 3))
    table.add_row("perplexity", figure("perplexity", 3))
    table.add_row("perplexity ratio", figure("perplexity_ratio", 4))
    table.add_row("KL divergence, nats per token", figure("kl_divergence", 4))
    table.add_row("  median / 99th percentile", " / ".join(figure(f"kl_divergence_{q}", 4) for q in ("median", "p99")))
    table.add_row("top-1 agreement", figure("top1_agreement", 4))
    table.add_row("grade of the KL divergence", results["grade"])
    console = make_console()
    console.print(table)
    start = ", each with a beginning-of-sequence token" if results["beginning_token"] else ""
    console.print(
        f"{results['tokens']} tokens in {results['windows']} windows of up to {results['window']} positions{start}, "
        f"{results['dtype']}, {results['seconds']:.0f} s"
    )
