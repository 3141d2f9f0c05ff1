"""The native runtime `_runtime.so` through its C interface (csrc/runtime/c_api.h). Needs neither torch nor NumPy."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MemoryBudgetExceeded, UnsupportedModelError

_LIBRARY = Path(__file__).with_name("_runtime.so")
_MODEL = ctypes.c_void_p
_TOKENS = ctypes.POINTER(ctypes.c_int32)


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        ImportError: it was not built; says what to type.
    """
    if not _LIBRARY.exists():
        raise ImportError(
            f"{_LIBRARY} is missing: build it with `make build`, or `pip install --no-build-isolation -e .`"
        )
    loaded = ctypes.CDLL(str(_LIBRARY))
    # Texts come as addresses, so that they can be freed.
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "error": (ctypes.c_char_p, []),
        "free": (None, [ctypes.c_void_p]),
        "open": (_MODEL, [ctypes.c_char_p]),
        "close": (None, [_MODEL]),
        "plan": (ctypes.c_void_p, [ctypes.c_char_p]),
        "describe": (ctypes.c_void_p, [_MODEL]),
        "statistics": (ctypes.c_void_p, [_MODEL]),
        "start": (ctypes.c_int, [_MODEL, _TOKENS, ctypes.c_int64, ctypes.c_char_p]),
        "next": (ctypes.c_int32, [_MODEL]),
        "logits": (ctypes.c_int, [_MODEL, _TOKENS, ctypes.c_int64, ctypes.POINTER(ctypes.c_float)]),
        "system": (ctypes.c_void_p, []),
        "read_rate": (ctypes.c_double, [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"loop_singular_bit_{name}")
        function.restype = result
        function.argtypes = arguments
    return loaded


def plan(options: dict[str, Any]) -> dict[str, Any]:
    """What opening a model with these options would keep in memory."""
    return _text(library().loop_singular_bit_plan(_encode(options)), options)


def system() -> dict[str, Any]:
    """Instruction set, processors, memory."""
    return _text(library().loop_singular_bit_system(), {})


def read_rate(path: Path, limit_bytes: int, buffer_bytes: int = 4 << 20, looks: bool = False) -> float:
    """Bytes per second of reading a file as streaming does, past the page cache where that is possible.

    Fills `buffer_bytes` of memory over and over. With `looks` every byte is looked at, as whoever computes with it
    does: a disk that a processor emulates fills memory faster that stays in its own caches.
    """
    rate = float(library().loop_singular_bit_read_rate(os.fsencode(path), limit_bytes, buffer_bytes, looks))
    if rate < 0:
        raise _error({})
    return rate


class NativeModel:
    """One open model. Calls may be interrupted with Ctrl-C when they are made in the main thread.

    Args:
        options: see `loop_singular_bit_open` in csrc/runtime/c_api.h.

    Raises:
        CheckpointError: the checkpoint is damaged; UnsupportedModelError: of a kind that the runtime does not run.
        MemoryBudgetExceeded: the budget cannot be met; says what each part needs.
        ValueError: an option is out of range.
        OSError: a file cannot be read.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._options = {**options, "interrupt_descriptor": self._wake_read}
        self._handle: int | None = library().loop_singular_bit_open(_encode(self._options))
        if self._handle is None:
            error = _error(self._options)
            self.close()
            raise error

    def close(self) -> None:
        """Gives all memory back. The model cannot be used afterwards."""
        if getattr(self, "_handle", None) is not None:
            library().loop_singular_bit_close(self._handle)
            self._handle = None
        for descriptor in (self._wake_read, self._wake_write):
            if descriptor >= 0:
                os.close(descriptor)
        self._wake_read = self._wake_write = -1

    def __del__(self) -> None:
        if getattr(self, "_wake_read", -1) >= 0:
            self.close()

    def describe(self) -> dict[str, Any]:
        return _text(library().loop_singular_bit_describe(self._open_handle()), self._options)

    def statistics(self) -> dict[str, Any]:
        return _text(library().loop_singular_bit_statistics(self._open_handle()), self._options)

    def start(self, tokens: Sequence[int], sampling: dict[str, Any]) -> None:
        """Begins a sequence; `next` goes on with it."""
        values = _token_array(tokens)
        self._call(lambda handle: library().loop_singular_bit_start(handle, values, len(tokens), _encode(sampling)))

    def next(self) -> int:
        """The next token of the sequence."""
        return self._call(lambda handle: library().loop_singular_bit_next(handle))

    def logits(self, tokens: Sequence[int], vocabulary: int) -> memoryview[float]:
        """float32 [len(tokens), vocabulary]."""
        values = _token_array(tokens)
        output = array("f", bytes(4 * len(tokens) * vocabulary))
        address = (ctypes.c_float * len(output)).from_buffer(output)
        self._call(lambda handle: library().loop_singular_bit_logits(handle, values, len(tokens), address))
        return memoryview(output).cast("B").cast("f", (len(tokens), vocabulary))

    def _open_handle(self) -> int:
        if self._handle is None:
            raise ValueError("the model is closed")
        return self._handle

    def _call(self, function: Callable[[int], int]) -> int:
        handle = self._open_handle()
        while True:
            self._forget_signals()
            with self._woken_by_signals():
                result = function(handle)
            if result >= 0:
                return result
            failure = json.loads(library().loop_singular_bit_error())
            if failure["kind"] != "interrupted":
                raise _exception(failure, self._options)
            # Python has run the signal's handler by now. It did not raise: the call is made again.

    def _forget_signals(self) -> None:
        try:
            while os.read(self._wake_read, 64):
                pass
        except BlockingIOError:
            pass

    @contextmanager
    def _woken_by_signals(self) -> Iterator[None]:
        """While native code runs Python cannot handle a signal; it writes to a pipe, which the runtime watches."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)


def _encode(options: dict[str, Any]) -> bytes:
    return json.dumps(options).encode()


def _token_array(tokens: Sequence[int]) -> Any:
    for index, token in enumerate(tokens):
        if not -(2**31) <= token < 2**31:
            raise ValueError(f"tokens: expected 32-bit integers, got {token} at {index}")
    return (ctypes.c_int32 * max(len(tokens), 1))(*tokens)


def _text(address: int | None, options: dict[str, Any]) -> dict[str, Any]:
    if address is None:
        raise _error(options)
    try:
        result: dict[str, Any] = json.loads(ctypes.string_at(address))
        return result
    finally:
        library().loop_singular_bit_free(address)


def _error(options: dict[str, Any]) -> Exception:
    return _exception(json.loads(library().loop_singular_bit_error()), options)


def _exception(failure: dict[str, Any], options: dict[str, Any]) -> Exception:
    kind, message = failure["kind"], failure["message"]
    if kind == "memory_budget":
        return MemoryBudgetExceeded(
            message, target_mb=options.get("budget_bytes", 0) / 1e6, needed_mb=failure["needed_bytes"] / 1e6
        )
    if kind in ("checkpoint", "unsupported"):
        return (CheckpointError if kind == "checkpoint" else UnsupportedModelError)(message)
    return OSError(message) if kind == "disk" else ValueError(message)
