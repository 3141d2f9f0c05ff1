"""Packed models on the native runtime: weights stay in memory or stream from the disk under a declared budget.

Importing this module, and running a model with it, imports neither torch nor Transformers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from . import runtime_library
from .errors import CheckpointError, MemoryBudgetExceeded
from .local_models import list_models, resolve_model, weight_files
from .machine import processor_name
from .text_tokenizer import StopWatcher, TextTokenizer

__all__ = ["StreamingManager", "get_system_info", "list_models", "load_compressed_model"]

_CHECKSUM_FILE = "checksums.sha256"
_READ_RATE_BYTES = 512 << 20


class StreamingManager:
    """A packed model that generates text within a declared budget of resident memory.

    The budget counts the whole process, as its peak (VmHWM): interpreter, tokenizer, buffers, keys and values,
    activations. It is checked before the model is opened (`plan` has a line per consumer) and watched while it runs.

    Args:
        model_path: directory of a packed checkpoint, or a name that `load_compressed_model` resolves.
        target_ram_mb: the budget, in units of 10^6 bytes; None for none.
        max_layers_in_ram: weights of at most this many decoder layers are in memory at a time, buffers included;
            None for as many as the budget holds.
        prefetch_enabled: read the next weights while the present ones are computed with
            (up to sixteen units instead of one).
        context_length: tokens of prompt and answer together; None means the model's, at most 2048.
        back_end: "resident" keeps all weights in memory, "direct" streams past the page cache, "mmap" streams through
            it, "auto" picks by budget, size and free memory.
        activation_precision: "int8", "int16" or "exact", as in `ops.packed_linear`.
        cache_type: of keys and values: "float16", "int8" or "float32".
        threads: None means one per processor.
        prefill_tokens: prompt tokens that share one pass over the weights; None means as many as fit, at most 512.
        verify_checksums: hash all weight files against checksums.sha256 first.

    Attributes:
        directory: of the checkpoint.
        last_run: figures of the latest generation: prompt_tokens, new_tokens, seconds_to_first_token,
            tokens_per_second, finish_reason ("end", "stop", "length" or "interrupted"), peak_resident_mb.

    Raises:
        MemoryBudgetExceeded: the budget cannot be met; the message says what each part needs.
        CheckpointError: the checkpoint is missing, damaged or of a kind that the runtime does not run.
        ValueError: an argument is out of range.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        target_ram_mb: float | None = 400,
        max_layers_in_ram: int | None = 1,
        prefetch_enabled: bool = True,
        *,
        context_length: int | None = None,
        back_end: str = "auto",
        activation_precision: str = "int8",
        cache_type: str = "float16",
        threads: int | None = None,
        prefill_tokens: int | None = None,
        verify_checksums: bool = False,
    ) -> None:
        self.directory = resolve_model(model_path)
        self.last_run: dict[str, Any] = {}
        options = _options(
            self.directory,
            target_ram_mb=target_ram_mb,
            max_layers_in_ram=max_layers_in_ram,
            prefetch_enabled=prefetch_enabled,
            context_length=context_length,
            back_end=back_end,
            activation_precision=activation_precision,
            cache_type=cache_type,
            threads=threads,
            prefill_tokens=prefill_tokens,
        )
        if verify_checksums:
            _verify_checksums(self.directory)
        # Before the plan is made: what the tokenizer holds belongs to the process that the budget counts.
        self._tokenizer = TextTokenizer(self.directory) if (self.directory / "tokenizer.json").is_file() else None
        self._model = runtime_library.NativeModel(options)
        description = self._model.describe()
        self.plan: dict[str, Any] = description.pop("plan")
        self._facts = description

    def __enter__(self) -> StreamingManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives all memory back; the model cannot be used afterwards."""
        self._model.close()

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            return TextTokenizer(self.directory)  # raises, saying what is missing
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        size: int = self._facts["vocabulary"]
        return size

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer: of generation_config.json, else of config.json."""
        path = self.directory / "generation_config.json"
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return frozenset([value] if isinstance(value, int) else value)
        return frozenset(self._facts["end_tokens"])

    def statistics(self) -> dict[str, Any]:
        """bytes_read and seconds_waited since the model was opened, direct, peak_resident_bytes, length in tokens."""
        return self._model.statistics()

    def logits(self, ids: Sequence[int]) -> memoryview[float]:
        """Logits of every position: float32 [len(ids), vocabulary_size]; `numpy.asarray` takes it without a copy."""
        return self._model.logits(ids, self.vocabulary_size)

    def generate(self, prompt: str, max_new_tokens: int = 128, **sampling: Any) -> str:
        """The text that follows the prompt, without it. Arguments: see `stream`."""
        return "".join(self.stream(prompt, max_new_tokens, **sampling))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The text that follows the prompt, piece by piece as it is made.

        Args:
            max_new_tokens: the context may end the text earlier.
            temperature: 0 takes the likeliest token, above 0 samples.
            top_p: sample from the likeliest tokens with at least this probability together.
            top_k: sample from this many likeliest tokens; 0 for all.
            repetition_penalty: above 1 makes tokens that occurred less likely.
            seed: of sampling: the same seed gives the same text.
            stop: texts before which to stop.

        Raises:
            ValueError: an argument is out of range, or the prompt does not fit into the context.
            CheckpointError, OSError: the checkpoint is damaged, or was changed, or cannot be read.
            MemoryBudgetExceeded: the peak of the process is above the budget.
        """
        tokens = self.tokenizer.encode(prompt)
        if not tokens:
            raise ValueError("prompt: expected at least one token; it is empty, and the tokenizer adds none")
        yield from self.stream_tokens(
            tokens,
            max_new_tokens,
            stop=stop,
            sampling={
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
            },
        )

    def stream_tokens(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: dict[str, Any],
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """As `stream`, from the tokens of a prompt; sampling as there, with `reuse_cache` to keep shared tokens."""
        watcher = StopWatcher([stop] if isinstance(stop, str) else stop)
        decoder = self.tokenizer.decoder()
        for token in self.generate_tokens(tokens, max_new_tokens, sampling):
            shown = watcher.add(decoder.add(token))
            if watcher.stopped:
                self.last_run["finish_reason"] = "stop"
            if shown:
                yield shown
            if watcher.stopped:
                return
        if rest := watcher.finish():
            yield rest

    def generate_tokens(
        self, tokens: Sequence[int], max_new_tokens: int, sampling: dict[str, Any] | None = None
    ) -> Iterator[int]:
        """New tokens one by one, the one that ends the text left out; needs no tokenizer."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        room = self.plan["context"] - len(tokens)
        if room < 1:
            raise ValueError(
                f"prompt: {len(tokens)} tokens leave no room in a context of {self.plan['context']}; "
                "open the model with a larger context_length"
            )
        run: dict[str, Any] = {"prompt_tokens": len(tokens), "new_tokens": 0, "finish_reason": "interrupted"}
        self.last_run = run
        start = time.perf_counter()
        first = last = None
        self._model.start(tokens, sampling or {})
        try:
            for _ in range(min(max_new_tokens, room)):
                token = self._model.next()
                last = time.perf_counter()
                first = first or last
                run["new_tokens"] += 1
                if token in self.end_tokens:
                    run["finish_reason"] = "end"
                    return
                yield token
            run["finish_reason"] = "length"
        finally:
            if first is not None and last is not None:
                run["seconds_to_first_token"] = first - start
                run["tokens_per_second"] = (run["new_tokens"] - 1) / (last - first) if last > first else None
            run["peak_resident_mb"] = self.statistics()["peak_resident_bytes"] / 1e6


def load_compressed_model(path_or_name: str | os.PathLike[str], **options: Any) -> StreamingManager:
    """A packed model by path or by name (`organization/name`, in the Hugging Face cache or on the Hub).

    Unlike `StreamingManager` it sets no budget: the weights stay in memory where they fit, else they stream.

    Args:
        options: see `StreamingManager`.
    """
    return StreamingManager(path_or_name, **{"target_ram_mb": None, "max_layers_in_ram": None, **options})


def run_plan(model_path: str | os.PathLike[str], target_ram_mb: float | None, **options: Any) -> dict[str, Any]:
    """The plan that `StreamingManager` would follow, as a dictionary with a line per consumer of memory.

    Raises:
        MemoryBudgetExceeded: the budget cannot be met.
    """
    directory = resolve_model(model_path)
    chosen = _options(directory, target_ram_mb=target_ram_mb, **options)
    tokenizer = TextTokenizer(directory) if (directory / "tokenizer.json").is_file() else None
    plan = runtime_library.plan(chosen)
    del tokenizer
    return plan


def get_system_info(model_path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Processor, instruction sets, memory, and which budgets the local models run with.

    Args:
        model_path: a packed model whose disk is to be measured; its largest file is read.

    Returns:
        A dictionary; sizes in units of 10^6 bytes. `models` has one entry per local model: the smallest budget that
        runs it (context 512), and the one that keeps it resident.
    """
    facts = runtime_library.system()
    info: dict[str, Any] = {
        "cpu": processor_name(),
        "isa": facts["isa"],
        "supported_isas": facts["supported_isas"],
        "threads": facts["threads"],
        "ram_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6,
        "available_ram_mb": facts["available_bytes"] / 1e6,
        "disk_read_mb_per_second": None,
        "models": [],
    }
    models = list_models()
    if model_path is not None:
        directory = resolve_model(model_path)
        files = weight_files(directory)
        if not files:
            raise CheckpointError(f"{directory}: has no safetensors file")
        info["disk_read_mb_per_second"] = runtime_library.read_rate(files[0], _READ_RATE_BYTES) / 1e6
        models = [{"name": str(model_path), "path": str(directory)}]
    for model in models:
        try:
            info["models"].append({"name": model["name"], **_budgets(Path(model["path"]))})
        except CheckpointError:
            continue  # packed, but not of an architecture that the runtime runs
    return info


def _budgets(directory: Path) -> dict[str, float]:
    budgets = {}
    for key, back_end in (("smallest_budget_mb", "direct"), ("resident_budget_mb", "resident")):
        try:
            # One byte fits nothing: the refusal says what would do.
            runtime_library.plan({"directory": str(directory), "budget_bytes": 1, "back_end": back_end, "context": 512})
        except MemoryBudgetExceeded as refusal:
            budgets[key] = refusal.needed_mb
    return budgets


def _options(
    directory: Path,
    *,
    target_ram_mb: float | None = None,
    max_layers_in_ram: int | None = None,
    prefetch_enabled: bool = True,
    context_length: int | None = None,
    back_end: str = "auto",
    activation_precision: str = "int8",
    cache_type: str = "float16",
    threads: int | None = None,
    prefill_tokens: int | None = None,
) -> dict[str, Any]:
    for name, value in (
        ("target_ram_mb", target_ram_mb),
        ("max_layers_in_ram", max_layers_in_ram),
        ("context_length", context_length),
        ("threads", threads),
        ("prefill_tokens", prefill_tokens),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    return {
        "directory": str(directory),
        "budget_bytes": int((target_ram_mb or 0) * 1e6),
        "context": context_length or 0,
        "back_end": back_end,
        "activation_precision": activation_precision,
        "cache_type": cache_type,
        "threads": threads or 0,
        "prefetch": prefetch_enabled,
        "max_layers": max_layers_in_ram or 0,
        "prefill_tokens": prefill_tokens or 0,
    }


def _verify_checksums(directory: Path) -> None:
    import hashlib  # with OpenSSL: megabytes and milliseconds that a first token should not wait for

    path = directory / _CHECKSUM_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, so that checksums cannot be verified")
    known: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        checksum, _, name = line.partition("  ")
        known[name] = checksum
    for file in weight_files(directory):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if known.get(file.name) != digest.hexdigest():
            raise CheckpointError(
                f"{file}: expected the SHA-256 {known.get(file.name)} of {_CHECKSUM_FILE}, got {digest.hexdigest()}"
            )
