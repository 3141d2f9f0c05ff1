"""Reads what a compression needs next in a thread of its own, into a few buffers that go round."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from .checkpoint_directory import CheckpointDirectory
from .compression_plan import Unit
from .safetensors_stream import ReadBuffer


@dataclass(frozen=True)
class ReadJob:
    """Something to read: rows of a weight, or bytes of a tensor that is kept as it is.

    Attributes:
        kind: "scale_rows" (the rows that column scales are fitted on), "rows", or "bytes".
        first, count: rows, or bytes.
        is_last: the last job of its unit.
    """

    unit: Unit
    kind: str
    first: int = 0
    count: int = 0
    rows: Sequence[int] = ()
    is_last: bool = False


@dataclass
class FilledBlock:
    """What was read: rows [count, in_features] in the dtype of the file, or uint8 [count]. `release` ends its life."""

    job: ReadJob
    tensor: torch.Tensor
    _buffer: ReadBuffer
    _free: queue.Queue[ReadBuffer | None]

    def release(self) -> None:
        self._free.put(self._buffer)


class BlockReader:
    """Context manager and iterator over the filled blocks, in the order of the jobs.

    An error of a read is raised where the block would have come.

    Args:
        row_buffers: take turns for rows and bytes; two are enough to read and to work at once.
        scale_row_buffer: for the rows that column scales are fitted on, often more than a block.
    """

    def __init__(
        self,
        source: CheckpointDirectory,
        jobs: Iterator[ReadJob],
        row_buffers: Sequence[ReadBuffer],
        scale_row_buffer: ReadBuffer,
    ) -> None:
        self._source = source
        self._jobs = jobs
        self._free_row_buffers: queue.Queue[ReadBuffer | None] = queue.Queue()
        for buffer in row_buffers:
            self._free_row_buffers.put(buffer)
        self._free_scale_row_buffer: queue.Queue[ReadBuffer | None] = queue.Queue()
        self._free_scale_row_buffer.put(scale_row_buffer)
        self._filled: queue.Queue[FilledBlock | BaseException | None] = queue.Queue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="checkpoint-reader", daemon=True)

    def __enter__(self) -> BlockReader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._free_row_buffers.put(None)
        self._free_scale_row_buffer.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[FilledBlock]:
        while (block := self._filled.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block

    def _run(self) -> None:
        try:
            for job in self._jobs:
                free = self._free_scale_row_buffer if job.kind == "scale_rows" else self._free_row_buffers
                buffer = free.get()
                if buffer is None or self._stopped:
                    return
                self._filled.put(FilledBlock(job, self._read(job, buffer), buffer, free))
            self._filled.put(None)
        except BaseException as error:  # handed to the thread that iterates
            self._filled.put(error)

    def _read(self, job: ReadJob, buffer: ReadBuffer) -> torch.Tensor:
        entry = job.unit.source
        reader = self._source.reader(entry.name)
        if job.kind == "scale_rows":
            reader.prefetch(entry)
            return reader.read_selected_rows(entry.name, job.rows, buffer)
        if job.kind == "rows":
            return reader.read_rows(entry.name, job.first, job.count, buffer)
        reader.read_into(entry, job.first, buffer.view[: job.count])
        return buffer.tensor(torch.uint8, (job.count,))
