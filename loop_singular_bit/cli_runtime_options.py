"""Options of the commands that use the native runtime, and how they turn into arguments of StreamingManager."""

from __future__ import annotations

import argparse
from typing import Any

BACK_ENDS = ("auto", "resident", "mmap", "direct")
CACHE_TYPES = ("float16", "int8", "float32")


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--activation-precision", choices=("int8", "int16", "exact"), help="of packed layers")
    parser.add_argument("--threads", metavar="N", type=int, help="default: one per processor")
    group = parser.add_argument_group("native runtime")
    group.add_argument(
        "--target-ram-mb", metavar="MB", type=float, help="limit of peak resident memory of the process (default: none)"
    )
    group.add_argument(
        "--max-layers-in-ram",
        metavar="N",
        type=int,
        help="hold weights of at most so many layers (default: all)",
    )
    group.add_argument(
        "--context-length",
        metavar="N",
        type=int,
        help="tokens of prompt and answer (default: the model's, at most 2048)",
    )
    group.add_argument("--back-end", choices=BACK_ENDS, default="auto", help="where weights lie (default auto)")
    group.add_argument("--cache-type", choices=CACHE_TYPES, default="float16", help="of keys and values")
    group.add_argument("--no-prefetch", action="store_true", help="one buffer; read weights only when they are needed")


_NATIVE_DEFAULTS = {
    "target_ram_mb": None,
    "max_layers_in_ram": None,
    "context_length": None,
    "back_end": "auto",
    "cache_type": "float16",
    "no_prefetch": False,
}


def native_options_given(parsed: argparse.Namespace) -> list[str]:
    """Options that only the native runtime reads, as they are typed, where they differ from their defaults."""
    return [
        "--" + name.replace("_", "-") for name, default in _NATIVE_DEFAULTS.items() if getattr(parsed, name) != default
    ]


def runtime_options(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "target_ram_mb": parsed.target_ram_mb,
        "max_layers_in_ram": parsed.max_layers_in_ram,
        "prefetch_enabled": not parsed.no_prefetch,
        "context_length": parsed.context_length,
        "back_end": parsed.back_end,
        "cache_type": parsed.cache_type,
        "activation_precision": parsed.activation_precision or "int8",
        "threads": parsed.threads,
    }


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=max_new_tokens, help=f"default {max_new_tokens}"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 takes the likeliest token (default {temperature:g})"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this probability"
    )
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens (default 0: all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids repetition (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="stop before this text; repeatable")


def check_sampling(parsed: argparse.Namespace) -> None:
    """Before a model is loaded, which may take long.

    Raises:
        ValueError: naming the option that is out of range.
    """
    if parsed.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {parsed.max_new_tokens}")
    if parsed.temperature < 0:
        raise ValueError(f"--temperature: expected at least 0, got {parsed.temperature}")
    if not 0 < parsed.top_p <= 1:
        raise ValueError(f"--top-p: expected more than 0 and at most 1, got {parsed.top_p}")
    if parsed.top_k < 0:
        raise ValueError(f"--top-k: expected at least 0, got {parsed.top_k}")
    if parsed.repetition_penalty <= 0:
        raise ValueError(f"--repetition-penalty: expected more than 0, got {parsed.repetition_penalty}")


def sampling_options(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "temperature": parsed.temperature,
        "top_p": parsed.top_p,
        "top_k": parsed.top_k,
        "repetition_penalty": parsed.repetition_penalty,
        "seed": parsed.seed,
    }


def run_summary(run: dict[str, Any]) -> str:
    """One line on a generation: `StreamingManager.last_run`."""
    speed = run.get("tokens_per_second")
    first = run.get("seconds_to_first_token")
    parts = [f"{run['prompt_tokens']} tokens read, {run['new_tokens']} written"]
    if run["finish_reason"] == "interrupted":
        parts.append("interrupted")
    if first is not None:
        parts.append(f"first after {first:.2f} s")
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s after it")
    if "peak_resident_mb" in run:
        parts.append(f"peak resident memory {run['peak_resident_mb']:.0f} MB")
    return ", ".join(parts)
