"""`loop-singular-bit evaluate`: a model on text and on tasks, and how far it is from its original."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HELP = (
    "perplexity on texts and, against the original, perplexity ratio, KL divergence and top-1 agreement; tasks of "
    "lm-evaluation-harness"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("model", metavar="DIR", help="packed or ordinary model directory")
    parser.add_argument("--against", metavar="SRC", help="the original; without it only perplexity is evaluated")
    parser.add_argument(
        "--text", metavar="TEXT", nargs="+", default=[], help="UTF-8 text files, or directories of *.txt"
    )
    parser.add_argument("--window", metavar="N", type=int, default=512, help="positions per window (default 512)")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="predict N tokens, in equal shares from the texts")
    parser.add_argument(
        "--tasks",
        metavar="NAME",
        nargs="+",
        default=[],
        help="tasks of lm-evaluation-harness: its own, or those that --include-path defines",
    )
    parser.add_argument("--include-path", metavar="DIR", type=Path, help="YAML files that define tasks")
    parser.add_argument("--num-fewshot", metavar="N", type=int, help="solved examples before each question of a task")
    parser.add_argument("--limit", metavar="N", type=int, help="questions per task (default: all)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=1, help="questions at once (default 1)")
    parser.add_argument(
        "--quality-threshold",
        metavar="PERCENT",
        type=float,
        help="fail (exit code 5) when perplexity rises by more than this over the original's; needs --against",
    )
    parser.add_argument(
        "--max-kl-divergence",
        metavar="NATS",
        type=float,
        help="fail (exit code 5) when the mean KL divergence is above this; needs --against",
    )
    parser.add_argument(
        "--min-top1-agreement",
        metavar="SHARE",
        type=float,
        help="fail (exit code 5) when fewer first words agree, 0 to 1; needs --against",
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

    limits = {name: getattr(parsed, name) for name in ("quality_threshold", "max_kl_divergence", "min_top1_agreement")}
    for name, limit in limits.items():
        option = f"--{name.replace('_', '-')}"
        if limit is not None and parsed.against is None:
            raise ValueError(f"{option} compares with an original; name it with --against SRC")
        if limit is not None and not parsed.text:
            raise ValueError(f"{option} is about texts; name some with --text")
    if not parsed.text and not parsed.tasks:
        raise ValueError("nothing to evaluate: give --text, --tasks or both")

    from .calibration_texts import read_texts

    texts = read_texts(parsed.text)

    from .cli_models import load_language_model, load_tokenizer, peak_resident_mb
    from .validation import NOT_EVALUATED

    show_progress = not parsed.quiet and not parsed.json
    tokenizer = load_tokenizer(parsed.model)
    model = load_language_model(parsed.model, parsed.dtype, parsed.activation_precision, show_progress)
    original = (
        None if parsed.against is None else load_language_model(parsed.against, parsed.dtype, None, show_progress)
    )
    start = time.perf_counter()
    results: dict[str, Any] = {
        "model": str(parsed.model),
        "original": parsed.against if parsed.against is not None else NOT_EVALUATED,
        "texts": parsed.text,
    }
    missed: list[str] = []
    if texts:
        figures, missed = _evaluate_texts(parsed, model, original, tokenizer, texts, limits)
        results |= figures
    if parsed.tasks:
        from .task_evaluation import evaluate_tasks

        results |= evaluate_tasks(
            model,
            tokenizer,
            parsed.tasks,
            original=original,
            include_path=parsed.include_path,
            num_fewshot=parsed.num_fewshot,
            limit=parsed.limit,
            batch_size=parsed.batch_size,
        )
    results |= {
        "dtype": parsed.dtype,
        "seconds": time.perf_counter() - start,
        "peak_resident_mb": peak_resident_mb(),
    }
    if parsed.json:
        print_json(results)
    elif not parsed.quiet:
        _print_results(results)
    for line in missed:
        print(f"{PROGRAM}: quality below the threshold: {line}", file=sys.stderr)
    return EXIT_QUALITY if missed else EXIT_OK


def _evaluate_texts(
    parsed: argparse.Namespace, model: Any, original: Any, tokenizer: Any, texts: list[str], limits: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The figures, and a line for each limit that was missed."""
    from .language_model_evaluation import evaluate_language_model
    from .validation import NOT_EVALUATED, QualityValidator

    is_judged = any(limit is not None for limit in limits.values())
    validator = QualityValidator(**limits)
    with _ProgressBar(disable=parsed.quiet) as progress:
        evaluation = evaluate_language_model(
            model,
            tokenizer,
            texts,
            original=original,
            window=parsed.window,
            max_tokens=parsed.max_tokens,
            progress=progress.update,
        )
    figures = validator.judge_model(evaluation)
    for name in limits:
        if figures[name] is None:
            figures[name] = NOT_EVALUATED
    if not is_judged:
        figures["passed"] = NOT_EVALUATED
    return figures, [
        f"{criterion.measured:.4g} {criterion.unit}, the limit is {criterion.limit:g}"
        for criterion in validator.model_criteria(evaluation)
        if is_judged and not criterion.passed
    ]


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


def _print_results(results: dict[str, Any]) -> None:
    from .cli import make_console

    console = make_console()
    if "perplexity" in results:
        console.print(_text_table(results))
        start = ", each with a beginning-of-sequence token" if results["beginning_token"] else ""
        console.print(
            f"{results['tokens']} tokens in {results['windows']} windows of up to {results['window']} positions"
            f"{start}. In brackets 95 % confidence intervals, from windows drawn again."
        )
    if "tasks" in results:
        console.print(_task_table(results))
        console.print(f"lm-evaluation-harness {results['harness_version']}. ± is the standard error.")
    console.print(f"{results['dtype']}, {results['seconds']:.0f} s")


def _text_table(results: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    columns = [("all texts" if results["per_text"] else "", results)]
    columns += [(Path(name).name, text) for name, text in zip(results["texts"], results["per_text"], strict=False)]
    if len(results["per_text"]) != len(results["texts"]):
        columns = columns[:1]
    for heading, _ in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for label, name, digits in (
        ("perplexity of the original", "perplexity_original", 2),
        ("perplexity", "perplexity", 2),
        ("perplexity ratio", "perplexity_ratio", 4),
        ("KL divergence, nats per token", "kl_divergence", 4),
        ("  median", "kl_divergence_median", 4),
        ("  99th percentile", "kl_divergence_p99", 3),
        ("top-1 agreement", "top1_agreement", 4),
    ):
        table.add_row(label, *(_with_interval(figures, name, digits) for _, figures in columns))
    table.add_row("tokens", *(str(figures["tokens"]) for _, figures in columns))
    table.add_row("grade of the KL divergence", results["grade"])
    return table


def _with_interval(figures: dict[str, Any], name: str, digits: int) -> str:
    value, interval = figures[name], figures[f"{name}_interval"]
    if isinstance(value, str):
        return value
    shown = "" if isinstance(interval, str) else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{value:.{digits}f}{shown}"


def _task_table(results: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    metrics = [(task, name, metric) for task, named in results["tasks"].items() for name, metric in named.items()]
    is_compared = any("original" in metric for _, _, metric in metrics)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "metric", "model", *(("original", "difference") if is_compared else ()), "questions"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, name, metric in metrics:
        cells = [task, name, _with_error(metric["value"], metric["standard_error"])]
        if is_compared:
            cells += [
                _with_error(metric["original"], metric["original_standard_error"]),
                f"{metric['difference']:+.4f}",
            ]
        table.add_row(*cells, str(results["num_questions"].get(task, "")))
    return table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
