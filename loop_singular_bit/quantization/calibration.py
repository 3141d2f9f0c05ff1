"""What goes into a model's linears: second moments of their inputs over a text, decoder layer by decoder layer.

The original model runs once. That inputs come from the original and not from the quantized layers before was measured
to cost nothing; so linears do not depend on each other, and can be quantized in any order.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loop_singular_bit.quantization.layer_calls import HiddenStates, LayerCall, LayerRecorder, hidden_of, running_until
from loop_singular_bit.safetensors_stream import replace_file

DEFAULT_WINDOW = 512
DEFAULT_MAX_WINDOWS = 128
_INDEX_FILE = "calibration.json"
_ROWS_ADDED = 256
_ROWS_STORED = 256  # in a block of a stored matrix


@dataclass(frozen=True)
class CalibrationProgress:
    """How far the pass over the text is; handed to the callback after every part of the model."""

    name: str
    parts_done: int
    parts_total: int
    seconds: float
    eta_seconds: float


ProgressCallback = Callable[[CalibrationProgress], None]


@dataclass(frozen=True)
class InputStatistics:
    """Second moment of a linear's inputs.

    Attributes:
        hessian: float32 [in_features, in_features], the mean of x x' over the tokens.
        tokens: how many.
    """

    hessian: torch.Tensor
    tokens: int


def calibration_windows(
    tokenizer: Any, texts: str | Iterable[str], *, window: int = DEFAULT_WINDOW, max_windows: int = DEFAULT_MAX_WINDOWS
) -> torch.Tensor:
    """Texts as int64 [windows, window]; each begins with the tokenizer's beginning-of-sequence token if it has one.

    Windows for an encoder, whose tokenizer has a class token instead, begin with that and end with the separator.

    Texts are tokenized on their own and cut without overlap; what is left over at the end of a text is dropped. Of more
    than max_windows windows that many are taken, evenly spread.

    Raises:
        ValueError: the texts do not fill one window, or a number is out of range.
    """
    if window < 2 or max_windows < 1:
        raise ValueError(f"expected a window of at least 2 and at least 1 window, got {window} and {max_windows}")
    beginning = getattr(tokenizer, "bos_token_id", None)
    prefix, suffix = [] if beginning is None else [beginning], []
    if beginning is None and None not in (
        ends := [getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)]
    ):
        prefix, suffix = ends[:1], ends[1:]
    step = window - len(prefix) - len(suffix)
    if step < 1:
        raise ValueError(f"window: expected more than the {window - step} tokens that every window has, got {window}")
    windows: list[list[int]] = []
    tokens = 0
    for text in [texts] if isinstance(texts, str) else texts:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        tokens += len(ids)
        windows += [prefix + ids[first : first + step] + suffix for first in range(0, len(ids) - step + 1, step)]
    if not windows:
        raise ValueError(
            f"texts: {tokens} tokens do not fill one window of {window}; give more text or a smaller window"
        )
    if len(windows) > max_windows:
        windows = [windows[index * len(windows) // max_windows] for index in range(max_windows)]
    return torch.tensor(windows, dtype=torch.int64)


def _upper_rows(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Blocks of rows of a symmetric matrix, each from its first diagonal element on: half the bytes."""
    return [matrix[row : row + _ROWS_STORED, row:].clone() for row in range(0, len(matrix), _ROWS_STORED)]


def _symmetric_matrix(upper_rows: Sequence[torch.Tensor]) -> torch.Tensor:
    columns = upper_rows[0].shape[1]
    matrix = torch.empty(columns, columns, dtype=upper_rows[0].dtype)
    row = 0
    for rows in upper_rows:
        end = row + len(rows)
        matrix[row:, row:end] = rows.T
        matrix[row:end, row:] = rows
        row = end
    return matrix


class StatisticsStore:
    """Second moments by name of linear, in a directory or, without one, in memory. What is in it survives a kill.

    Linears with the same input share one matrix.

    Args:
        directory: made if it does not exist.
        identity: of model and text; statistics of others are thrown away.
    """

    def __init__(self, directory: Path | None = None, identity: str = "") -> None:
        self.directory = directory
        self._matrices: dict[str, InputStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._identity = identity
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        index = directory / _INDEX_FILE
        if index.is_file():
            found = json.loads(index.read_text())
            if found["identity"] == identity:
                self._leaders = found["leaders"]

    def __contains__(self, name: str) -> bool:
        return name in self._leaders

    def __getitem__(self, name: str) -> InputStatistics:
        leader = self._leaders[name]
        if self.directory is None:
            return self._matrices[leader]
        stored = torch.load(self._path(leader), weights_only=True)
        return InputStatistics(_symmetric_matrix(stored["upper_rows"]), int(stored["tokens"]))

    def leader(self, name: str) -> str:
        """The linear under whose name the matrix is stored: the same for all linears that share their input."""
        return self._leaders[name]

    def add(self, names: Sequence[str], statistics: InputStatistics) -> None:
        """Stores the statistics of linears that share their input."""
        if self.directory is None:
            self._matrices[names[0]] = statistics
        else:
            path = self._path(names[0])
            partial = path.with_suffix(".partial")
            torch.save({"upper_rows": _upper_rows(statistics.hessian), "tokens": statistics.tokens}, partial)
            partial.replace(path)
        self._leaders.update(dict.fromkeys(names, names[0]))
        if self.directory is not None:
            index = {"identity": self._identity, "leaders": self._leaders}
            replace_file(self.directory / _INDEX_FILE, json.dumps(index).encode())

    def _path(self, leader: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{hashlib.sha256(leader.encode()).hexdigest()[:24]}.pt"


def collect_statistics(
    model: nn.Module,
    windows: torch.Tensor,
    names: Iterable[str] | None = None,
    *,
    store: StatisticsStore | None = None,
    activation_bytes: int = 2 << 30,
    progress: ProgressCallback | None = None,
) -> StatisticsStore:
    """Runs a model over token windows and keeps the second moments of its linears' inputs.

    A model with a list of decoder layers that hand one tensor on runs layer by layer: the hidden states of all windows
    before a layer are kept, in memory up to activation_bytes and above that in a file, and one layer's matrices at a
    time. Any other model runs as a whole. Windows run in parallel, each in one thread, and are summed in their order:
    the number of threads changes nothing.

    Args:
        model: takes `input_ids` [1, window]; its linears are `nn.Linear`.
        windows: int64 [windows, window].
        names: linears to look at; None for all.
        store: takes the results; what it holds already is not computed again.
        progress: called after each part of the model.

    Raises:
        ValueError: no linear, or none that was called.
    """
    store = StatisticsStore() if store is None else store
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = set(linears) if names is None else set(names)
    if unknown := sorted(wanted - linears.keys()):
        raise ValueError(f"names: expected linears of the model, got {unknown[:3]}")
    if not wanted:
        raise ValueError("model: expected at least one nn.Linear")
    if all(name in store for name in wanted):
        return store
    was_training = model.training
    threads = torch.get_num_threads()
    model.eval()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), ThreadPoolExecutor(max_workers=threads) as executor:
            _Collector(model, windows, wanted, store, activation_bytes, executor, threads, progress).run()
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)
    return store


class _Collector:
    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        wanted: set[str],
        store: StatisticsStore,
        activation_bytes: int,
        executor: ThreadPoolExecutor,
        threads: int,
        progress: ProgressCallback | None,
    ) -> None:
        self.model = model
        self.windows = windows
        self.wanted = wanted
        self.store = store
        self.activation_bytes = activation_bytes
        self.executor = executor
        self.threads = threads
        self.progress = progress
        self.start = time.perf_counter()

    def run(self) -> None:
        self.groups, calls = self._probe()
        if not self.groups:
            raise ValueError("model: none of the linears asked for is called when the model runs")
        if calls is None:
            self._measure(list(self.groups), len(self.windows), self._run_model)
            self._report("model", 1, 1)
            return
        first = calls[0]
        states = HiddenStates(len(self.windows), first.hidden, self.activation_bytes, self.store.directory)
        with running_until(first.layer, self._run_model) as run_until:
            self._for_windows(run_until, states.put)
        inside = {leader for call in calls for leader in self._leaders_in(call.name)}
        parts = len(calls) + (1 if inside != set(self.groups) else 0)
        for done, call in enumerate(calls):
            leaders = [leader for leader in self._leaders_in(call.name) if leader not in self.store]

            def run_layer(window: int, call: LayerCall = call) -> torch.Tensor:
                return hidden_of(call.layer(states.get(window), *call.args, **call.kwargs))

            self._measure(leaders, len(self.windows), run_layer, states.put)
            self._report(call.name, done + 1, parts)
        outside = [leader for leader in self.groups if leader not in inside and leader not in self.store]
        if outside:
            self._measure(outside, len(self.windows), self._run_model)
        if parts > len(calls):
            self._report("model", parts, parts)

    def _leaders_in(self, layer: str) -> list[str]:
        return [leader for leader in self.groups if leader.startswith(layer + ".")]

    def _probe(self) -> tuple[dict[str, list[str]], list[LayerCall] | None]:
        """One window: which linears share an input, and how the layers are called (None: not one after another)."""
        seen: list[tuple[torch.Tensor, list[str]]] = []
        handles = []

        def linear_hook(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                for tensor, names in seen:
                    if tensor is args[0]:
                        names.append(name)
                        return
                seen.append((args[0], [name]))

            return hook

        for name, module in self.model.named_modules():
            if name in self.wanted:
                handles.append(module.register_forward_pre_hook(linear_hook(name)))
        try:
            with LayerRecorder(self.model) as recorder:
                self._run_model(0)
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[str, list[str]] = {}
        for _, names in seen:
            known = [name for name in names if any(name in group for group in groups.values())]
            fresh = [name for name in dict.fromkeys(names) if name not in known]
            if fresh:
                groups[fresh[0]] = fresh
        return groups, recorder.chain()

    def _run_model(self, window: int) -> torch.Tensor:
        ids = self.windows[window : window + 1].to(next(self.model.parameters()).device)
        output = self.model(input_ids=ids, **({"use_cache": False} if hasattr(self.model, "generate") else {}))
        return hidden_of(output)

    def _for_windows(
        self, run: Callable[[int], torch.Tensor], take: Callable[[int, torch.Tensor], None] | None = None
    ) -> None:
        """Runs all windows, a few at a time, and takes what comes out in their order."""

        def work(window: int) -> torch.Tensor:
            with torch.no_grad():
                return run(window)

        for first in range(0, len(self.windows), self.threads):
            some = range(first, min(first + self.threads, len(self.windows)))
            for window, output in zip(some, list(self.executor.map(work, some)), strict=True):
                if take is not None:
                    take(window, output)

    def _measure(
        self,
        leaders: Sequence[str],
        windows: int,
        run: Callable[[int], torch.Tensor],
        take: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        """Runs all windows and stores the second moments of the leaders' inputs."""
        local = threading.local()
        results: dict[int, dict[str, tuple[torch.Tensor, int]]] = {}
        sums: dict[str, torch.Tensor] = {}
        tokens = dict.fromkeys(leaders, 0)

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float()
                local.products[name] = (inputs.T @ inputs, len(inputs))

            return hook

        def run_and_keep(window: int) -> torch.Tensor:
            local.products = {}
            output = run(window)
            results[window] = local.products
            return output

        def add(window: int, output: torch.Tensor) -> None:
            for name, (product, count) in results.pop(window).items():
                # The sum over many windows is where float32 would lose digits.
                if name not in sums:
                    sums[name] = torch.zeros(product.shape, dtype=torch.float64)
                # By blocks: torch would convert the whole product first, twice its memory.
                for total, part in zip(sums[name].split(_ROWS_ADDED), product.split(_ROWS_ADDED), strict=True):
                    total.add_(part)
                tokens[name] += count
            if take is not None:
                take(window, output)

        handles = [self.model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in leaders]
        try:
            self._for_windows(run_and_keep, add)
        finally:
            for handle in handles:
                handle.remove()
        for name in leaders:
            hessian = sums.pop(name).div_(tokens[name]).float()
            self.store.add(self.groups[name], InputStatistics(hessian, tokens[name]))

    def _report(self, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            seconds = time.perf_counter() - self.start
            self.progress(CalibrationProgress(name, done, total, seconds, seconds / done * (total - done)))
