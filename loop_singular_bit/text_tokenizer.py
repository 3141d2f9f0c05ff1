"""Text to tokens and back, and chat templates, for the native runtime: tokenizers only, no Transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


class TextTokenizer:
    """The tokenizer of a model directory.

    Raises:
        ImportError: the package tokenizers is missing.
        CheckpointError: the directory has no tokenizer.json, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("text needs the package tokenizers: pip install tokenizers") from error
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{directory}: has no {TOKENIZER_FILE}; only token ids can be used")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{path}: {error}") from error
        self._directory = directory

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """special_tokens: whether the tokenizer adds its own, such as one at the beginning."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def decoder(self) -> TextDecoder:
        return TextDecoder(self._tokenizer)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages with `role` and `content` in the form that the model was trained on, up to the assistant's turn.

        Raises:
            CheckpointError: the model has no chat template, or it rejects the messages.
        """
        from datetime import datetime

        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        config = self._config()

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        try:
            template = environment.from_string(self._chat_template(config))
            return template.render(messages=list(messages), add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise CheckpointError(f"{self._directory}: chat template: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return (self._directory / CHAT_TEMPLATE_FILE).is_file() or "chat_template" in self._config()

    def _config(self) -> dict[str, Any]:
        path = self._directory / TOKENIZER_CONFIG_FILE
        if not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return config if isinstance(config, dict) else {}

    def _chat_template(self, config: dict[str, Any]) -> str:
        path = self._directory / CHAT_TEMPLATE_FILE
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # named templates
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        if not isinstance(template, str):
            raise CheckpointError(
                f"{self._directory}: {TOKENIZER_CONFIG_FILE} has no chat template: this is not a chat model"
            )
        return template


class TextDecoder:
    """Text piece by piece: a piece ends where the tokens so far say what its last character is."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""


class StopWatcher:
    """Passes text on until a stop string occurs; what could still become one waits."""

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError("stop: expected strings that are not empty")
        self._stop = tuple(stop)
        self._waiting = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that may be shown now."""
        self._waiting += text
        found = [index for stop in self._stop if (index := self._waiting.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._waiting = self._waiting[: min(found)], ""
            return shown
        held = max((_overlap(self._waiting, stop) for stop in self._stop), default=0)
        cut = len(self._waiting) - held
        shown, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        shown, self._waiting = self._waiting, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
