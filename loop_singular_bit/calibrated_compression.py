"""Checkpoints to packed checkpoints with a calibration text: one pass of the original model, then `LoopCompressor`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import is_packed_checkpoint
from .checkpoint_directory import CheckpointDirectory, read_json_object
from .compression_output import REPORT_FILE
from .compression_plan import plan_compression
from .compression_run import ProgressCallback, json_bytes
from .compressor import LoopCompressor
from .packed_weight import PackedWeight
from .quantization.allocation import allocate, measure_candidates
from .quantization.calibration import (
    DEFAULT_MAX_WINDOWS,
    DEFAULT_WINDOW,
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from .quantization.presets import DEFAULT_PRESET, Preset, find_preset
from .quantization.quantize_calibrated import DEFAULT_DAMPING, DEFAULT_ROUNDS, CalibratedQuantizer
from .quantization.tuning import TuningOptions, tune
from .safetensors_stream import replace_file

STATISTICS_SUFFIX = ".calibration"
_SENSITIVITY_WINDOWS = 16


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """UTF-8 texts of files, and of all *.txt files of directories, in the order of their names.

    Raises:
        ValueError: a directory without text files, or a file that is not UTF-8.
        OSError: a file cannot be read.
    """
    texts = []
    for path in map(Path, paths):
        files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path}: expected text files (*.txt) in the directory, found none")
        for file in files:
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: expected UTF-8 text: {error}") from error
    return texts


@dataclass(frozen=True)
class Calibration:
    """How `compress_calibrated` uses its text.

    Args:
        window: tokens of a window; see `calibration_windows`.
        max_windows: of more windows that many are taken, evenly spread. 16 to 64 thousand tokens are enough.
        rounds, damping: see `ops.quantize_calibrated`.
        target_bits: stored bits per weight of the linears: planes are chosen linear by linear, by how much the model
            minds errors there, instead of the preset's.
        tuning: None, or options to tune the packed linears by KL to the original on the same text.
    """

    window: int = DEFAULT_WINDOW
    max_windows: int = DEFAULT_MAX_WINDOWS
    rounds: int = DEFAULT_ROUNDS
    damping: float = DEFAULT_DAMPING
    target_bits: float | None = None
    tuning: TuningOptions | None = None


@dataclass(frozen=True)
class CalibrationStep:
    """What is being done before the checkpoint is written; handed to the callback."""

    description: str
    done: int
    total: int


StepCallback = Callable[[CalibrationStep], None]


def compress_calibrated(
    model_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    texts: Sequence[str],
    preset: str | Preset = DEFAULT_PRESET,
    calibration: Calibration | None = None,
    *,
    outlier_ratio: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    calibration_progress: StepCallback | None = None,
    progress: ProgressCallback | None = None,
    evaluate_text: str | Sequence[str] | None = None,
    max_layers: int | None = None,
    **compressor_options: Any,
) -> dict[str, Any]:
    """Compresses a checkpoint directory as `LoopCompressor` does, its linears for the least error of their outputs.

    Loads the original with Transformers and runs it once over the text. What is found out lies in
    `<output_path>.calibration` until the packed checkpoint is complete: a run that was killed continues there.
    Embeddings and heads are packed as without calibration. The same texts give the same bytes, with tuning as long as
    the number of threads is the same.

    Args:
        texts: of the kind the model will see.
        resume: continue what was interrupted, statistics, tuning and checkpoint.
        calibration_progress: called after each decoder layer of the pass and each step of allocation and tuning.
        progress: called after every block of the compression.
        compressor_options: further arguments of `LoopCompressor`: threads, skip_modules, quantize_embeddings,
            quality_threshold, target_storage_gb, max_shard_gb.

    Returns:
        The results of `LoopCompressor.compress_model`, with `calibration`: tokens, rounds, damping, and for each linear
        its output error on the text with and without calibration; with tuning the KL divergence on held-out windows of
        the text before and after. The same stands in compression_report.json.

    Raises:
        ValueError: an option is out of range, the text is too short, or the preset has means.
        CheckpointError, OutputExistsError, OSError: see `LoopCompressor.compress_model`.
    """
    calibration = calibration or Calibration()
    compressor_options = {"target_ram_mb": None, **compressor_options}
    output = Path(output_path).absolute()
    # Fails on wrong options before the long pass.
    LoopCompressor(preset=preset, outlier_ratio=outlier_ratio, force=True, **compressor_options)
    with CheckpointDirectory(model_path) as source:
        plan = plan_compression(
            source,
            find_preset(preset),
            outlier_fraction=outlier_ratio,
            skip_modules=compressor_options.get("skip_modules", ()),
            max_layers=max_layers,
        )
        names = [module.name for module in plan.packed_modules if not module.is_embedding_or_head]
        digest = hashlib.sha256(json.dumps(source.identity()).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    digest.update(repr((calibration, find_preset(preset), outlier_ratio)).encode())
    identity = digest.hexdigest()

    directory = output.with_name(output.name + STATISTICS_SUFFIX)
    if directory.exists() and not resume:
        shutil.rmtree(directory)
    output.parent.mkdir(parents=True, exist_ok=True)
    statistics = StatisticsStore(directory, identity)
    quantizer = CalibratedQuantizer(
        statistics,
        outlier_ratio,
        preset,
        rounds=calibration.rounds,
        damping=calibration.damping,
        calibration=f"{identity[:16]}: {_describe(calibration)}",
    )
    preparation: dict[str, Any] = {}
    if not (resume and is_packed_checkpoint(output)):
        prepared = _Preparation(Path(model_path), names, texts, calibration, quantizer, directory, calibration_progress)
        preparation = prepared.run()
    elif calibration.target_bits is not None:
        quantizer.layouts = _stored_layouts(output)
    compressor = LoopCompressor(quantizer=quantizer, **compressor_options)
    results = compressor.compress_model(
        model_path,
        output,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        evaluate_text=evaluate_text,
        max_layers=max_layers,
    )
    if quantizer.linears:
        results["calibration"] = {**preparation, "window": calibration.window, **quantizer.report()}
        replace_file(output / REPORT_FILE, json_bytes(results))
    shutil.rmtree(directory)
    return results


def _describe(calibration: Calibration) -> str:
    parts = [f"{calibration.rounds} rounds", f"damping {calibration.damping:g}"]
    if calibration.target_bits is not None:
        parts.append(f"at most {calibration.target_bits:g} bits")
    if (tuning := calibration.tuning) is not None:
        parts.append(f"{'signs' if tuning.signs else 'scales'} tuned in {tuning.steps} steps")
    return ", ".join(parts)


def _stored_layouts(output: Path) -> dict[str, tuple[int, int]]:
    layouts = read_json_object(output / REPORT_FILE)["options"]["layouts"]
    return {name: (planes, outliers) for name, (planes, outliers) in layouts.items()}


class _Preparation:
    """Everything that needs the original model; it is gone when this is done."""

    def __init__(
        self,
        model_path: Path,
        names: Sequence[str],
        texts: Sequence[str],
        calibration: Calibration,
        quantizer: CalibratedQuantizer,
        directory: Path,
        progress: StepCallback | None,
    ) -> None:
        self.names = names
        self.calibration = calibration
        self.quantizer = quantizer
        self.directory = directory
        self.progress = progress
        self.windows, self.model = self._load(model_path, texts)

    def run(self) -> dict[str, Any]:
        """Fills the quantizer; what the report says about it."""
        collect_statistics(
            self.model,
            self.windows,
            self.names,
            store=self.quantizer.statistics,
            progress=lambda step: self._report(f"calibrating {step.name}", step.parts_done, step.parts_total),
        )
        report: dict[str, Any] = {"tokens": self.windows.numel()}
        weights = {name: self.model.get_submodule(name).weight for name in self.names}
        calibrated = {name: weight for name, weight in weights.items() if name in self.quantizer.statistics}
        if self.calibration.target_bits is not None:
            self.quantizer.layouts = self._allocate(calibrated, self.calibration.target_bits)
        if self.calibration.tuning is not None:
            report["tuning"] = self._tune(calibrated, self.calibration.tuning)
        return report

    def _load(self, model_path: Path, texts: Sequence[str]) -> tuple[torch.Tensor, Any]:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        window = self.calibration.window
        windows = calibration_windows(tokenizer, texts, window=window, max_windows=self.calibration.max_windows)
        architectures = AutoConfig.from_pretrained(model_path).architectures or []
        speaks = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        if not speaks and (self.calibration.target_bits is not None or self.calibration.tuning is not None):
            raise ValueError(
                f"{model_path}: target_bits and tuning need a causal language model, got {', '.join(architectures)}"
            )
        loader = AutoModelForCausalLM if speaks else AutoModel
        model = loader.from_pretrained(model_path, dtype=torch.float32)
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and window > positions:
            raise ValueError(f"window: the model has {positions} positions, got {window}")
        return windows, model

    def _allocate(self, weights: Mapping[str, torch.Tensor], target_bits: float) -> dict[str, tuple[int, int]]:
        path = self.directory / "layouts.json"
        if path.is_file():
            return {name: (planes, outliers) for name, (planes, outliers) in json.loads(path.read_text()).items()}
        candidates = measure_candidates(
            self.model,
            weights,
            self.quantizer.statistics,
            self.windows[:_SENSITIVITY_WINDOWS],
            outlier_fraction=self.quantizer.outlier_ratio,
            progress=lambda done, total: self._report("measuring layouts", done, total),
        )
        layouts = allocate(candidates, target_bits)
        replace_file(path, json.dumps(layouts).encode())
        return layouts

    def _tune(self, weights: Mapping[str, torch.Tensor], options: TuningOptions) -> dict[str, Any]:
        path = self.directory / "tuned.pt"
        if not path.is_file():
            packed = {}
            for name, weight in weights.items():
                packed[name] = self.quantizer.quantize_weight(weight, name)
                self._report("packing", len(packed), len(weights))
            self.quantizer.linears.clear()
            result = tune(
                self.model,
                packed,
                self.windows,
                options,
                checkpoint=self.directory / "tuning.pt",
                progress=lambda step: self._report(f"tuning, KL {step.kl_divergence:.4f}", step.step, step.steps),
            )
            partial = path.with_suffix(".partial")
            figures = {
                "kl_before": result.kl_before,
                "kl_after": result.kl_after,
                "kept": result.kept,
                "changed_signs": result.changed_signs,
            }
            tensors = {name: weight.tensors() for name, weight in result.packed_weights.items()}
            torch.save({"figures": figures, "tensors": tensors}, partial)
            partial.replace(path)
        stored = torch.load(path, weights_only=True)
        self.quantizer.packed_weights = {
            name: PackedWeight.from_tensors(tensors, *weights[name].shape)
            for name, tensors in stored["tensors"].items()
        }
        figures = stored["figures"]
        return {**figures, **asdict(options)}

    def _report(self, description: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(CalibrationStep(description, done, total))
