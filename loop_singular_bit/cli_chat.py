"""`loop-singular-bit chat`: a conversation with a model; a packed one runs natively, without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from . import cli_engines
from .cli_runtime_options import add_sampling_arguments, check_sampling, run_summary, sampling_options

HELP = "talk to a packed or an ordinary chat model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="packed or ordinary model directory, or organization/name")
    parser.add_argument("--system", metavar="TEXT", help="instructions before the first message")
    add_sampling_arguments(parser, temperature=0.7, max_new_tokens=512)
    cli_engines.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="answers only")


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_OK

    check_sampling(parsed)
    with cli_engines.open_model(parsed, show_progress=not parsed.quiet) as model:
        messages = [] if parsed.system is None else [{"role": "system", "content": parsed.system}]
        if not model.tokenizer.has_chat_template:
            raise ValueError(f"{parsed.model}: has no chat template; use `generate`, which continues a text")
        if not parsed.quiet:
            print("An empty line or Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
        for question in _questions(parsed.quiet):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": _answer(model, messages, parsed)})
    return EXIT_OK


def _questions(quiet: bool) -> Iterator[str]:
    prompt = "" if quiet or not sys.stdin.isatty() else "> "
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            return
        yield question


def _answer(model: cli_engines.TextModel, messages: list[dict[str, str]], parsed: argparse.Namespace) -> str:
    """Prints the answer as it is made; what came before Ctrl-C stays part of the conversation."""
    tokens = model.tokenizer.encode(model.tokenizer.chat_prompt(messages), special_tokens=False)
    # The conversation so far is in the cache already.
    sampling: dict[str, Any] = {**sampling_options(parsed), "reuse_cache": True}
    pieces: list[str] = []
    try:
        for piece in model.stream_tokens(tokens, parsed.max_new_tokens, sampling=sampling, stop=parsed.stop):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    if not parsed.quiet:
        print(run_summary(model.last_run), file=sys.stderr)
    return "".join(pieces)
