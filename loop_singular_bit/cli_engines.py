"""What runs a model for `generate` and `chat`: the native runtime where it can, else Transformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .cli_runtime_options import add_runtime_arguments, native_options_given, runtime_options
from .errors import UnsupportedModelError
from .local_models import is_packed, resolve_model
from .text_tokenizer import TOKENIZER_FILE

ENGINES = ("auto", "native", "transformers")


class ChatTokenizer(Protocol):
    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]: ...

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str: ...


class TextModel(Protocol):
    """`StreamingManager` and `TransformersModel`, as the commands see them."""

    last_run: dict[str, Any]

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    @property
    def plan(self) -> dict[str, Any] | None: ...

    def stream_tokens(
        self, tokens: Sequence[int], max_new_tokens: int, *, sampling: dict[str, Any], stop: Sequence[str] = ()
    ) -> Iterator[str]: ...

    def close(self) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="native runs packed Llama, Mistral, Qwen2 and Qwen3 without torch, transformers runs any model; auto "
        "(default) takes native where it can",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="only with Transformers"
    )
    add_runtime_arguments(parser)


@contextmanager
def open_model(parsed: argparse.Namespace, *, show_progress: bool) -> Iterator[TextModel]:
    """The model on the engine that was asked for; with `auto`, says on standard error why it is not the native one.

    Raises:
        ValueError: an option that the chosen engine does not read was given.
    """
    model = _open(parsed, show_progress)
    try:
        yield model
    finally:
        model.close()


def _open(parsed: argparse.Namespace, show_progress: bool) -> TextModel:
    given = native_options_given(parsed)
    if parsed.engine == "native":
        if parsed.dtype != "auto":
            raise ValueError("--dtype: the native engine computes in float32; use --activation-precision")
        return _open_native(parsed)
    if parsed.engine == "transformers":
        if given:
            raise ValueError(f"{given[0]}: needs the native engine, and --engine transformers was given")
        return _open_transformers(parsed, show_progress)
    reason = _reason_against_native(parsed)
    if reason is None:
        try:
            return _open_native(parsed)
        except UnsupportedModelError as error:
            reason = str(error)
    if given:
        raise ValueError(f"{given[0]}: needs the native engine, which cannot be used: {reason}")
    if show_progress:
        print(f"loop-singular-bit: using Transformers: {reason}", file=sys.stderr)
    return _open_transformers(parsed, show_progress)


def _reason_against_native(parsed: argparse.Namespace) -> str | None:
    if parsed.dtype != "auto":
        return "--dtype was given, which the native engine does not read"
    if not is_packed(parsed.model):
        return f"{parsed.model} is not a packed checkpoint"
    directory = resolve_model(parsed.model)
    if not (directory / TOKENIZER_FILE).is_file():
        return f"{directory} has no {TOKENIZER_FILE}, which the native engine needs"
    return None


def _open_native(parsed: argparse.Namespace) -> TextModel:
    from .streaming import load_compressed_model

    return load_compressed_model(parsed.model, **runtime_options(parsed))


def _open_transformers(parsed: argparse.Namespace, show_progress: bool) -> TextModel:
    try:
        from .cli_transformers_model import TransformersModel
    except ImportError as error:
        raise ImportError(
            f"{error}; Transformers is installed with: pip install 'loop-singular-bit[transformers]'"
        ) from error
    return TransformersModel(
        parsed.model,
        dtype=parsed.dtype,
        activation_precision=parsed.activation_precision,
        threads=parsed.threads,
        show_progress=show_progress,
    )
