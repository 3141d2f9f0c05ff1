"""The native runtime against the limits of the machine: first token, prefill, decode, and what is held in memory.

    python benchmarks/make_checkpoint.py /tmp/mistral-7b-b2 --packed
    python benchmarks/bench_generate.py /tmp/mistral-7b-b2 --target-ram-mb 220 [--transformers] [--realtime]

Without a directory a small checkpoint is made. Every line is a fresh process without torch, so that its peak resident
memory (VmHWM) is its own. Where weights come from the disk, the first token is timed from the start of that process,
else from the prompt on; its prompt has 16 tokens. `mmap cold` empties the page cache before every token. Limits are
measured next to each line: reading memory with the threads of the run, int8 products from registers
(libmachine_limits.so, cmake -DLOOP_SINGULAR_BIT_BENCHMARKS=ON), and, before and after, reading the file past the page
cache into 4 MiB of memory without looking at it; after, also into as much memory as the buffers of the run and with a
look at every byte. `--realtime` runs what is timed with real-time priority, for machines that others use (needs root).

`--transformers` measures Transformers in bfloat16 on the same shapes. Where the memory that is free is not enough for
all layers, it takes two and six of them and extends the line through both: the row says "extrapolated".
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from native_generation import drop_from_cache, use_realtime

from loop_singular_bit.local_models import weight_files

ROOT = Path(__file__).resolve().parent.parent

_LIMIT_BYTES = 256 << 20
_READ_BYTES = 4 << 30
_ROUNDS = 8
_TRANSFORMERS_LAYERS = (2, 6)
_MEMORY_SHARE = 0.8  # of what is free, for a whole model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="packed checkpoint (default: a small one is made)")
    parser.add_argument(
        "--target-ram-mb", type=float, help="budget of the streamed runs (default: the smallest plus a tenth)"
    )
    parser.add_argument("--context-length", type=int, help="default: prompt and new tokens together")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the prefill (default 256)")
    parser.add_argument("--new-tokens", type=int, default=16, help="timed one by one; the median counts")
    parser.add_argument("--cache-type", choices=("float16", "int8", "float32"), default="float16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--back-ends", default="resident,direct,mmap", help="comma-separated")
    parser.add_argument("--transformers", action="store_true", help="also Transformers in bfloat16 on the same shapes")
    parser.add_argument("--realtime", action="store_true", help="real-time priority for what is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--child", metavar="OPTIONS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_transformers(json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or make_small(Path(directory))
        results = [run_child(arguments, model, kind) for kind in kinds(arguments)]
        print(table(results))
        print()
        print(breakdown(results))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def make_small(directory: Path) -> Path:
    from make_packed_checkpoint import write_packed_checkpoint

    write_packed_checkpoint(directory / "small", "small")
    return directory / "small"


def kinds(arguments: argparse.Namespace) -> list[str]:
    names: list[str] = []
    for back_end in arguments.back_ends.split(","):
        names += ["mmap cold", "mmap warm"] if back_end == "mmap" else [back_end]
    return names + (["transformers"] if arguments.transformers else [])


def run_child(arguments: argparse.Namespace, model: Path, kind: str) -> dict[str, Any]:
    options = {
        "kind": kind,
        "model": str(model),
        "target_ram_mb": arguments.target_ram_mb,
        "context_length": arguments.context_length or arguments.prompt_tokens + arguments.new_tokens,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "cache_type": arguments.cache_type,
        "threads": arguments.threads,
        "realtime": arguments.realtime,
    }
    is_native = kind != "transformers"
    rates = [disk_rate(model)] if is_native else []
    if kind == "direct":
        drop_from_cache(weight_files(model))  # rows of the embedding are read through it
    program = [str(ROOT / "benchmarks" / "native_generation.py")] if is_native else [__file__, "--child"]
    options["spawned"] = time.monotonic()
    command = [sys.executable, *program, json.dumps(options)]
    # Modules are compiled once, as elsewhere, not in every process.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = {"weights": packed_weights(model), **json.loads(done.stdout)}
    if is_native:
        rates.append(disk_rate(model))
        result["decode_seconds"] = statistics.median(result["token_seconds"])
    buffers = next((line["bytes"] for line in result["plan"]["lines"] if line["name"].endswith(" buffers")), None)
    buffer_rate = disk_rate(model, buffers, looks=True) if kind == "direct" and buffers is not None else None
    # In another process: its buffers must not count as the runtime's memory.
    limits = subprocess.run(
        [sys.executable, "-c", _LIMITS_PROGRAM, str(ROOT), str(arguments.threads), str(int(arguments.realtime))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rate = statistics.mean(rates) if rates else None
    return {"kind": kind, **result, **json.loads(limits.stdout), "disk_rate": rate, "buffer_rate": buffer_rate}


def disk_rate(model: Path, buffer_bytes: int = 4 << 20, looks: bool = False) -> float:
    from loop_singular_bit import runtime_library

    return runtime_library.read_rate(weight_files(model)[0], _READ_BYTES, buffer_bytes, looks)


_LIMITS_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/benchmarks")
import bench_generate
print(json.dumps(bench_generate.machine_limits(int(sys.argv[2]), sys.argv[3] == "1")))
"""


def machine_limits(threads: int, realtime: bool) -> dict[str, Any]:
    """Memory read rate in bytes per second and int8 multiply-accumulates per second; None without the library."""
    libraries = sorted(ROOT.glob("build*/**/libmachine_limits.so"), key=lambda path: path.stat().st_mtime)
    if not libraries:
        return {"memory_rate": None, "int8_rate": None}
    library = ctypes.CDLL(str(libraries[-1]))
    library.loop_singular_bit_read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.loop_singular_bit_spin_int8_products.argtypes = [ctypes.c_int64, ctypes.c_int32]
    library.loop_singular_bit_spin_int8_products.restype = ctypes.c_int64
    data = mmap.mmap(-1, _LIMIT_BYTES)
    data.madvise(mmap.MADV_HUGEPAGE)  # as the resident weights
    address = ctypes.addressof((ctypes.c_char * _LIMIT_BYTES).from_buffer(data))
    ctypes.memset(address, 1, _LIMIT_BYTES)
    use_realtime(realtime)
    memory, products = [], []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        library.loop_singular_bit_read_memory(address, _LIMIT_BYTES, threads)
        memory.append(_LIMIT_BYTES / (time.perf_counter() - start))
        start = time.perf_counter()
        count = library.loop_singular_bit_spin_int8_products(1_000_000, threads)
        products.append(count / (time.perf_counter() - start))
    # The first round starts the threads.
    return {"memory_rate": statistics.median(memory[1:]), "int8_rate": statistics.median(products[1:]) or None}


def measure_transformers(options: dict[str, Any]) -> dict[str, Any]:
    """bfloat16 on the same shapes, from few layers; all values are zeros: time does not depend on them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loop_singular_bit.machine import available_memory_bytes

    torch.set_num_threads(options["threads"])
    use_realtime(options["realtime"])
    config = AutoConfig.from_pretrained(options["model"])
    del config.quantization_config
    layers = config.num_hidden_layers
    measured: list[tuple[float, float, int]] = []
    fits = bfloat16_bytes(Path(options["model"])) < _MEMORY_SHARE * (available_memory_bytes() or 0)
    counts = [layers] if fits else [min(count, layers) for count in _TRANSFORMERS_LAYERS]
    for count in counts:
        config.num_hidden_layers = count
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        rotary = type(model.model.rotary_emb)(config)  # computed on construction, not loaded
        model = model.to_empty(device="cpu").eval()
        model.model.rotary_emb = rotary
        for parameter in model.parameters():
            parameter.data.zero_()
        measured.append(time_transformers(model, options["prompt_tokens"], options["new_tokens"]))
        del model
    slopes = [
        (last - first) / max(1, counts[-1] - counts[0]) for first, last in zip(measured[0], measured[-1], strict=True)
    ]
    prefill, decode, nbytes = (
        last + slope * (layers - counts[-1]) for last, slope in zip(measured[-1], slopes, strict=True)
    )
    return {
        "seconds_to_first_token": None,
        "prefill_tokens_per_second": options["prompt_tokens"] / prefill,
        "decode_seconds": decode,
        "read_bytes": 0,
        "peak_resident_bytes": None,
        "plan": {"weight_bytes": nbytes, "lines": []},
        "extrapolated": not fits,
    }


def time_transformers(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill and of a token, and bytes of weights that a token reads."""
    import torch

    tokens = torch.ones(1, prompt_tokens, dtype=torch.long)
    with torch.inference_mode():
        model(tokens[:, :2])  # starts the threads
        begin = time.perf_counter()
        output = model(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - begin
        seconds = []
        for _ in range(new_tokens):
            begin = time.perf_counter()
            output = model(tokens[:, :1], past_key_values=output.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - begin)
    nbytes = sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name)
    return prefill, statistics.median(seconds), nbytes


def packed_weights(directory: Path) -> int:
    """Weights of the linears in the layers: products per token of a prompt."""
    modules = json.loads((directory / "config.json").read_text())["quantization_config"]["modules"]
    return sum(entry["out_features"] * entry["in_features"] for name, entry in modules.items() if ".layers." in name)


def bfloat16_bytes(directory: Path) -> int:
    """Of all packed modules, unpacked."""
    modules = json.loads((directory / "config.json").read_text())["quantization_config"]["modules"]
    return 2 * sum(entry["out_features"] * entry["in_features"] for entry in modules.values())


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| | first token, s (passes over the file at the disk's rate; as many tokens) | prefill, tokens/s (int8 peak) "
        "| decode, tokens/s | s/token | GB/s of weights (memory) | GB/s read (disk) | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds = result["decode_seconds"]
        weight_bytes = result["plan"]["weight_bytes"]
        weights = weight_bytes / seconds
        read = result["read_bytes"] / seconds
        products = result["prefill_tokens_per_second"] * result["weights"]
        first = result["seconds_to_first_token"]
        passes = f" ({first * result['disk_rate'] / weight_bytes:.2f}; {first / seconds:.2f})" if read else ""
        filled = share(read, result["buffer_rate"], " by a reader that looks") if result["buffer_rate"] else ""
        peak = result["peak_resident_bytes"]
        kind = "Transformers, bfloat16" if result["kind"] == "transformers" else result["kind"]
        kind += ", extrapolated" * result.get("extrapolated", False)
        cells = [
            kind,
            "-" if first is None else f"{first:.2f}{passes}",
            f"{result['prefill_tokens_per_second']:.1f}{share(products, result['int8_rate'])}",
            f"{1 / seconds:.2f}",
            f"{seconds:.4f}",
            f"{weights / 1e9:.2f}{share(weights, result['memory_rate'])}",
            f"{read / 1e9:.2f}{share(read, result['disk_rate'])}{filled}" if read else "-",
            f"{weight_bytes / 1e6:.0f} of weights" if peak is None else f"{peak / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share(value: float, limit: float | None, what: str = "") -> str:
    return "" if not limit else f" ({value / limit:.0%} of {limit / 1e9:.2f} G{what})"


def breakdown(results: list[dict[str, Any]]) -> str:
    lines = ["| planned memory, MB | " + " | ".join(r["kind"] for r in results if r["plan"]["lines"]) + " |"]
    planned = [result for result in results if result["plan"]["lines"]]
    lines.append("|---" * (len(planned) + 1) + "|")
    names = list(dict.fromkeys(line["name"] for result in planned for line in result["plan"]["lines"]))
    for name in names:
        amounts = [
            next((f"{line['bytes'] / 1e6:.1f}" for line in result["plan"]["lines"] if line["name"] == name), "-")
            for result in planned
        ]
        lines.append(f"| {name} | {' | '.join(amounts)} |")
    totals = [f"{result['plan']['total_bytes'] / 1e6:.1f}" for result in planned]
    lines.append(f"| in all | {' | '.join(totals)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
