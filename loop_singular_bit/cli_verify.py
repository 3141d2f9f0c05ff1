"""`loop-singular-bit verify`: reads a packed checkpoint from end to end and says what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "check hashes, shapes, index ranges and scales of a packed checkpoint, and its error against the original"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("directory", metavar="DIR", type=Path, help="packed checkpoint")
    parser.add_argument(
        "--against", metavar="SRC", type=Path, help="the original: also measure the error of every weight"
    )
    add_output_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .checkpoint_verification import verify_checkpoint
    from .cli import EXIT_BAD_CHECKPOINT, EXIT_OK, PROGRAM, print_json

    with tqdm(total=0, unit=" modules", disable=parsed.quiet, leave=False, file=sys.stderr) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        results = verify_checkpoint(parsed.directory, parsed.against, update)
    if parsed.json:
        print_json(results)
    elif not parsed.quiet:
        _print(results)
    if results["passed"]:
        return EXIT_OK
    count = len(results["problems"])
    print(f"{PROGRAM}: {parsed.directory}: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
    return EXIT_BAD_CHECKPOINT


def _print(results: dict[str, Any]) -> None:
    for name, state in results["checksums"].items():
        print(f"{name}: SHA-256 {state}")
    for problem in results["problems"]:
        print(f"PROBLEM {problem['where']}: {problem['problem']}")
    if results["relative_error"] is not None:
        worst = max(results["errors"], key=lambda error: error["relative_error"] or 0.0)
        print(
            f"relative error against {results['against']}: {results['relative_error']:.4f} over all packed weights, "
            f"at most {worst['relative_error']:.4f} ({worst['name']})"
        )
    state = "nothing is wrong" if results["passed"] else "DAMAGED"
    print(f"{results['modules']} packed modules, {results['kept_tensors']} other tensors: {state}")
