"""Whole checkpoints to packed checkpoints as a stream: row blocks in, packed tensors out, no module is ever built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint_directory import CheckpointDirectory
from .compression_output import REPORT_FILE
from .compression_run import CompressionRun, ProgressCallback, Settings, json_bytes
from .errors import QualityRefusedError
from .memory_budget import MemoryBudget
from .quantization.outlier_preserving_quantizer import OutlierPreservingQuantizer
from .quantization.presets import DEFAULT_PRESET, Preset, check_calibration
from .safetensors_stream import replace_file

NOT_EVALUATED = "not evaluated"


class LoopCompressor:
    """Compresses checkpoints tensor by tensor, row block by row block, within a declared memory budget.

    Args:
        outlier_ratio: outliers of a row over its columns, 0 to 1, at least one per row; None means the preset's.
        target_ram_mb: peak resident memory of the whole process, in MB of 10^6 bytes. A target that cannot be met is
            refused before the work, one that is not met stops it; None sets no limit.
        target_storage_gb: bytes of the packed shards, in 10^9 bytes, that `validate_compression` checks; None for no
            target.
        quality_threshold: largest increase of perplexity, in percent, that `validate_compression` accepts.
        preset: name of a preset or a `Preset`.
        threads: threads that quantize; None means torch's current number. The bytes do not depend on it.
        skip_modules: modules to keep as they are: names, what they start or end with at a dot, regular expressions.
        quantize_embeddings: also pack token embeddings and output heads.
        quantizer: packs the linears instead of the preset and outlier_ratio given here. A subclass that overrides
            `quantize_weight` gets each weight as a whole and must return the layout of its preset.
        max_shard_gb: largest shard that is written, in 10^9 bytes.
        force: allow a preset that is unusable without calibration.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        outlier_ratio: float | None = None,
        target_ram_mb: float | None = 400,
        target_storage_gb: float | None = None,
        quality_threshold: float = 1.0,
        preset: str | Preset = DEFAULT_PRESET,
        *,
        threads: int | None = None,
        skip_modules: Sequence[str] = (),
        quantize_embeddings: bool = True,
        quantizer: OutlierPreservingQuantizer | None = None,
        max_shard_gb: float = 5.0,
        force: bool = False,
    ) -> None:
        if quantizer is not None and outlier_ratio is not None:
            raise ValueError("outlier_ratio: give it to the quantizer, or no quantizer")
        if threads is not None and threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        if isinstance(skip_modules, str):
            raise TypeError(f"skip_modules: expected a sequence of names, got the string {skip_modules!r}")
        if quality_threshold < 0:
            raise ValueError(f"quality_threshold: expected 0 percent or more, got {quality_threshold}")
        if target_storage_gb is not None and not target_storage_gb > 0:
            raise ValueError(f"target_storage_gb: expected a positive number, got {target_storage_gb}")
        if not max_shard_gb > 0:
            raise ValueError(f"max_shard_gb: expected a positive number, got {max_shard_gb}")
        MemoryBudget(target_ram_mb, base_mb=0.0)
        self.quantizer = quantizer or OutlierPreservingQuantizer(outlier_ratio, preset)
        self.preset = self.quantizer.preset
        self.target_ram_mb = target_ram_mb
        self.target_storage_gb = target_storage_gb
        self.quality_threshold = quality_threshold
        self.force = force
        self._settings = Settings(
            quantizer=self.quantizer,
            # Embeddings and heads of `historic` are packed as those of another preset, with its own fraction.
            outlier_fraction=outlier_ratio if quantizer is None else quantizer.outlier_ratio,
            skip_modules=tuple(skip_modules),
            quantize_embeddings=quantize_embeddings,
            max_shard_bytes=int(max_shard_gb * 1e9),
            target_ram_mb=target_ram_mb,
            threads=threads,
        )
        self.results: dict[str, Any] = {}

    def compress_layer(self, weight: torch.Tensor, weight_name: str = "weight") -> dict[str, Any]:
        """Packs one weight [out_features, in_features]: the dictionary of `OutlierPreservingQuantizer.quantize`."""
        return self.quantizer.quantize(weight, weight_name)

    def compress_model(
        self,
        model_path: str | os.PathLike[str],
        output_path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        max_layers: int | None = None,
        evaluate_text: str | Sequence[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> dict[str, Any]:
        """Compresses a checkpoint directory.

        The packed checkpoint grows in `<output_path>.partial` and gets its name when it is complete. Its bytes depend
        on the source and the options only: not on threads, runs, or how often a run was killed and resumed.

        Args:
            model_path: directory with config.json and safetensors files, unquantized.
            output_path: directory to make; None writes nothing and only measures.
            resume: continue an unfinished compression of the same source with the same options.
            overwrite: replace a packed checkpoint, or an unfinished one, at output_path.
            max_layers: pack the first so many decoder layers only; the others are kept as they are.
            evaluate_text: one text or several; perplexity of original and packed model on them (loads both with
                Transformers after the compression, outside of target_ram_mb).
            progress: called after every block.

        Returns:
            compression_summary: layers_compressed, average_compression_ratio (bytes of the packed weights in
                baseline_dtype over their stored bytes), average_quality_loss_percent (increase of perplexity; None
                without evaluate_text), max_ram_usage_mb, bits_per_weight of linears, of embeddings and heads and of
                all, and more.
            layer_results: one dictionary per packed module, in the order of the file.
            target_projections: what the whole model comes to if max_layers left some of it out.
            And kept_tensors, tied_modules, evaluation, options, seconds, memory, versions, machine.
            The same stands in compression_report.json.

        Raises:
            CheckpointError: the source is damaged, incomplete, quantized already, of an unsupported kind, or holds NaN
                or infinity; names file and tensor.
            OutputExistsError: something is at output_path.
            MemoryBudgetExceeded: before the work or during it; can be resumed.
            QualityRefusedError: the preset needs force.
            OSError: the disk is full or cannot be written; names the file; can be resumed.
        """
        if self.quantizer.calibration == "none":
            try:
                check_calibration(self.preset, force=self.force, stacklevel=3)
            except ValueError as error:
                raise QualityRefusedError(str(error)) from error
        output = None if output_path is None else Path(output_path).absolute()
        if output is None and resume:
            raise ValueError("resume: there is nothing to resume without output_path")
        with CheckpointDirectory(model_path) as source:
            if output is not None and output.resolve() == source.path.resolve():
                raise ValueError(f"output_path: {output} is the source")
            run = CompressionRun(self._settings, source, output, max_layers=max_layers, progress=progress)
            finished = run.finished_report() if resume else None
            self.results = run.run(resume=resume, overwrite=overwrite) if finished is None else finished
        if evaluate_text is not None:
            if output is None:
                raise ValueError("evaluate_text: needs output_path, there is no packed model to evaluate without it")
            self._evaluate(Path(model_path), output, evaluate_text)
        return self.results

    def validate_compression(self) -> dict[str, Any]:
        """Compares the last result with the targets: per target its limit, the measured value and "pass" or "fail".

        A target without a limit or without a measurement says "not evaluated"; `passed` is over the others.
        """
        if not self.results:
            raise ValueError("nothing was compressed yet: call compress_model first")
        summary = self.results["compression_summary"]
        checks = {
            "ram": _check(self.target_ram_mb, summary["max_ram_usage_mb"], "MB"),
            "storage": _check(self.target_storage_gb, summary["output_bytes"] / 1e9, "GB"),
            "quality": _check(
                self.quality_threshold, summary["average_quality_loss_percent"], "percent increase of perplexity"
            ),
        }
        statuses = [check["status"] for check in checks.values()]
        return {**checks, "passed": "fail" not in statuses}

    def save_results(self, path: str | os.PathLike[str]) -> None:
        """Writes the last result, and how it compares with the targets, as JSON."""
        results = {**self.results, "validation": self.validate_compression()}
        replace_file(Path(path), json_bytes(results))

    def _evaluate(self, model_path: Path, output: Path, texts: str | Sequence[str]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from . import transformers_integration  # noqa: F401  teaches from_pretrained to read packed checkpoints
        from .validation import evaluate_language_model

        evaluation = evaluate_language_model(
            AutoModelForCausalLM.from_pretrained(output),
            AutoTokenizer.from_pretrained(model_path),
            texts,
            original=AutoModelForCausalLM.from_pretrained(model_path),
        )
        self.results["evaluation"] = evaluation.to_dict()
        ratio = evaluation.perplexity_ratio
        summary = self.results["compression_summary"]
        summary["average_quality_loss_percent"] = None if ratio is None else 100 * (ratio - 1)
        replace_file(output / REPORT_FILE, json_bytes(self.results))


def _check(limit: float | None, measured: float | None, unit: str) -> dict[str, Any]:
    if limit is None or measured is None:
        status = NOT_EVALUATED
    else:
        status = "pass" if measured <= limit else "fail"
    return {
        "target": limit,
        "measured": NOT_EVALUATED if measured is None else measured,
        "unit": unit,
        "status": status,
    }
