"""Checkpoints to packed checkpoints with a calibration text: one pass of the original model, then `LoopCompressor`."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .calibration_texts import read_texts as read_texts
from .checkpoint import is_packed_checkpoint
from .checkpoint_directory import CheckpointDirectory, read_json_object
from .compression_output import REPORT_FILE, partial_directory
from .compression_plan import PACKABLE_DTYPES, CompressionPlan, plan_compression
from .compression_run import CompressionProgress, ProgressCallback, json_bytes
from .compression_targets import Layouts, check_target, choose_layouts, linears_of
from .compressor import LoopCompressor
from .errors import CheckpointError, OutputExistsError
from .packed_weight import PackedWeight
from .quantization.allocation import measure_candidates
from .quantization.calibration import (
    DEFAULT_MAX_WINDOWS,
    DEFAULT_WINDOW,
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from .quantization.float32_layers import Float32Layers
from .quantization.presets import DEFAULT_PRESET, Preset, find_preset
from .quantization.quantize_calibrated import DEFAULT_DAMPING, DEFAULT_ROUNDS, CalibratedLinear, CalibratedQuantizer
from .quantization.tuning import TuningOptions, tune
from .safetensors_stream import replace_file

STATISTICS_SUFFIX = ".calibration"
_SENSITIVITY_WINDOWS = 16
_CHECKED_BYTES = 16 << 20


@dataclass(frozen=True)
class Calibration:
    """How `compress_calibrated` uses its text.

    Args:
        window: tokens of a window; see `calibration_windows`.
        max_windows: of more windows that many are taken, evenly spread. 16 to 64 thousand tokens are enough.
        rounds, damping: see `ops.quantize_calibrated`.
        adaptive_precision: choose planes and outliers linear by linear, by how much the model minds errors there, with
            as many bits in all as the preset takes, or as a target says. False gives every linear the preset's.
        target_bits: stored bits per weight of the linears, instead of the preset's.
        error_compensation: False weights columns by their mean squared input, and does without sweep and rounds.
        tuning: None, or options to tune the packed linears by KL to the original on the same text.
        activation_mb: hidden states of the text, in 10^6 bytes, above which they lie in a file instead of in memory.
    """

    window: int = DEFAULT_WINDOW
    max_windows: int = DEFAULT_MAX_WINDOWS
    rounds: int = DEFAULT_ROUNDS
    damping: float = DEFAULT_DAMPING
    adaptive_precision: bool = True
    target_bits: float | None = None
    error_compensation: bool = True
    tuning: TuningOptions | None = None
    activation_mb: float = 2000.0

    def __post_init__(self) -> None:
        if self.target_bits is not None and not self.adaptive_precision:
            raise ValueError("target_bits: acts through adaptive_precision, which is off")
        if not self.activation_mb >= 0:
            raise ValueError(f"activation_mb: expected 0 or more, got {self.activation_mb}")

    def describe(self) -> str:
        """For the provenance of a packed checkpoint: what determines its bytes, but the text and the target."""
        parts = [f"{self.rounds} rounds", f"damping {self.damping:g}"]
        if not self.error_compensation:
            parts = ["columns weighted, no error compensation"]
        parts.append("mixed layouts" if self.adaptive_precision else "uniform layouts")
        if self.tuning is not None:
            parts.append(f"{'signs' if self.tuning.signs else 'scales'} tuned in {self.tuning.steps} steps")
        return ", ".join(parts)


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
    target_storage_gb: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    calibration_progress: StepCallback | None = None,
    progress: ProgressCallback | None = None,
    evaluate_text: str | Sequence[str] | None = None,
    max_layers: int | None = None,
    **compressor_options: Any,
) -> dict[str, Any]:
    """Compresses a checkpoint directory as `LoopCompressor` does, its linears for the least error of their outputs.

    Loads the original with Transformers and runs it once over the text, one layer in float32 at a time. What is found
    out lies in `<output_path>.calibration` until the packed checkpoint is complete: a run that was killed continues
    there. Embeddings and heads are packed as without calibration. The same texts give the same bytes, with tuning on
    processors that all multiply bfloat16 or all do not.

    Args:
        texts: of the kind the model will see.
        target_storage_gb: bytes of the packed shards, in 10^9, that planes and outliers are chosen for; without
            adaptive_precision it is only compared with the result.
        resume: continue what was interrupted, statistics, tuning and checkpoint.
        overwrite: replace a packed checkpoint, or what was interrupted, at output_path.
        calibration_progress: called after each decoder layer of the pass and each step of allocation and tuning.
        progress: called after every block of the compression; with the output errors of a calibrated linear just done.
        compressor_options: further arguments of `LoopCompressor`: threads, skip_modules, quantize_embeddings,
            quality_threshold, max_shard_gb.

    Returns:
        The results of `LoopCompressor.compress_model`, with `calibration`: tokens, rounds, damping, and for each linear
        its output error on the text with and without calibration; with tuning the KL divergence on held-out windows of
        the text before and after. The same stands in compression_report.json.

    Raises:
        ValueError: an option is out of range, the text is too short, the preset has means, or a target cannot be met.
        CheckpointError, OutputExistsError, OSError: see `LoopCompressor.compress_model`.
    """
    calibration = calibration or Calibration()
    compressor_options = {"target_ram_mb": None, **compressor_options}
    output = Path(output_path).absolute()
    # Fails on wrong options before the long pass.
    LoopCompressor(preset=preset, outlier_ratio=outlier_ratio, force=True, **compressor_options)
    target = target_storage_gb if calibration.adaptive_precision else None
    if target is not None and calibration.target_bits is not None:
        raise ValueError("target_bits and target_storage_gb: expected one of them, got both")

    with CheckpointDirectory(model_path) as source:

        def make_plan(layouts: Layouts) -> CompressionPlan:
            return plan_compression(
                source,
                find_preset(preset),
                outlier_fraction=outlier_ratio,
                skip_modules=compressor_options.get("skip_modules", ()),
                quantize_embeddings=compressor_options.get("quantize_embeddings", True),
                max_layers=max_layers,
                max_shard_bytes=int(compressor_options.get("max_shard_gb", 5.0) * 1e9),
                layouts=layouts,
            )

        linears = linears_of(make_plan({}))
        if calibration.adaptive_precision:
            check_target(make_plan, target_bits=calibration.target_bits, target_storage_gb=target)
        options = [
            replace(calibration, activation_mb=0),
            find_preset(preset),
            outlier_ratio,
            target,
            [linear.name for linear in linears],
        ]
        work = _Work(output, source.identity(), texts, repr(options))
        already_packed = work.begin(resume, overwrite)
        quantizer = CalibratedQuantizer(
            StatisticsStore(work.directory, work.identity),
            outlier_ratio,
            preset,
            rounds=calibration.rounds,
            damping=calibration.damping,
            calibration=f"{work.identity[:16]}: {calibration.describe()}",
            error_compensation=calibration.error_compensation,
            on_linear=work.remember_linear,
        )
        if already_packed:
            quantizer.layouts = _stored_layouts(output)
        else:
            names = [linear.name for linear in linears]
            try:
                _refuse_non_finite(source)
                preparation = _Preparation(Path(model_path), names, texts, calibration, quantizer, work, make_plan)
                work.remember_preparation(preparation.run(target, calibration_progress))
            except RuntimeError as error:
                raise _as_os_error(error, work.directory) from error
            finally:
                work.discard_if_empty()
            del preparation
            gc.collect()
    compressor = LoopCompressor(quantizer=quantizer, target_storage_gb=target_storage_gb, **compressor_options)
    results = compressor.compress_model(
        model_path,
        output,
        resume=resume,
        overwrite=overwrite,
        progress=progress and _with_output_errors(progress, quantizer),
        evaluate_text=evaluate_text,
        max_layers=max_layers,
    )
    if stored := work.linears():
        quantizer.linears = stored
        results["calibration"] = {**work.preparation(), "window": calibration.window, **quantizer.report()}
        replace_file(output / REPORT_FILE, json_bytes(results))
    shutil.rmtree(work.directory)
    return results


def _refuse_non_finite(source: CheckpointDirectory) -> None:
    """One NaN anywhere makes all activations behind it NaN: better known before the pass, and where it is."""
    for name in source.tensor_names:
        entry, reader = source.entry(name), source.reader(name)
        if entry.dtype not in PACKABLE_DTYPES or not entry.shape or 0 in entry.shape:
            continue
        step = max(1, _CHECKED_BYTES // entry.row_nbytes)
        for first in range(0, entry.shape[0], step):
            rows = reader.read_rows(name, first, min(step, entry.shape[0] - first))
            if torch.isfinite(rows).all():
                continue
            place = (~torch.isfinite(rows)).nonzero()[0].tolist()
            value = rows[tuple(place)].item()
            where = ", ".join(map(str, [first + place[0], *place[1:]]))
            raise CheckpointError(f"{reader.path}: tensor {name}: expected finite weights, got {value} at [{where}]")


def _with_output_errors(progress: ProgressCallback, quantizer: CalibratedQuantizer) -> ProgressCallback:
    def report(step: CompressionProgress) -> None:
        last = quantizer.linears[-1] if quantizer.linears else None
        if step.finished and last is not None and last.name == step.name:
            step = replace(step, output_error=last.output_error, output_error_before=last.output_error_before)
        progress(step)

    return report


def _stored_layouts(output: Path) -> Layouts:
    layouts = read_json_object(output / REPORT_FILE)["options"]["layouts"]
    return {name: (planes, outliers) for name, (planes, outliers) in layouts.items()}


def _as_os_error(error: RuntimeError, directory: Path) -> Exception:
    """torch reports a disk that is full as a RuntimeError of its archive writer."""
    message = str(error)
    if "PytorchStreamWriter" not in message and "inline_container" not in message:
        return error
    return OSError(f"{directory}: cannot be written: {message.splitlines()[0]}")


class _Work:
    """The directory of an unfinished calibration: statistics, measurements, layouts, tuning, figures.

    Nothing in it is used for another source, text or option than it was made with.
    """

    def __init__(self, output: Path, source: object, texts: Sequence[str], options: str) -> None:
        digest = hashlib.sha256(json.dumps(source).encode())
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(options.encode())
        self.identity = digest.hexdigest()
        self.output = output
        self.directory = output.with_name(output.name + STATISTICS_SUFFIX)

    def begin(self, resume: bool, overwrite: bool) -> bool:
        """Makes the directory, or finds it again; whether the packed checkpoint is there already.

        Raises:
            OutputExistsError: there is something, and neither resume nor overwrite was asked for, or it comes from
                other work.
        """
        already_packed = resume and is_packed_checkpoint(self.output)
        if not already_packed and not overwrite and self.output.is_dir() and any(self.output.iterdir()):
            raise OutputExistsError(
                f"{self.output}: exists and is not empty; pass overwrite=True (--overwrite) to replace it"
            )
        mark = self.directory / "identity"
        if self.directory.exists():
            same = mark.is_file() and mark.read_text() == self.identity
            if resume and mark.is_file() and not same and not already_packed:
                raise OutputExistsError(
                    f"{self.directory}: was started with another source, text or options; resume with the same, or "
                    "overwrite it"
                )
            if not resume and not overwrite:
                raise OutputExistsError(
                    f"{self.directory}: left by a calibration that did not finish; pass resume=True (--resume) to "
                    "continue it or overwrite=True (--overwrite) to start over"
                )
            if not same or not resume:
                shutil.rmtree(self.directory)
        if not resume and not overwrite and partial_directory(self.output).exists():
            raise OutputExistsError(
                f"{partial_directory(self.output)}: left by a compression that did not finish; pass resume=True "
                "(--resume) to continue it or overwrite=True (--overwrite) to start over"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(mark, self.identity.encode())
        return already_packed

    def discard_if_empty(self) -> None:
        """What failed before it found anything out leaves nothing to resume."""
        if [path.name for path in self.directory.iterdir()] == ["identity"]:
            shutil.rmtree(self.directory)

    def remember_preparation(self, figures: Mapping[str, Any]) -> None:
        replace_file(self.directory / "preparation.json", json.dumps(figures).encode())

    def preparation(self) -> dict[str, Any]:
        path = self.directory / "preparation.json"
        return read_json_object(path) if path.is_file() else {}

    def remember_linear(self, linear: CalibratedLinear) -> None:
        with open(self.directory / "linears.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(linear)) + "\n")

    def linears(self) -> list[CalibratedLinear]:
        """Figures of all linears, packed by this run or before it was interrupted."""
        path = self.directory / "linears.jsonl"
        found: dict[str, CalibratedLinear] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                linear = CalibratedLinear(**json.loads(line))
            except ValueError:  # cut off by a kill, before what it tells of was stored
                continue
            found[linear.name] = linear
        return list(found.values())


class _Preparation:
    """Everything that needs the original model; it is gone when this is done."""

    def __init__(
        self,
        model_path: Path,
        names: Sequence[str],
        texts: Sequence[str],
        calibration: Calibration,
        quantizer: CalibratedQuantizer,
        work: _Work,
        make_plan: Callable[[Layouts], CompressionPlan],
    ) -> None:
        self.names = names
        self.calibration = calibration
        self.quantizer = quantizer
        self.directory = work.directory
        self.make_plan = make_plan
        self.windows, self.model = self._load(model_path, texts)

    def run(self, target_storage_gb: float | None, progress: StepCallback | None) -> dict[str, Any]:
        """Fills the quantizer; what the report says about it."""
        self._progress = progress
        with Float32Layers(self.model):
            collect_statistics(
                self.model,
                self.windows,
                self.names,
                store=self.quantizer.statistics,
                activation_bytes=int(self.calibration.activation_mb * 1e6),
                progress=lambda step: self._report(f"calibrating {step.name}", step.parts_done, step.parts_total),
            )
            weights = {name: self.model.get_submodule(name).weight for name in self.names}
            calibrated = {name: weight for name, weight in weights.items() if name in self.quantizer.statistics}
            if self.calibration.adaptive_precision:
                self.quantizer.layouts = self._allocate(calibrated, target_storage_gb)
        report: dict[str, Any] = {"tokens": self.windows.numel()}
        if self.calibration.tuning is not None:
            self.model.float()
            report["tuning"] = self._tune(calibrated, self.calibration.tuning)
        return report

    def _load(self, model_path: Path, texts: Sequence[str]) -> tuple[torch.Tensor, Any]:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
        window = self.calibration.window
        windows = calibration_windows(tokenizer, texts, window=window, max_windows=self.calibration.max_windows)
        architectures = transformers.AutoConfig.from_pretrained(model_path).architectures or []
        speaks = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        if not speaks and self.calibration.tuning is not None:
            raise ValueError(f"{model_path}: tuning needs a causal language model, got {', '.join(architectures)}")
        # Modules are called as in the checkpoint only by the class that wrote it.
        loader = getattr(transformers, architectures[0], None) if architectures else None
        if speaks or loader is None:
            loader = transformers.AutoModelForCausalLM if speaks else transformers.AutoModel
        model = loader.from_pretrained(model_path, dtype="auto")
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and window > positions:
            raise ValueError(f"window: the model has {positions} positions, got {window}")
        return windows, model

    def _allocate(self, weights: Mapping[str, torch.Tensor], target_storage_gb: float | None) -> Layouts:
        path = self.directory / "layouts.json"
        if path.is_file():
            return {name: (planes, outliers) for name, (planes, outliers) in json.loads(path.read_text()).items()}
        candidates = measure_candidates(
            self.model,
            weights,
            self.quantizer.statistics,
            self.windows[:_SENSITIVITY_WINDOWS],
            outlier_fraction=self.quantizer.outlier_ratio,
            checkpoint=self.directory / "candidates.jsonl",
            progress=lambda done, total: self._report("measuring layouts", done, total),
        )
        layouts = choose_layouts(
            candidates,
            self.make_plan,
            target_bits=self.calibration.target_bits,
            target_storage_gb=target_storage_gb,
        )
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
                sampled=self.directory / "sampled.pt",
                progress=lambda step: self._report(f"tuning, {step.description}", step.step, step.steps),
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
        if self._progress is not None:
            self._progress(CalibrationStep(description, done, total))
