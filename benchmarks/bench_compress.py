"""What compressing a checkpoint costs: wall and processor time, peak memory, bytes, and where the time goes.

    python benchmarks/bench_compress.py                          # two layers of Mistral-7B's shapes (1.4 GB)
    python benchmarks/bench_compress.py --layers 32              # all of it: 14.5 GB, and 2.1 GB of output
    python benchmarks/bench_compress.py --source DIR --cold      # a checkpoint of yours, out of the page cache first

Each preset runs as `loop-singular-bit compress` in a process of its own; memory is that process's peak (VmHWM, with the
interpreter and torch), times are of the whole process. Verified before it is reported: `loop-singular-bit verify`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="checkpoint to compress instead of a random one")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the random one (default 2)")
    parser.add_argument("--presets", nargs="+", default=["b2", "b4"])
    parser.add_argument("--target-ram-mb", type=float, default=400)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each run")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="bench-compress-") as folder:
        source = arguments.source
        if source is None:
            from make_checkpoint import write_checkpoint

            source = Path(folder) / "source"
            start = time.perf_counter()
            nbytes = write_checkpoint(source, "mistral-7b", layers=arguments.layers)
            print(f"wrote {nbytes:,} bytes in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        results = [measure(source, Path(folder) / "packed", preset, arguments) for preset in arguments.presets]
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results, arguments)


def measure(source: Path, output: Path, preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.cold:
        drop_from_page_cache(source)
    command = [sys.executable, "-m", "loop_singular_bit", "compress", str(source), str(output), "--json", "--quiet"]
    command += ["--preset", preset, "--force", "--threads", str(arguments.threads)]
    command += ["--target-ram-mb", str(arguments.target_ram_mb)]
    load_before = os.getloadavg()[0]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{text.decode()}")
    report = json.loads(text)
    verify = [sys.executable, "-m", "loop_singular_bit", "verify", str(output), "--against", str(source), "--json"]
    verified = json.loads(subprocess.run([*verify, "--quiet"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    expected = report["compression_summary"]["relative_error"]
    if abs(verified["relative_error"] - expected) > 1e-6 * expected:
        raise SystemExit(f"{preset}: reported error {expected}, found {verified['relative_error']}")
    shutil.rmtree(output)
    return {
        "preset": preset,
        "wall_seconds": wall,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": report["memory"]["peak_mb"],
        "load_before": load_before,
        "weights_per_second": weights(report) / wall,
        "seconds": report["seconds"],
        "summary": report["compression_summary"],
    }


def weights(report: dict[str, Any]) -> int:
    return sum(layer["out_features"] * layer["in_features"] for layer in report["layer_results"])


def drop_from_page_cache(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def print_table(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    source = arguments.source.name if arguments.source else f"Mistral-7B shapes, {arguments.layers} layers"
    nbytes = results[0]["summary"]["source_bytes"]
    print(
        f"{source}, {nbytes / 1e9:.2f} GB {results[0]['summary']['baseline_dtype']}, {arguments.threads} threads, ",
        end="",
    )
    print(f"source {'dropped from' if arguments.cold else 'not dropped from'} the page cache.\n")
    print(
        "| preset | wall s | processor s | M weights/s | peak RAM MB | bits/weight | of linears | output GB | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for result in results:
        summary = result["summary"]
        print(
            f"| {result['preset']} | {result['wall_seconds']:.1f} | {result['processor_seconds']:.1f} "
            f"| {result['weights_per_second'] / 1e6:.0f} | {result['peak_mb']:.0f} | {summary['bits_per_weight']:.3f} "
            f"| {summary['bits_per_weight_linears']:.3f} | {summary['output_bytes'] / 1e9:.3f} "
            f"| {summary['file_compression_ratio']:.2f} |"
        )
    for result in results:
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in result["seconds"].items())
        print(f"\n{result['preset']}, main thread: {parts} s; load average before {result['load_before']:.1f}")


if __name__ == "__main__":
    main()
