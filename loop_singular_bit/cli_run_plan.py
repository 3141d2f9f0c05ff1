"""`loop-singular-bit run-plan`: what the native runtime would hold in memory, line by line, before it runs."""

from __future__ import annotations

import argparse

from .cli_runtime_options import add_runtime_arguments, runtime_options

HELP = "show what running a packed model natively would hold in memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="packed model directory, or organization/name")
    add_runtime_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_OK, print_json
    from .streaming import run_plan

    plan = run_plan(parsed.model, **runtime_options(parsed))
    if parsed.json:
        print_json(plan)
        return EXIT_OK
    for line in plan["lines"]:
        print(f"{line['bytes'] / 1e6:10.1f} MB  {line['name']}")
    print(f"{plan['total_bytes'] / 1e6:10.1f} MB  in all", end="")
    print(f" of {plan['budget_bytes'] / 1e6:.1f} MB" if plan["budget_bytes"] else "")
    where = f"back end {plan['back_end']}, {plan['pinned_units']} of {plan['units']} units stay in memory"
    print(
        f"{where}; {plan['streamed_bytes'] / 1e6:.1f} of {plan['weight_bytes'] / 1e6:.1f} MB of weights are read for "
        f"each token, or for each {plan['prefill_tokens']} tokens of a prompt; {plan['threads']} threads"
    )
    return EXIT_OK
