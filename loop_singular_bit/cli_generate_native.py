"""`loop-singular-bit generate --engine native`: text within a memory budget, without torch."""

from __future__ import annotations

import argparse
import sys

from .cli_runtime_options import BACK_ENDS, CACHE_TYPES, run_summary, sampling_options

ENGINES = ("transformers", "native")
_NATIVE_ONLY = {"target_ram_mb": None, "context_length": None, "back_end": "auto", "cache_type": "float16", "top_k": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="transformers (default) runs any model; native runs packed Llama, Mistral, Qwen2 and Qwen3 without torch",
    )
    group = parser.add_argument_group("only with --engine native")
    group.add_argument("--target-ram-mb", metavar="MB", type=float, help="limit of peak resident memory of the process")
    group.add_argument("--context-length", metavar="N", type=int, help="default: the model's, at most 2048")
    group.add_argument("--back-end", choices=BACK_ENDS, default="auto", help="where weights lie")
    group.add_argument("--cache-type", choices=CACHE_TYPES, default="float16", help="of keys and values")
    group.add_argument("--top-k", metavar="K", type=int, default=0, help="sample from this many likeliest words")
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="stop before this text; repeatable")


def check(parsed: argparse.Namespace) -> None:
    """Refuses options that the chosen engine does not read.

    Raises:
        ValueError: naming the option.
    """
    if parsed.engine == "native":
        if parsed.dtype != "auto":
            raise ValueError("--dtype: the native engine computes in float32; use --activation-precision")
        return
    changed = [name for name, default in _NATIVE_ONLY.items() if getattr(parsed, name) != default]
    changed += ["stop"] if parsed.stop else []
    if changed:
        raise ValueError(f"--{changed[0].replace('_', '-')}: needs --engine native")


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_INTERRUPTED, EXIT_OK, print_json
    from .streaming import load_compressed_model

    with load_compressed_model(
        parsed.model,
        target_ram_mb=parsed.target_ram_mb,
        context_length=parsed.context_length,
        back_end=parsed.back_end,
        cache_type=parsed.cache_type,
        activation_precision=parsed.activation_precision or "int8",
    ) as manager:
        pieces: list[str] = []
        if not parsed.json:
            print(parsed.prompt, end="", flush=True)
        interrupted = False
        try:
            for piece in manager.stream(
                parsed.prompt, parsed.max_new_tokens, stop=parsed.stop, **sampling_options(parsed)
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
                    "prompt": parsed.prompt,
                    "text": "".join(pieces),
                    "interrupted": interrupted,
                    **manager.last_run,
                    "plan": manager.plan,
                }
            )
        else:
            print()
            if not parsed.quiet:
                print(run_summary(manager.last_run), file=sys.stderr)
    return EXIT_INTERRUPTED if interrupted else EXIT_OK
