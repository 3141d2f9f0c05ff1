"""`loop-singular-bit chat`: a conversation with a packed model on the native runtime, which needs no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .cli_runtime_options import (
    add_runtime_arguments,
    add_sampling_arguments,
    run_summary,
    runtime_options,
    sampling_options,
)

if TYPE_CHECKING:
    from .streaming import StreamingManager

HELP = "talk to a packed model, natively and within a memory budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="packed model directory, or organization/name")
    parser.add_argument("--system", metavar="TEXT", help="instructions before the first message")
    add_runtime_arguments(parser)
    add_sampling_arguments(parser, temperature=0.7, max_new_tokens=512)
    parser.add_argument("--quiet", action="store_true", help="answers only")


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_OK
    from .streaming import load_compressed_model

    with load_compressed_model(parsed.model, **runtime_options(parsed)) as manager:
        messages = [] if parsed.system is None else [{"role": "system", "content": parsed.system}]
        if not manager.tokenizer.has_chat_template:
            raise ValueError(f"{parsed.model}: has no chat template; use `generate`, which continues a text")
        if not parsed.quiet:
            print("An empty line or Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
        for question in _questions(parsed.quiet):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": _answer(manager, messages, parsed)})
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


def _answer(manager: StreamingManager, messages: list[dict[str, str]], parsed: argparse.Namespace) -> str:
    """Prints the answer as it is made; what came before Ctrl-C stays part of the conversation."""
    tokens = manager.tokenizer.encode(manager.tokenizer.chat_prompt(messages), special_tokens=False)
    # The conversation so far is in the cache already.
    sampling: dict[str, Any] = {**sampling_options(parsed), "reuse_cache": True}
    pieces: list[str] = []
    try:
        for piece in manager.stream_tokens(tokens, parsed.max_new_tokens, sampling=sampling, stop=parsed.stop):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    if not parsed.quiet:
        print(run_summary(manager.last_run), file=sys.stderr)
    return "".join(pieces)
