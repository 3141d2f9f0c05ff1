"""`loop-singular-bit compress`: a checkpoint to a packed checkpoint, with a progress bar and a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibrated_compression import CalibrationStep
    from .compression_run import CompressionProgress
    from .quantization.tuning import TuningOptions
    from .validation import QualityValidator

HELP = "compress a checkpoint directory (config.json and safetensors files) or a model of the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cli import add_output_arguments

    parser.add_argument("source", metavar="SRC", help="checkpoint directory, or the name of a model on the Hub")
    parser.add_argument("output", metavar="DST", type=Path, help="directory to make")
    parser.add_argument("--preset", default="b2", help="b1, b2 (default), b3, b4 or historic")
    parser.add_argument("--outlier-ratio", metavar="R", type=float, help="outliers of a row over its columns, 0 to 1")
    parser.add_argument(
        "--target-ram-mb", metavar="MB", type=float, default=400.0, help="limit of peak resident memory (default 400)"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--target-bits",
        metavar="BITS",
        type=float,
        help="stored bits per weight of the linears: planes and outliers are chosen linear by linear, by what the "
        "model minds on the calibration text, or without one by errors of weights",
    )
    sizes.add_argument(
        "--target-storage-gb",
        metavar="GB",
        type=float,
        help="size of the packed shards, embeddings and everything counted; planes are chosen as for --target-bits",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--uniform",
        dest="adaptive_precision",
        action="store_const",
        const=False,
        help="give every linear the preset's planes, also with --calibration; --target-storage-gb is only checked",
    )
    precision.add_argument(
        "--adaptive-precision",
        action="store_const",
        const=True,
        help="choose planes linear by linear for as many bits as the preset takes (the default with --calibration)",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads that quantize; the bytes do not depend on it")
    parser.add_argument(
        "--skip-modules",
        metavar="NAME",
        nargs="+",
        default=[],
        help="modules to keep: what their names start or end with at a dot, or regular expressions",
    )
    parser.add_argument("--keep-embeddings", action="store_true", help="do not pack token embeddings and output heads")
    parser.add_argument("--max-layers", metavar="N", type=int, help="pack the first N layers only, keep the others")
    parser.add_argument("--max-shard-gb", metavar="GB", type=float, default=5.0, help="largest shard (default 5)")
    parser.add_argument("--resume", action="store_true", help="continue what was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="replace a packed checkpoint, finished or not, at DST")
    parser.add_argument("--force", action="store_true", help="allow a preset that is unusable without calibration")
    parser.add_argument(
        "--evaluate-text",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="also measure the perplexity of both on UTF-8 text",
    )
    parser.add_argument(
        "--quality-threshold",
        metavar="PERCENT",
        type=float,
        help="with --evaluate-text: fail (exit code 5) when perplexity rises by more (default 1; any with one of the "
        "next two)",
    )
    parser.add_argument(
        "--max-kl-divergence",
        metavar="NATS",
        type=float,
        help="with --evaluate-text: fail (exit code 5) when the mean KL divergence is above this",
    )
    parser.add_argument(
        "--min-top1-agreement",
        metavar="SHARE",
        type=float,
        help="with --evaluate-text: fail (exit code 5) when fewer first words agree, 0 to 1",
    )
    parser.add_argument(
        "--max-relative-error",
        metavar="ERROR",
        type=float,
        help="fail (exit code 5) when a packed weight is off by more of its Frobenius norm",
    )
    parser.add_argument(
        "--max-output-error",
        metavar="ERROR",
        type=float,
        help="with --calibration: fail (exit code 5) when a layer's outputs on the text are off by more of their norm",
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        nargs="+",
        help="text of the kind the model will see, to pack for the least error of the outputs on it: UTF-8 files, "
        "directories of *.txt, or data sets, on disk (*.jsonl, *.parquet, ...) or on the Hugging Face Hub, as "
        "NAME[:CONFIG[:SPLIT[:COLUMN]]]. Runs the original once; --target-ram-mb does not apply",
    )
    parser.add_argument("--calibration-window", metavar="TOKENS", type=int, default=512, help="(default 512)")
    parser.add_argument(
        "--calibration-windows", metavar="N", type=int, default=128, help="at most so many windows (default 128)"
    )
    parser.add_argument("--calibration-rounds", metavar="N", type=int, default=5, help="of refinement (default 5)")
    parser.add_argument(
        "--calibration-activations-mb",
        metavar="MB",
        type=float,
        default=2000.0,
        help="hidden states of the text above this size lie in a file beside DST (default 2000)",
    )
    parser.add_argument(
        "--no-error-compensation",
        dest="error_compensation",
        action="store_const",
        const=False,
        help="with --calibration: only weight columns by their inputs, without sweep and rounds (quick, and worse)",
    )
    parser.add_argument(
        "--tune",
        choices=["scales", "signs"],
        help="with --calibration: then train scales and outliers, or signs as well, to say what the original says",
    )
    parser.add_argument(
        "--tuning-steps",
        metavar="N",
        type=int,
        default=60,
        help="of 2048 tokens (default 60: enough for scales, while signs gain from hundreds)",
    )
    parser.add_argument(
        "--tuning-layer-steps",
        metavar="N",
        type=int,
        default=0,
        help="first tune decoder layers one by one, so many steps each; the best start for signs (default 0: not)",
    )
    parser.add_argument(
        "--tuning-sampled-windows",
        metavar="N",
        type=int,
        default=128,
        help="windows that the original writes itself, to tune on beside the text (default 128; worth it for signs)",
    )
    parser.add_argument(
        "--tuning-memory-gb",
        metavar="GB",
        type=float,
        default=12.0,
        help="what tuning may take beside the original; above it layers are tuned one by one (default 12)",
    )
    add_output_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    from .cli import EXIT_OK, EXIT_QUALITY, PROGRAM, print_json

    if not parsed.calibration and (parsed.tune or parsed.error_compensation is not None):
        raise ValueError("--tune and --no-error-compensation need --calibration TEXT...")
    validator = _validator(parsed)
    texts = [path.read_text(encoding="utf-8") for path in parsed.evaluate_text or ()]
    source = find_source(parsed.source)

    from .compressor import LoopCompressor

    compressor = LoopCompressor(
        outlier_ratio=parsed.outlier_ratio,
        target_ram_mb=None if parsed.calibration else parsed.target_ram_mb,
        target_storage_gb=parsed.target_storage_gb,
        preset=parsed.preset,
        adaptive_precision=parsed.adaptive_precision,
        error_compensation=parsed.error_compensation,
        target_bits=parsed.target_bits,
        threads=parsed.threads,
        skip_modules=parsed.skip_modules,
        quantize_embeddings=not parsed.keep_embeddings,
        max_shard_gb=parsed.max_shard_gb,
        force=parsed.force,
        validator=validator,
    )
    calibration = _calibration_options(parsed) if parsed.calibration else {}
    with _Progress(disable=parsed.quiet) as progress:
        results = compressor.compress_model(
            source,
            parsed.output,
            resume=parsed.resume,
            overwrite=parsed.overwrite,
            max_layers=parsed.max_layers,
            evaluate_text=texts or None,
            progress=progress.update,
            calibration_progress=progress.update_calibration,
            **calibration,
        )
    validation = compressor.validate_compression()
    if parsed.json:
        print_json({**results, "output": str(parsed.output), "validation": validation})
    elif not parsed.quiet:
        _print_table(results, validation, parsed.output)
    if validation["passed"]:
        return EXIT_OK
    for name, check in validation.items():
        if isinstance(check, dict) and check["status"] == "fail":
            print(
                f"{PROGRAM}: {name} target missed: {check['measured']:.4g} {check['unit']}, target {check['target']:g}",
                file=sys.stderr,
            )
    return EXIT_QUALITY


def _validator(parsed: argparse.Namespace) -> QualityValidator:
    from .validation import QualityValidator

    of_text = ("max_kl_divergence", "min_top1_agreement")
    for name in of_text:
        if getattr(parsed, name) is not None and not parsed.evaluate_text:
            raise ValueError(f"--{name.replace('_', '-')} is about a text; name one with --evaluate-text FILE...")
    if parsed.max_output_error is not None and not parsed.calibration:
        raise ValueError("--max-output-error is about outputs on a text; name it with --calibration TEXT...")
    threshold = parsed.quality_threshold
    if threshold is None:
        threshold = 1.0 if all(getattr(parsed, name) is None for name in of_text) else None
    return QualityValidator(
        threshold,
        max_kl_divergence=parsed.max_kl_divergence,
        min_top1_agreement=parsed.min_top1_agreement,
        max_relative_error=parsed.max_relative_error,
        max_output_error=parsed.max_output_error,
    )


def _tuning_options(parsed: argparse.Namespace) -> TuningOptions | None:
    if parsed.tune is None:
        return None
    from .quantization.tuning import TuningOptions

    return TuningOptions(
        signs=parsed.tune == "signs",
        steps=parsed.tuning_steps,
        layer_steps=parsed.tuning_layer_steps,
        sampled_windows=parsed.tuning_sampled_windows,
        memory_gb=parsed.tuning_memory_gb,
    )


def _calibration_options(parsed: argparse.Namespace) -> dict[str, Any]:
    from .calibrated_compression import Calibration
    from .calibration_texts import read_texts

    calibration = Calibration(
        window=parsed.calibration_window,
        max_windows=parsed.calibration_windows,
        rounds=parsed.calibration_rounds,
        tuning=_tuning_options(parsed),
        activation_mb=parsed.calibration_activations_mb,
    )
    # A token is rarely longer than 8 characters.
    texts = read_texts(parsed.calibration, max_characters=8 * calibration.window * calibration.max_windows)
    return {"calibration_texts": texts, "calibration": calibration}


def find_source(name: str) -> Path:
    """A directory as it is; anything else that looks like a Hub name is downloaded into the Hub's cache.

    Raises:
        CheckpointError: neither a directory nor a name of the form organisation/model.
    """
    from .errors import CheckpointError

    if Path(name).is_dir():
        return Path(name)
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: expected a directory, or a Hub name of the form organisation/model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"{name} is no directory, and the Hub needs: pip install huggingface_hub") from error
    try:
        # Downloads weights as safetensors only: pickles run code, and nothing here reads them.
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.md"]))
    except Exception as error:
        raise CheckpointError(f"{name}: no such directory, and the Hub says: {error}") from error


class _Progress:
    """On standard error: a bar of calibration steps, then one of bytes with the error of the module just done."""

    _CALIBRATION_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    _BYTES_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]{postfix}"

    def __init__(self, disable: bool) -> None:
        self._disable = disable
        self._bar: Any = None
        self._stage = ""
        self._error = ""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def update_calibration(self, step: CalibrationStep) -> None:
        if self._disable:
            return
        stage = step.description.split()[0]  # what follows tells one step from the next
        if stage != self._stage:
            self._open(stage, total=step.total, bar_format=self._CALIBRATION_FORMAT)
        self._bar.set_description_str(step.description, refresh=False)
        self._bar.update(step.done - self._bar.n)
        if step.done == step.total:
            self._close()

    def update(self, progress: CompressionProgress) -> None:
        if self._disable:
            return
        if self._stage != "bytes":
            self._open(
                "bytes",
                total=progress.bytes_total,
                initial=progress.bytes_resumed,
                unit="B",
                unit_scale=True,
                delay=0.1,
                bar_format=self._BYTES_FORMAT,
            )
        if progress.finished and progress.output_error is not None:
            self._error = f"{progress.name} output error "
            self._error += f"{progress.output_error_before:.4f} -> {progress.output_error:.4f}, "
        elif progress.finished and progress.relative_error is not None:
            self._error = f"{progress.name} error {progress.relative_error:.4f}, "
        self._bar.set_postfix_str(
            f"{self._error}{progress.tensors_done}/{progress.tensors_total} tensors, {progress.peak_ram_mb:.0f} MB RAM",
            refresh=False,
        )
        self._bar.update(progress.bytes_done - self._bar.n)
        if progress.tensors_done == progress.tensors_total:
            self._bar.refresh()

    def _open(self, stage: str, **options: Any) -> None:
        from tqdm import tqdm

        self._close()
        self._stage = stage
        self._bar = tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, **options)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


def _print_table(results: dict[str, Any], validation: dict[str, Any], output: Path) -> None:
    from rich import box
    from rich.table import Table

    from .cli import make_console

    summary = results["compression_summary"]
    console = make_console()
    title = f"{output}: preset {results['options']['preset']}"
    if results["options"]["layouts"]:
        title += ", planes chosen linear by linear"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    calibrated = {linear["name"]: linear for linear in results.get("calibration", {}).get("linears", ())}
    outputs = ("output error without", "with calibration") if calibrated else ()
    for heading in ("modules", "shape", "planes", "bits/weight", "relative error", "SQNR dB", *outputs):
        table.add_column(heading, justify="left" if heading == "modules" else "right")
    for name, group in _groups(results["layer_results"]).items():
        errors = [layer["relative_error"] for layer in group if layer["relative_error"] is not None]
        sqnrs = [layer["sqnr_db"] for layer in group if layer["sqnr_db"] is not None]
        shapes = {f"{layer['out_features']} x {layer['in_features']}" for layer in group}
        table.add_row(
            f"{name} ({len(group)})" if len(group) > 1 else name,
            shapes.pop() if len(shapes) == 1 else "various",
            _span([layer["planes"] for layer in group], 0),
            _span([layer["bits_per_weight"] for layer in group], 3),
            _span(errors, 4),
            _span(sqnrs, 1),
            *(
                _span([calibrated[layer["name"]][figure] for layer in group if layer["name"] in calibrated], 4)
                for figure in (("output_error_before", "output_error") if calibrated else ())
            ),
        )
    console.print(table)
    ratio = summary["average_compression_ratio"]
    lines = [
        f"{summary['layers_compressed']} modules packed at {summary['bits_per_weight']:.3f} bits per weight "
        f"(linears {_figure(summary['bits_per_weight_linears'])}, embeddings and head "
        f"{_figure(summary['bits_per_weight_embeddings_and_heads'])}), {ratio:.2f} times smaller than "
        f"{summary['baseline_dtype']}",
        f"{summary['source_bytes']:,} bytes on disk before, {summary['output_bytes']:,} after "
        f"({summary['file_compression_ratio']:.2f} times smaller); "
        f"{summary['bits_per_parameter']:.3f} bits per parameter, everything counted",
        f"peak RAM {summary['max_ram_usage_mb']:.0f} MB ({validation['ram']['status']}), {summary['seconds']:.1f} s, "
        f"relative error of all packed weights {_figure(summary['relative_error'])}",
        *_calibration_lines(results),
        _quality_line(results, validation),
    ]
    kept = [tensor for tensor in results["kept_tensors"] if tensor["reason"] != "not a 2-D weight"]
    lines += [f"kept as it is: {tensor['name']}: {tensor['reason']}" for tensor in kept[:20]]
    if len(kept) > 20:
        lines.append(f"and {len(kept) - 20} more: see compression_report.json")
    lines += [f"tied: {head} uses {embedding}" for head, embedding in results["tied_modules"].items()]
    for line in lines:
        console.print(line, markup=False)


def _calibration_lines(results: dict[str, Any]) -> list[str]:
    if "calibration" not in results:
        return []
    calibration = results["calibration"]
    lines = [f"calibrated on {calibration['tokens']:,} tokens; {calibration['calibration'].partition(': ')[2]}"]
    if raised := calibration["raised_damping"]:
        lines.append(f"{len(raised)} linears needed more damping: see compression_report.json")
    if missing := calibration["uncalibrated"]:
        lines.append(f"{len(missing)} linears were never called on the text and are packed without: {missing[0]}, ...")
    if (tuning := calibration.get("tuning")) is not None:
        lines.append(
            f"tuning: KL on held-out windows of the calibration text {tuning['kl_before']:.4f} -> "
            f"{tuning['kl_after']:.4f} ({'kept' if tuning['kept'] else 'not kept'})"
        )
    return lines


def _quality_line(results: dict[str, Any], validation: dict[str, Any]) -> str:
    if results["evaluation"] is None:
        return "quality: not evaluated (give --evaluate-text, or run: loop-singular-bit evaluate DST --against SRC)"
    evaluation = results["evaluation"]
    return (
        f"quality: perplexity {evaluation['perplexity_original']:.3f} -> {evaluation['perplexity']:.3f}, "
        f"KL {evaluation['kl_divergence']:.4f} nats per token, top-1 agreement {evaluation['top1_agreement']:.3f} "
        f"({validation['quality']['status']})"
    )


def _groups(layers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same module of all layers in one row of the table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        name = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        groups.setdefault(name, []).append(layer)
    return groups


def _span(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = f"{min(known):.{digits}f}", f"{max(known):.{digits}f}"
    return low if low == high else f"{low} - {high}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
