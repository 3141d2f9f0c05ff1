"""`loop-singular-bit generate`: text from a packed or an ordinary model, word by word as it is made."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from . import cli_generate_native

HELP = "let a packed or an ordinary model continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("model", metavar="DIR", help="packed or ordinary model directory")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to continue")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="tokens to write (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest word, more is more varied"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest words with this total probability (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids repetition (default 1)")
    parser.add_argument("--activation-precision", choices=("int8", "int16", "exact"), help="of packed layers")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    cli_generate_native.add_arguments(parser)
    add_output_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_INTERRUPTED, EXIT_OK, print_json

    _check(parsed)
    if parsed.engine == "native":
        return cli_generate_native.run(parsed)
    import torch
    from transformers import TextStreamer

    from .cli_models import load_language_model, load_tokenizer, peak_resident_mb

    tokenizer = load_tokenizer(parsed.model)
    model: Any = load_language_model(
        parsed.model, parsed.dtype, parsed.activation_precision, show_progress=not parsed.quiet and not parsed.json
    )
    if not model.can_generate():
        raise ValueError(f"{parsed.model}: {type(model).__name__} cannot generate text")
    inputs = tokenizer(parsed.prompt, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ValueError("--prompt: expected at least one token, got an empty prompt and a tokenizer that adds none")

    class Recorder(TextStreamer):
        """Counts tokens and keeps the text, so that an interrupted run can still report both."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.text = ""
            self.token_times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.token_times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            if not parsed.json:
                print(text, end="\n" if stream_end else "", flush=True)

    streamer = Recorder()
    torch.manual_seed(parsed.seed)
    sampling = parsed.temperature > 0
    options = {"temperature": parsed.temperature, "top_p": parsed.top_p} if sampling else {}
    if not parsed.json:
        print(parsed.prompt, end="", flush=True)
    interrupted = False
    start = time.perf_counter()
    try:
        model.generate(
            **inputs,
            max_new_tokens=parsed.max_new_tokens,
            do_sample=sampling,
            repetition_penalty=parsed.repetition_penalty,
            streamer=streamer,
            **options,
        )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    tokens = len(streamer.token_times)
    decoding = streamer.token_times[-1] - streamer.token_times[0] if tokens > 1 else 0.0
    results = {
        "model": str(parsed.model),
        "prompt": parsed.prompt,
        "text": streamer.text,
        "prompt_tokens": prompt_tokens,
        "new_tokens": tokens,
        "interrupted": interrupted,
        "seconds_to_first_token": streamer.token_times[0] - start if tokens else None,
        "tokens_per_second": (tokens - 1) / decoding if decoding > 0 else None,
        "peak_resident_mb": peak_resident_mb(),
    }
    if parsed.json:
        print_json(results)
    elif not parsed.quiet:
        speed = results["tokens_per_second"]
        print(
            f"{prompt_tokens} tokens read, {tokens} written{', interrupted' if interrupted else ''}"
            + ("" if speed is None else f", {speed:.1f} tokens/s after the first")
            + f", peak resident memory {results['peak_resident_mb']:.0f} MB",
            file=sys.stderr,
        )
    return EXIT_INTERRUPTED if interrupted else EXIT_OK


def _check(parsed: argparse.Namespace) -> None:
    cli_generate_native.check(parsed)
    if parsed.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {parsed.max_new_tokens}")
    if parsed.temperature < 0:
        raise ValueError(f"--temperature: expected at least 0, got {parsed.temperature}")
    if not 0 < parsed.top_p <= 1:
        raise ValueError(f"--top-p: expected more than 0 and at most 1, got {parsed.top_p}")
    if parsed.repetition_penalty <= 0:
        raise ValueError(f"--repetition-penalty: expected more than 0, got {parsed.repetition_penalty}")
