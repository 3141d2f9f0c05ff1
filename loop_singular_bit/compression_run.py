"""One compression from the first read to the rename: a reader thread, the quantizing thread, a writer thread."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import __version__, ops
from .block_reader import BlockReader, FilledBlock, ReadJob
from .checkpoint import is_packed_checkpoint
from .checkpoint_directory import CONFIG_FILE, CheckpointDirectory, read_json_object
from .compression_output import (
    JOURNAL_FILE,
    QUEUED_WRITES,
    REPORT_FILE,
    OutputDirectory,
    partial_directory,
)
from .compression_plan import CompressionPlan, KeptTensor, PackedModule, Unit, plan_compression
from .error_meter import ErrorMeter
from .errors import CheckpointError
from .machine import processor_name
from .memory_budget import MemoryBudget, forget_earlier_peak, peak_resident_mb
from .model_card import model_card
from .packed_weight import FORMAT_VERSION, ROWS_PER_TILE, PackedWeight
from .quantization.outlier_preserving_quantizer import OutlierPreservingQuantizer
from .quantization.presets import DEFAULT_PRESET, PRESETS
from .quantization.quantize_weight import column_scale_rows, quantize_weight
from .row_errors import VALUES_AT_ONCE, RowErrors, relative_error, sqnr_db
from .safetensors_stream import ReadBuffer

_BLOCK_BYTES = (16 << 20, 8 << 20, 4 << 20, 2 << 20, 1 << 20)
_READ_BUFFERS = 2
# Float32 pieces of the error meter: two in use, and what malloc keeps of earlier ones.
_ERROR_PIECES = 8
# The historic scheme sorts rows in float64 and int64.
_HISTORIC_BYTES_PER_WEIGHT = 48
# Code pages that are touched, stacks and arenas of threads, the interpreter's own growth.
_RUNTIME_MB = 25.0


@dataclass(frozen=True)
class Settings:
    """What a compression does, whatever the checkpoint; see `LoopCompressor`.

    Attributes:
        outlier_fraction: None means the preset's.
    """

    quantizer: OutlierPreservingQuantizer
    outlier_fraction: float | None
    skip_modules: tuple[str, ...]
    quantize_embeddings: bool
    max_shard_bytes: int
    target_ram_mb: float | None
    threads: int | None

    @property
    def packs_whole_weights(self) -> bool:
        """Whether a subclass of the quantizer replaces how a weight is packed."""
        return type(self.quantizer).quantize_weight is not OutlierPreservingQuantizer.quantize_weight


@dataclass(frozen=True)
class CompressionProgress:
    """How far a compression is; handed to the callback after every block.

    Attributes:
        name: the module or tensor that was worked on.
        finished: whether that one is finished.
        relative_error: of the module just finished (Frobenius); None in the middle of one and for kept tensors.
        output_error_before, output_error: relative errors of the outputs on the calibration text, of the linear just
            finished, without and with calibration; None without a text.
        bytes_done, bytes_total: of the source's tensors; bytes_resumed were done by an earlier run.
        seconds: since the start of this run.
        eta_seconds: until the end, from the bytes of this run; None before the first.
    """

    name: str
    finished: bool
    relative_error: float | None
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    seconds: float
    eta_seconds: float | None
    peak_ram_mb: float
    output_error_before: float | None = None
    output_error: float | None = None


ProgressCallback = Callable[[CompressionProgress], None]


@dataclass
class _Stopwatch:
    """Where the quantizing thread spends its time."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


class CompressionRun:
    """Compresses one checkpoint once.

    Args:
        output: directory to make, absolute; None only measures.
        max_layers: keep decoder layers from this number on as they are; None packs all.
    """

    def __init__(
        self,
        settings: Settings,
        source: CheckpointDirectory,
        output: Path | None,
        *,
        max_layers: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._start = time.perf_counter()
        self._settings = settings
        self._source = source
        self._output_path = output
        self._max_layers = max_layers
        self._progress = progress
        self._preset = settings.quantizer.preset
        self._plan = self._make_plan(max_layers)
        self._description = {
            "format_version": FORMAT_VERSION,
            "max_shard_bytes": settings.max_shard_bytes,
            "source": source.identity(),
            **self._options(),
        }
        self._stopwatch = _Stopwatch()
        self._processor_start = time.process_time()
        self._error_processor_seconds = 0.0
        self._output: OutputDirectory | None = None
        self._tensors_done = self._bytes_done = self._bytes_before = 0
        self._bytes_total = sum(unit.source.nbytes for unit in self._plan.units)

    def finished_report(self) -> dict[str, Any] | None:
        """The report of the output if it is complete and comes from the same source and options."""
        if self._output_path is None or not is_packed_checkpoint(self._output_path):
            return None
        report = read_json_object(self._output_path / REPORT_FILE)
        if report.get("identity") != self._description:
            return None
        # A kill between the rename and the end leaves it.
        (self._output_path / JOURNAL_FILE).unlink(missing_ok=True)
        return report

    def run(self, *, resume: bool, overwrite: bool) -> dict[str, Any]:
        """Does it; the results as in `LoopCompressor.compress_model`."""
        forget_earlier_peak()
        self._budget = MemoryBudget(self._settings.target_ram_mb)
        self._block_bytes, self._parts_mb = self._choose_block_bytes()
        if self._output_path is not None:
            self._output = self._open_output(self._output_path, resume, overwrite)
        threads_before = torch.get_num_threads()
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        try:
            resumed = [] if self._output is None else self._output.finished_records
            records = resumed + self._compress(len(resumed))
            if self._output is None:
                return self._results(records, len(resumed))
            results: dict[str, Any] = {}

            def files() -> dict[str, bytes]:
                results.update(self._results(records, len(resumed)))
                return self._files(results)

            companions = {path.as_posix(): self._source.path / path for path in self._source.companion_files()}
            self._output.complete(companions, files)
            return results
        finally:
            torch.set_num_threads(threads_before)
            if self._output is not None:
                self._output.close()

    # ---- before the work ----

    def _make_plan(self, max_layers: int | None) -> CompressionPlan:
        return plan_compression(
            self._source,
            self._preset,
            outlier_fraction=self._settings.outlier_fraction,
            skip_modules=self._settings.skip_modules,
            quantize_embeddings=self._settings.quantize_embeddings,
            max_layers=max_layers,
            max_shard_bytes=self._settings.max_shard_bytes,
            layouts=self._settings.quantizer.layouts,
        )

    def _options(self) -> dict[str, Any]:
        """What determines the bytes, besides the source."""
        fraction = self._settings.outlier_fraction
        kind = type(self._settings.quantizer)
        return {
            "package_version": __version__,
            "preset": self._preset.name,
            "outlier_fraction": self._preset.outlier_fraction if fraction is None else fraction,
            "calibration": self._settings.quantizer.calibration,
            "layouts": {name: list(layout) for name, layout in self._settings.quantizer.layouts.items()},
            "quantizer": f"{kind.__module__}.{kind.__qualname__}",
            "skip_modules": list(self._settings.skip_modules),
            "quantize_embeddings": self._settings.quantize_embeddings,
            "max_layers": self._max_layers,
        }

    def _open_output(self, path: Path, resume: bool, overwrite: bool) -> OutputDirectory:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not partial_directory(path).exists():
            statistics = os.statvfs(path.parent)
            free = statistics.f_bavail * statistics.f_frsize
            if self._plan.output_bytes > free:
                raise OSError(f"{path.parent}: {self._plan.output_bytes} bytes are needed, {free} are free")
        return OutputDirectory(path, self._plan, self._description, resume=resume, overwrite=overwrite)

    def _choose_block_bytes(self) -> tuple[int, dict[str, float]]:
        for block_bytes in _BLOCK_BYTES:
            parts = self._needed_mb(block_bytes)
            if sum(parts.values()) <= self._budget.available_mb():
                break
        self._budget.require(parts)
        return block_bytes, parts

    def _needed_mb(self, block_bytes: int) -> dict[str, float]:
        """What the work adds to the process with row blocks of that size."""
        read, scale_rows, packed, quantization = 1.0, 1.0, 0.0, 0.0
        for unit in self._plan.units:
            if isinstance(unit, KeptTensor):
                read = max(read, min(block_bytes, unit.nbytes))
                continue
            rows = self._block_rows(unit, block_bytes)
            weights = rows * unit.layout.in_features
            read = max(read, rows * unit.source.row_nbytes)
            if self._fits_column_scales(unit):
                fitted = len(column_scale_rows(unit.layout.out_features))
                scale_rows = max(scale_rows, fitted * unit.source.row_nbytes)
            packed = max(packed, weights * unit.layout.bits_per_weight / 8)
            if self._preset.name == "historic":
                quantization = max(quantization, weights * _HISTORIC_BYTES_PER_WEIGHT)
        return {
            "read buffers": _READ_BUFFERS * read / 1e6,
            "rows for column scales": scale_rows / 1e6,
            "packed blocks": (QUEUED_WRITES + 2) * packed / 1e6,
            "quantization": quantization / 1e6,
            "errors": _ERROR_PIECES * 4 * VALUES_AT_ONCE / 1e6,
            "runtime": _RUNTIME_MB,
        }

    def _packs_whole(self, unit: PackedModule) -> bool:
        return self._settings.packs_whole_weights and not unit.is_embedding_or_head

    def _fits_column_scales(self, unit: PackedModule) -> bool:
        return unit.layout.column_scales and not self._packs_whole(unit)

    def _block_rows(self, unit: PackedModule, block_bytes: int) -> int:
        """Rows read and packed at once: whole row tiles, an even share for every thread."""
        if self._packs_whole(unit):
            return unit.layout.out_features
        if self._preset.name == "historic":
            return ROWS_PER_TILE
        tiles = block_bytes // (ROWS_PER_TILE * unit.source.row_nbytes)
        threads = self._settings.threads or torch.get_num_threads()
        if tiles > threads:
            tiles -= tiles % threads
        return min(unit.layout.out_features, max(1, tiles) * ROWS_PER_TILE)

    # ---- the work ----

    def _jobs(self, units: Sequence[Unit]) -> Iterator[ReadJob]:
        for unit in units:
            if isinstance(unit, KeptTensor):
                kind, total, step = "bytes", unit.nbytes, self._block_bytes
            else:
                kind, total, step = "rows", unit.layout.out_features, self._block_rows(unit, self._block_bytes)
                if self._fits_column_scales(unit):
                    yield ReadJob(unit, "scale_rows", rows=column_scale_rows(total).tolist())
            for first in range(0, max(total, 1), step):
                yield ReadJob(unit, kind, first, min(step, total - first), is_last=first + step >= total)

    def _compress(self, skip: int) -> list[dict[str, Any]]:
        """Everything from unit number `skip` on; one record per unit."""
        units = self._plan.units
        self._tensors_done = skip
        self._bytes_done = self._bytes_before = sum(unit.source.nbytes for unit in units[:skip])
        buffer_bytes = int(self._parts_mb["read buffers"] * 1e6 / _READ_BUFFERS) + 1
        buffers = [ReadBuffer(buffer_bytes) for _ in range(_READ_BUFFERS)]
        records = []
        scale_row_buffer = ReadBuffer(int(self._parts_mb["rows for column scales"] * 1e6) + 1)
        reading = BlockReader(self._source, self._jobs(units[skip:]), buffers, scale_row_buffer)
        with reading as reader, ErrorMeter() as self._error_meter:
            blocks = iter(reader)
            for unit in units[skip:]:
                start = time.perf_counter()
                record = self._keep(unit, blocks) if isinstance(unit, KeptTensor) else self._pack(unit, blocks)
                record["seconds"] = time.perf_counter() - start
                record["peak_ram_mb"] = self._budget.check(unit.source.name)
                if self._output is not None:
                    with self._stopwatch.measure("waiting for writes"):
                        self._output.finish_unit(unit, record)
                records.append({"unit": unit.name, **record})
                self._tensors_done += 1
                self._report_progress(unit, record.get("relative_error"), finished=True)
            self._error_processor_seconds = self._error_meter.processor_seconds
        return records

    def _keep(self, unit: KeptTensor, blocks: Iterator[FilledBlock]) -> dict[str, Any]:
        for block in self._blocks_of_unit(blocks):
            if self._output is None:
                block.release()
            else:
                with self._stopwatch.measure("waiting for writes"):
                    self._output.write([(unit.name, block.job.first, block.tensor)], block.release)
            self._bytes_done += block.job.count
            self._report_progress(unit)
        return {}

    def _pack(self, unit: PackedModule, blocks: Iterator[FilledBlock]) -> dict[str, Any]:
        column_scales: torch.Tensor | None = None
        errors = RowErrors(unit.layout.out_features)
        measured: Future[None] | None = None
        for block in self._blocks_of_unit(blocks):
            if block.job.kind == "scale_rows":
                with self._stopwatch.measure("fitting column scales"), self._naming_the_tensor(unit, block):
                    column_scales = ops.fit_column_scales(block.tensor)
                block.release()
                continue
            with self._stopwatch.measure("quantizing"), self._naming_the_tensor(unit, block):
                packed = self._pack_rows(unit, block.tensor, column_scales)
            self._write_rows(unit, block.job, packed)
            with self._stopwatch.measure("waiting for errors"):
                if measured is not None:
                    measured.result()
                measured = self._error_meter.add(errors, block, packed)
            self._bytes_done += block.job.count * unit.source.row_nbytes
            self._budget.check(unit.source.name)
            self._report_progress(unit)
        with self._stopwatch.measure("waiting for errors"):
            if measured is not None:
                measured.result()
        squared_error, squared_weight = errors.squared_error, errors.squared_weight
        return {
            "relative_error": relative_error(squared_error, squared_weight),
            "sqnr_db": sqnr_db(squared_error, squared_weight),
            "squared_error": squared_error,
            "squared_weight": squared_weight,
        }

    def _blocks_of_unit(self, blocks: Iterator[FilledBlock]) -> Iterator[FilledBlock]:
        while True:
            with self._stopwatch.measure("waiting for reads"):
                block = next(blocks)
            yield block
            if block.job.is_last:
                return

    def _pack_rows(self, unit: PackedModule, rows: torch.Tensor, column_scales: torch.Tensor | None) -> PackedWeight:
        if self._packs_whole(unit):
            packed = self._settings.quantizer.quantize_weight(rows, unit.name)
            if packed.layout != unit.layout:
                raise ValueError(
                    f"{unit.name}: the quantizer returned {packed.layout}, expected {unit.layout} from its preset and "
                    "outlier_ratio"
                )
            return packed
        historic = self._preset.name == "historic"
        return quantize_weight(
            rows,
            PRESETS[DEFAULT_PRESET] if historic and unit.is_embedding_or_head else self._preset,
            planes=unit.layout.planes,
            outlier_fraction=unit.layout.outliers / unit.layout.in_features,
            column_scales=False if column_scales is None else column_scales,
        )

    def _write_rows(self, unit: PackedModule, job: ReadJob, packed: PackedWeight) -> None:
        if self._output is None:
            return
        first_tile = job.first // ROWS_PER_TILE
        parts = []
        for name, tensor in packed.tensors().items():
            if name == "column_scales":
                if job.first == 0:
                    parts.append((f"{unit.name}.{name}", 0, tensor))
            else:
                parts.append((f"{unit.name}.{name}", first_tile * tensor[0].nbytes, tensor))
        with self._stopwatch.measure("waiting for writes"):
            self._output.write(parts)

    @contextmanager
    def _naming_the_tensor(self, unit: PackedModule, block: FilledBlock) -> Iterator[None]:
        """Turns a refusal of NaN or infinity in a block into an error that names file, tensor, row and column."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            bad = (~torch.isfinite(block.tensor)).nonzero()
            if len(bad) == 0:
                raise
            row, column = bad[0].tolist()
            number = block.job.rows[row] if block.job.kind == "scale_rows" else block.job.first + row
            path = self._source.reader(unit.source.name).path
            raise CheckpointError(
                f"{path}: tensor {unit.source.name}: expected finite weights, got {block.tensor[row, column].item()} "
                f"at row {number}, column {column}"
            ) from error

    def _report_progress(self, unit: Unit, relative_error: float | None = None, *, finished: bool = False) -> None:
        if self._progress is None:
            return
        seconds = time.perf_counter() - self._start
        here = self._bytes_done - self._bytes_before
        self._progress(
            CompressionProgress(
                name=unit.name,
                finished=finished,
                relative_error=relative_error,
                tensors_done=self._tensors_done,
                tensors_total=len(self._plan.units),
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                bytes_resumed=self._bytes_before,
                seconds=seconds,
                eta_seconds=seconds / here * (self._bytes_total - self._bytes_done) if here else None,
                peak_ram_mb=peak_resident_mb(),
            )
        )

    # ---- the results ----

    def _files(self, results: dict[str, Any]) -> dict[str, bytes]:
        """In the order of writing: what makes the directory loadable comes last."""
        config = {**self._source.config, "quantization_config": self._plan.quantization_config(self._options())}
        return {
            "README.md": model_card(self._source, results).encode(),
            REPORT_FILE: json_bytes(results),
            CONFIG_FILE: json_bytes(config),
        }

    def _results(self, records: list[dict[str, Any]], resumed: int) -> dict[str, Any]:
        by_name = {record["unit"]: record for record in records}
        layers = [_layer_result(module, by_name[module.name]) for module in self._plan.packed_modules]
        full = self._plan if self._max_layers is None else self._make_plan(None)
        peak_mb = max([peak_resident_mb(), *(record["peak_ram_mb"] for record in records)])
        seconds = time.perf_counter() - self._start
        modules = self._plan.packed_modules
        special = [module for module in modules if module.is_embedding_or_head]
        original_bytes = sum(module.source.nbytes for module in modules)
        packed_bytes = sum(module.nbytes for module in modules)
        squared_error = math.fsum(by_name[module.name]["squared_error"] for module in modules)
        squared_weight = math.fsum(by_name[module.name]["squared_weight"] for module in modules)
        return {
            "compression_summary": {
                "layers_compressed": len(modules),
                "average_compression_ratio": original_bytes / packed_bytes,
                "average_quality_loss_percent": None,
                "max_ram_usage_mb": peak_mb,
                "baseline_dtype": "+".join(sorted({module.source.dtype for module in modules})),
                "bits_per_weight": _bits_per_weight(modules),
                "bits_per_weight_linears": _bits_per_weight([m for m in modules if not m.is_embedding_or_head]),
                "bits_per_weight_embeddings_and_heads": _bits_per_weight(special),
                "bits_per_parameter": 8 * sum(unit.nbytes for unit in self._plan.units) / self._parameters(),
                "relative_error": relative_error(squared_error, squared_weight),
                "source_bytes": self._source.file_bytes,
                "output_bytes": self._plan.output_bytes,
                "file_compression_ratio": self._source.file_bytes / self._plan.output_bytes,
                "part_bytes": self._part_bytes(),
                "seconds": seconds,
                "processor_seconds": time.process_time() - self._processor_start,
                "processor_seconds_of_errors": self._error_processor_seconds,
                "resumed_tensors": resumed,
            },
            "layer_results": layers,
            "target_projections": {
                "layers": len(full.packed_modules),
                "storage_gb": full.output_bytes / 1e9,
                "file_compression_ratio": self._source.file_bytes / full.output_bytes,
                "ram_mb": peak_mb,
                "seconds": seconds * sum(m.source.nbytes for m in full.packed_modules) / original_bytes,
            },
            "kept_tensors": [
                {"name": unit.name, "nbytes": unit.nbytes, "reason": unit.reason or "not a 2-D weight"}
                for unit in self._plan.units
                if isinstance(unit, KeptTensor)
            ],
            "tied_modules": self._plan.tied_modules,
            "dropped_tensors": self._plan.dropped,
            "evaluation": None,
            "options": self._options(),
            "identity": self._description,
            "memory": {
                "target_ram_mb": self._settings.target_ram_mb,
                "base_mb": self._budget.base_mb,
                "planned_mb": self._parts_mb,
                "peak_mb": peak_mb,
                "measured_as": "VmHWM of the whole process, 10^6 bytes",
                "block_bytes": self._block_bytes,
            },
            "seconds": {name: round(spent, 3) for name, spent in self._stopwatch.seconds.items()},
            "versions": {
                "loop_singular_bit": __version__,
                "format_version": FORMAT_VERSION,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": {
                "processor": processor_name(),
                "cores": os.cpu_count(),
                "threads": self._settings.threads or torch.get_num_threads(),
                "isa": ops.isa(),
                "system": f"{platform.system()} {platform.release()}",
            },
        }

    def _parameters(self) -> int:
        return sum(math.prod(unit.source.shape) for unit in self._plan.units)

    def _part_bytes(self) -> dict[str, int]:
        """Stored bytes by kind of tensor, over the whole checkpoint."""
        parts: dict[str, int] = {}
        for unit in self._plan.units:
            sizes = {"kept": unit.nbytes} if isinstance(unit, KeptTensor) else unit.layout.part_nbytes()
            for name, nbytes in sizes.items():
                parts[name] = parts.get(name, 0) + nbytes
        return parts


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _layer_result(module: PackedModule, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": module.name,
        **module.to_config(),
        "bits_per_weight": module.layout.bits_per_weight,
        "original_bytes": module.source.nbytes,
        "packed_bytes": module.nbytes,
        "compression_ratio": module.source.nbytes / module.nbytes,
        "baseline_dtype": module.source.dtype,
        "relative_error": record["relative_error"],
        "sqnr_db": record["sqnr_db"],
        "seconds": round(record["seconds"], 4),
    }


def _bits_per_weight(modules: Sequence[PackedModule]) -> float | None:
    weights = sum(module.layout.out_features * module.layout.in_features for module in modules)
    return 8 * sum(module.nbytes for module in modules) / weights if weights else None
