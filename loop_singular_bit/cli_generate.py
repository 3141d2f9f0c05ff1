"""`loop-singular-bit generate`: text from a packed or an ordinary model, word by word as it is made."""

from __future__ import annotations

import argparse
import sys

from . import cli_engines
from .cli_runtime_options import add_sampling_arguments, check_sampling, run_summary, sampling_options

HELP = "let a packed or an ordinary model continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("model", metavar="MODEL", help="packed or ordinary model directory, or organization/name")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to continue")
    add_sampling_arguments(parser, temperature=0.0, max_new_tokens=128)
    cli_engines.add_arguments(parser)
    add_output_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_INTERRUPTED, EXIT_OK, print_json

    check_sampling(parsed)
    with cli_engines.open_model(parsed, show_progress=not parsed.quiet and not parsed.json) as model:
        tokens = model.tokenizer.encode(parsed.prompt)
        if not tokens:
            raise ValueError(
                "--prompt: expected at least one token, got an empty prompt and a tokenizer that adds none"
            )
        pieces: list[str] = []
        if not parsed.json:
            print(parsed.prompt, end="", flush=True)
        interrupted = False
        try:
            for piece in model.stream_tokens(
                tokens, parsed.max_new_tokens, sampling=sampling_options(parsed), stop=parsed.stop
            ):
                pieces.append(piece)
                if not parsed.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        if parsed.json:
            print_json(
                {
                    "model": str(parsed.model),
                    "engine": "transformers" if model.plan is None else "native",
                    "prompt": parsed.prompt,
                    "text": "".join(pieces),
                    "interrupted": interrupted,
                    **model.last_run,
                    "plan": model.plan,
                }
            )
        else:
            print()
            if not parsed.quiet:
                print(run_summary(model.last_run), file=sys.stderr)
    return EXIT_INTERRUPTED if interrupted else EXIT_OK
