"""Checkpoints to packed checkpoints with a calibration text: one pass of the original model, then `LoopCompressor`."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .checkpoint_directory import CheckpointDirectory
from .compression_output import REPORT_FILE, partial_directory
from .compression_run import ProgressCallback, json_bytes
from .compressor import LoopCompressor
from .errors import CheckpointError
from .quantization.calibration import (
    DEFAULT_MAX_WINDOWS,
    DEFAULT_WINDOW,
    CalibrationProgress,
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from .quantization.presets import DEFAULT_PRESET, Preset
from .quantization.quantize_calibrated import DEFAULT_DAMPING, DEFAULT_ROUNDS, CalibratedQuantizer
from .safetensors_stream import replace_file

STATISTICS_SUFFIX = ".calibration"


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


def compress_calibrated(
    model_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    texts: Sequence[str],
    preset: str | Preset = DEFAULT_PRESET,
    *,
    outlier_ratio: float | None = None,
    window: int = DEFAULT_WINDOW,
    max_windows: int = DEFAULT_MAX_WINDOWS,
    rounds: int = DEFAULT_ROUNDS,
    damping: float = DEFAULT_DAMPING,
    resume: bool = False,
    overwrite: bool = False,
    calibration_progress: Callable[[CalibrationProgress], None] | None = None,
    progress: ProgressCallback | None = None,
    **compressor_options: Any,
) -> dict[str, Any]:
    """Compresses a checkpoint directory as `LoopCompressor` does, its linears for the least error of their outputs.

    Loads the original with Transformers and runs it once over the text. The statistics of the linears' inputs lie in
    `<output_path>.calibration` until the packed checkpoint is complete: a run that was killed continues there. Embeddings
    and heads are packed as without calibration. The same texts give the same bytes.

    Args:
        texts: of the kind the model will see; 16 to 64 thousand tokens are enough.
        window: tokens of a window; see `calibration_windows`.
        max_windows: of more windows that many are taken, evenly spread.
        rounds, damping: see `ops.quantize_calibrated`.
        resume: continue what was interrupted, statistics and checkpoint.
        calibration_progress: called after each decoder layer of the pass.
        progress: called after every block of the compression.
        compressor_options: further arguments of `LoopCompressor` (threads, skip_modules, quantize_embeddings,
            quality_threshold, target_storage_gb, max_shard_gb) and of its `compress_model` (evaluate_text, max_layers).

    Returns:
        The results of `LoopCompressor.compress_model`, with `calibration`: tokens, rounds, damping, and for each linear
        its output error on the text with and without calibration. The same stands in compression_report.json.

    Raises:
        ValueError: an option is out of range, the text is too short, or the preset has means.
        CheckpointError, OutputExistsError, OSError: see `LoopCompressor.compress_model`.
    """
    output = Path(output_path).absolute()
    run_options = {
        name: compressor_options.pop(name) for name in ("evaluate_text", "max_layers") if name in compressor_options
    }
    with CheckpointDirectory(model_path) as source:
        source_identity = json_bytes(source.identity())
    # Fails on wrong options before the long pass.
    LoopCompressor(preset=preset, outlier_ratio=outlier_ratio, force=True, **{"target_ram_mb": None, **compressor_options})
    digest = hashlib.sha256(source_identity)
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    digest.update(f"{window} {max_windows}".encode())

    directory = output.with_name(output.name + STATISTICS_SUFFIX)
    if directory.exists() and not resume:
        shutil.rmtree(directory)
    output.parent.mkdir(parents=True, exist_ok=True)
    statistics = StatisticsStore(directory, digest.hexdigest())
    finished = resume and output.is_dir() and not partial_directory(output).exists()
    tokens = 0 if finished else _collect(Path(model_path), texts, window, max_windows, statistics, calibration_progress)
    quantizer = CalibratedQuantizer(
        statistics,
        outlier_ratio,
        preset,
        rounds=rounds,
        damping=damping,
        calibration=f"{digest.hexdigest()[:16]}, {rounds} rounds, damping {damping:g}",
    )
    compressor = LoopCompressor(quantizer=quantizer, **{"target_ram_mb": None, **compressor_options})
    results = compressor.compress_model(
        model_path, output, resume=resume, overwrite=overwrite, progress=progress, **run_options
    )
    if quantizer.linears:
        results["calibration"] = {"tokens": tokens, "window": window, **quantizer.report()}
        replace_file(output / REPORT_FILE, json_bytes(results))
    shutil.rmtree(directory)
    return results


def _collect(
    model_path: Path,
    texts: Sequence[str],
    window: int,
    max_windows: int,
    statistics: StatisticsStore,
    progress: Callable[[CalibrationProgress], None] | None,
) -> int:
    """Fills the store; the number of tokens. The model is gone when this returns."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    windows = calibration_windows(tokenizer, texts, window=window, max_windows=max_windows)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and window > positions:
        raise ValueError(f"window: the model has {positions} positions, got {window}")
    head = model.get_output_embeddings()
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    if not names:
        raise CheckpointError(f"{model_path}: the model has no linears to calibrate")
    collect_statistics(model, windows, names, store=statistics, progress=progress)
    return windows.numel()
