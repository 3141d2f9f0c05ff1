"""Any language model through Transformers, with the interface that `StreamingManager` has for the command line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .cli_models import load_language_model, load_tokenizer, peak_resident_mb
from .errors import CheckpointError
from .text_tokenizer import StopWatcher


class TransformersModel:
    """A model and its tokenizer, packed or ordinary.

    Attributes:
        last_run: figures of the latest generation, as `StreamingManager.last_run`.
    """

    plan: dict[str, Any] | None = None

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        activation_precision: str | None = None,
        threads: int | None = None,
        show_progress: bool = True,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.tokenizer = TransformersTokenizer(model)
        self._model: Any = load_language_model(model, dtype, activation_precision, show_progress)
        if not self._model.can_generate():
            raise ValueError(f"{model}: {type(self._model).__name__} cannot generate text")
        self.last_run: dict[str, Any] = {}

    def close(self) -> None:
        self._model = None

    def stream_tokens(
        self, tokens: Sequence[int], max_new_tokens: int, *, sampling: dict[str, Any], stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """The text that follows the tokens, piece by piece; sampling as `StreamingManager.stream` has it."""
        watcher = StopWatcher(stop)
        run: dict[str, Any] = {"prompt_tokens": len(tokens), "new_tokens": 0, "finish_reason": "interrupted"}
        self.last_run = run
        streamer = _Streamer(self.tokenizer.tokenizer)
        work = _Generation(self._model, streamer, tokens, max_new_tokens, sampling)
        try:
            work.start()
            for text in streamer:
                if shown := watcher.add(text):
                    yield shown
                if watcher.stopped:
                    run["finish_reason"] = "stop"
                    return
            work.raise_failure()
            if rest := watcher.finish():
                yield rest
            run["finish_reason"] = "end" if streamer.last_token in work.end_tokens else "length"
        finally:
            work.stop()
            times = streamer.times
            run["new_tokens"] = len(times)
            if times:
                run["seconds_to_first_token"] = times[0] - work.started
                run["tokens_per_second"] = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
            run["peak_resident_mb"] = peak_resident_mb()


class TransformersTokenizer:
    """What the command line asks of a tokenizer, of the one that lies beside a model."""

    def __init__(self, model: str) -> None:
        self._name = model
        self.tokenizer: Any = load_tokenizer(model)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
        return ids

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja's errors, and what templates raise themselves
            raise CheckpointError(f"{self._name}: chat template: {error}") from error
        return text


class _Streamer(TextIteratorStreamer):
    """Text for the reader, and when each token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.last_token = -1

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.last_token = int(value.flatten()[-1])
        super().put(value)


class _Generation:
    """`generate` in a thread of its own, so that text can be taken as it comes; may be stopped between tokens."""

    def __init__(
        self, model: Any, streamer: _Streamer, tokens: Sequence[int], max_new_tokens: int, sampling: dict[str, Any]
    ) -> None:
        self._model, self._streamer = model, streamer
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        end = model.generation_config.eos_token_id
        self.end_tokens: set[int] = set() if end is None else {end} if isinstance(end, int) else set(end)
        self.started = time.perf_counter()
        is_sampling = sampling["temperature"] > 0
        self._arguments: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": is_sampling,
            "repetition_penalty": sampling["repetition_penalty"],
        }
        if is_sampling:
            self._arguments |= {key: sampling[key] for key in ("temperature", "top_p", "top_k")}
        self._seed = sampling["seed"]
        self._tokens = torch.tensor([list(tokens)])
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        stopping = self._stopping

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), stopping.is_set())

        try:
            torch.manual_seed(self._seed)
            self._model.generate(
                input_ids=self._tokens,
                attention_mask=torch.ones_like(self._tokens),
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                **self._arguments,
            )
        except BaseException as error:  # raised again where the text is read
            self._failure = error
            self._streamer.end()
