"""Whole checkpoints to packed checkpoints as a stream: row blocks in, packed tensors out, no module is ever built."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint_directory import CheckpointDirectory
from .compression_output import REPORT_FILE
from .compression_plan import CompressionPlan, plan_compression
from .compression_run import CompressionRun, ProgressCallback, Settings, json_bytes
from .compression_targets import Layouts, choose_layouts, linears_of, measure_weight_candidates
from .errors import QualityRefusedError
from .memory_budget import MemoryBudget
from .quantization.outlier_preserving_quantizer import OutlierPreservingQuantizer
from .quantization.presets import DEFAULT_PRESET, Preset, check_calibration
from .safetensors_stream import replace_file
from .validation import QualityValidator

if TYPE_CHECKING:
    from .calibrated_compression import Calibration, CalibrationStep

NOT_EVALUATED = "not evaluated"


class LoopCompressor:
    """Compresses checkpoints tensor by tensor, row block by row block, within a declared memory budget.

    Args:
        outlier_ratio: outliers of a row over its columns, 0 to 1, at least one per row; None means the preset's.
        target_ram_mb: peak resident memory of the whole process, in MB of 10^6 bytes. A target that cannot be met is
            refused before the work, one that is not met stops it; None sets no limit.
        target_storage_gb: bytes of the packed shards, in 10^9, that planes and outliers of the linears are chosen for,
            linear by linear (see adaptive_precision), and that `validate_compression` checks; None for no target.
        quality_threshold: largest increase of perplexity, in percent, that `validate_compression` accepts; 1 if not
            given.
        preset: name of a preset or a `Preset`.
        adaptive_precision: choose planes and outliers linear by linear, within target_bits, target_storage_gb, or as
            many bits as the preset takes: with calibration texts by how much the model minds errors there, without by
            errors of weights. False gives every linear the preset's, and only checks target_storage_gb. None means
            True with calibration texts or a target, and False otherwise.
        error_compensation: with calibration texts, let columns make good for errors of others (the sweep and the rounds
            of `ops.quantize_calibrated`); False only weights columns by their mean squared input. None means True.
        target_bits: stored bits per weight of the linears that planes and outliers are chosen for.
        threads: threads that quantize; None means torch's current number. The bytes do not depend on it.
        skip_modules: modules to keep as they are: names, what they start or end with at a dot, regular expressions.
        quantize_embeddings: also pack token embeddings and output heads.
        quantizer: packs the linears instead of the preset and outlier_ratio given here. A subclass that overrides
            `quantize_weight` gets each weight as a whole and must return the layout of its preset.
        validator: evaluates and judges, instead of quality_threshold given here: its verdicts on weights, layers and
            model decide `validate_compression`.
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
        quality_threshold: float | None = None,
        preset: str | Preset = DEFAULT_PRESET,
        *,
        adaptive_precision: bool | None = None,
        error_compensation: bool | None = None,
        target_bits: float | None = None,
        threads: int | None = None,
        skip_modules: Sequence[str] = (),
        quantize_embeddings: bool = True,
        quantizer: OutlierPreservingQuantizer | None = None,
        validator: QualityValidator | None = None,
        max_shard_gb: float = 5.0,
        force: bool = False,
    ) -> None:
        if quantizer is not None and outlier_ratio is not None:
            raise ValueError("outlier_ratio: give it to the quantizer, or no quantizer")
        if threads is not None and threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        if isinstance(skip_modules, str):
            raise TypeError(f"skip_modules: expected a sequence of names, got the string {skip_modules!r}")
        if validator is not None and quality_threshold is not None:
            raise ValueError("quality_threshold: give it to the validator, or no validator")
        if target_storage_gb is not None and not target_storage_gb > 0:
            raise ValueError(f"target_storage_gb: expected a positive number, got {target_storage_gb}")
        if target_bits is not None and not target_bits > 0:
            raise ValueError(f"target_bits: expected a positive number, got {target_bits}")
        if target_bits is not None and target_storage_gb is not None:
            raise ValueError("target_bits and target_storage_gb: expected one of them, got both")
        if target_bits is not None and adaptive_precision is False:
            raise ValueError("target_bits: acts through adaptive_precision, which is off")
        if not max_shard_gb > 0:
            raise ValueError(f"max_shard_gb: expected a positive number, got {max_shard_gb}")
        MemoryBudget(target_ram_mb, base_mb=0.0)
        self.quantizer = quantizer or OutlierPreservingQuantizer(outlier_ratio, preset)
        self.preset = self.quantizer.preset
        self.target_ram_mb = target_ram_mb
        self.target_storage_gb = target_storage_gb
        self.target_bits = target_bits
        self.adaptive_precision = adaptive_precision
        self.error_compensation = error_compensation
        self.validator = validator or QualityValidator(1.0 if quality_threshold is None else quality_threshold)
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
        self._outlier_ratio = outlier_ratio
        self._has_own_quantizer = quantizer is not None
        self.results: dict[str, Any] = {}
        if (adaptive_precision or target_bits is not None) and not self._can_adapt():
            raise ValueError(
                f"adaptive_precision: the layouts of preset {self.preset.name!r} with {type(self.quantizer).__name__} "
                "are fixed; take b1, b2, b3 or b4 with the quantizer of this package"
            )

    @property
    def quality_threshold(self) -> float | None:
        """The validator's: largest increase of perplexity in percent; None for any."""
        return self.validator.quality_threshold

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
        calibration_texts: Sequence[str] | None = None,
        calibration: Calibration | None = None,
        calibration_progress: Callable[[CalibrationStep], None] | None = None,
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
            calibration_texts: of the kind the model will see: pack for the least error of the outputs on them. Loads
                the original with Transformers, outside of target_ram_mb; see `compress_calibrated`.
            calibration: how to use them; what is given to the compressor goes before it.
            calibration_progress: called before the checkpoint is written, after each step of calibration.

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
            QualityRefusedError: the preset, or what a target comes to, needs force.
            ValueError: a target that cannot be met, or something that needs calibration_texts without them.
            OSError: the disk is full or cannot be written; names the file; can be resumed.
        """
        if isinstance(calibration_texts, str):
            raise TypeError("calibration_texts: expected a sequence of texts, got one string")
        output = None if output_path is None else Path(output_path).absolute()
        if output is None and resume:
            raise ValueError("resume: there is nothing to resume without output_path")
        if calibration_texts is not None:
            if output is None:
                raise ValueError("calibration_texts: needs output_path")
            return self._compress_calibrated(
                Path(model_path),
                output,
                calibration_texts,
                calibration,
                resume=resume,
                overwrite=overwrite,
                max_layers=max_layers,
                evaluate_text=evaluate_text,
                progress=progress,
                calibration_progress=calibration_progress,
            )
        if self.error_compensation and not self._has_own_quantizer:
            raise ValueError("error_compensation: needs calibration_texts; there is nothing to compensate by without")
        adapts = self._adapts_to_weights()
        if self.quantizer.calibration == "none" and not adapts:
            self._check_quality(self.preset)
        settings = self._settings
        with CheckpointDirectory(model_path) as source:
            if output is not None and output.resolve() == source.path.resolve():
                raise ValueError(f"output_path: {output} is the source")
            if adapts:
                quantizer = copy.copy(self.quantizer)
                quantizer.layouts = self._choose_layouts(source, max_layers)
                settings = replace(settings, quantizer=quantizer)
            run = CompressionRun(settings, source, output, max_layers=max_layers, progress=progress)
            finished = run.finished_report() if resume else None
            self.results = run.run(resume=resume, overwrite=overwrite) if finished is None else finished
        if evaluate_text is not None:
            if output is None:
                raise ValueError("evaluate_text: needs output_path, there is no packed model to evaluate without it")
            self._evaluate(Path(model_path), output, evaluate_text)
        return self.results

    def validate_compression(self) -> dict[str, Any]:
        """Compares the last result with the targets: per target its limit, the measured value and "pass" or "fail".

        `ram` and `storage` are compared here; `weights`, `layers` and `quality` are the validator's verdicts. A target
        without a limit or without a measurement says "not evaluated"; `passed` is over the others.
        """
        if not self.results:
            raise ValueError("nothing was compressed yet: call compress_model first")
        summary = self.results["compression_summary"]
        checks = {
            "ram": _check(
                # Calibrating loads the original: the target is for what streams.
                None if "calibration" in self.results else self.target_ram_mb,
                summary["max_ram_usage_mb"],
                "MB",
            ),
            "storage": _check(self.target_storage_gb, summary["output_bytes"] / 1e9, "GB"),
            **self.validator.validate_results(self.results),
        }
        statuses = [check["status"] for check in checks.values()]
        return {**checks, "passed": "fail" not in statuses}

    def save_results(self, path: str | os.PathLike[str]) -> None:
        """Writes the last result, and how it compares with the targets, as JSON."""
        results = {**self.results, "validation": self.validate_compression()}
        replace_file(Path(path), json_bytes(results))

    def _compress_calibrated(
        self, model_path: Path, output: Path, texts: Sequence[str], calibration: Calibration | None, **options: Any
    ) -> dict[str, Any]:
        from .calibrated_compression import Calibration, compress_calibrated

        if self._has_own_quantizer:
            raise ValueError("calibration_texts: a quantizer was given, which does not use them")
        given: dict[str, Any] = {
            "adaptive_precision": self.adaptive_precision,
            "error_compensation": self.error_compensation,
            "target_bits": self.target_bits,
        }
        calibration = replace(
            calibration or Calibration(), **{name: value for name, value in given.items() if value is not None}
        )
        self.results = compress_calibrated(
            model_path,
            output,
            texts,
            self.preset,
            calibration,
            outlier_ratio=self._outlier_ratio,
            target_storage_gb=self.target_storage_gb,
            validator=self.validator,
            threads=self._settings.threads,
            skip_modules=self._settings.skip_modules,
            quantize_embeddings=self._settings.quantize_embeddings,
            max_shard_gb=self._settings.max_shard_bytes / 1e9,
            **options,
        )
        return self.results

    def _can_adapt(self) -> bool:
        return not self._settings.packs_whole_weights and self.preset.name != "historic"

    def _adapts_to_weights(self) -> bool:
        """Whether layouts are chosen without a text."""
        if self.adaptive_precision is not None:
            return self.adaptive_precision
        has_target = self.target_bits is not None or self.target_storage_gb is not None
        return has_target and self._can_adapt()

    def _choose_layouts(self, source: CheckpointDirectory, max_layers: int | None) -> Layouts:
        def make_plan(layouts: Layouts) -> CompressionPlan:
            return plan_compression(
                source,
                self.preset,
                outlier_fraction=self._settings.outlier_fraction,
                skip_modules=self._settings.skip_modules,
                quantize_embeddings=self._settings.quantize_embeddings,
                max_layers=max_layers,
                max_shard_bytes=self._settings.max_shard_bytes,
                layouts=layouts,
            )

        plan = make_plan({})
        layouts = choose_layouts(
            measure_weight_candidates(source, plan),
            make_plan,
            target_bits=self.target_bits,
            target_storage_gb=self.target_storage_gb,
        )
        sizes = {module.name: module.source.shape for module in linears_of(plan)}
        weights = sum(rows * columns for rows, columns in sizes.values())
        planes = sum(
            layouts.get(name, (self.preset.planes, 0))[0] * rows * columns for name, (rows, columns) in sizes.items()
        )
        if sizes:
            mean = planes / weights
            self._check_quality(f"b{int(mean)}", subject=f"a target that leaves {mean:.2f} planes per weight")
        return layouts

    def _check_quality(self, preset: str | Preset, subject: str | None = None) -> None:
        try:
            check_calibration(preset, force=self.force, stacklevel=4, subject=subject)
        except ValueError as error:
            raise QualityRefusedError(str(error)) from error

    def _evaluate(self, model_path: Path, output: Path, texts: str | Sequence[str]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from . import transformers_integration  # noqa: F401  teaches from_pretrained to read packed checkpoints

        evaluation = self.validator.validate_model(
            AutoModelForCausalLM.from_pretrained(output),
            AutoTokenizer.from_pretrained(model_path),
            texts,
            original=AutoModelForCausalLM.from_pretrained(model_path),
        )
        self.results["evaluation"] = evaluation
        summary = self.results["compression_summary"]
        summary["average_quality_loss_percent"] = evaluation["perplexity_increase_percent"]
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
