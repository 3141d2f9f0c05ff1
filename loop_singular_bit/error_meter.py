"""Measures what packing lost while the next block is packed: one thread, pieces that stay in its core's cache."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from .block_reader import FilledBlock
from .packed_weight import PackedWeight
from .row_errors import RowErrors


class ErrorMeter:
    """Context manager around a thread that dequantizes packed blocks and sums up their errors.

    One thread, since pieces small enough for a cache are too small to share: with the machine busy, waiting for each
    other at every piece costs two threads ten times what the work does.
    """

    def __init__(self) -> None:
        self.processor_seconds = 0.0
        self._threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(1, "error-meter", initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> ErrorMeter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        # torch takes the last number set in any thread as the one for threads to come.
        torch.set_num_threads(self._threads)

    def add(self, errors: RowErrors, block: FilledBlock, packed: PackedWeight) -> Future[None]:
        """Adds the errors of a block of rows to `errors` and then releases the block."""
        return self._executor.submit(self._add, errors, block, packed)

    def _add(self, errors: RowErrors, block: FilledBlock, packed: PackedWeight) -> None:
        start = time.thread_time()
        errors.add(block.job.first, block.tensor, packed)
        block.release()
        self.processor_seconds += time.thread_time() - start
