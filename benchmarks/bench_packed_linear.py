"""packed_linear against the machine's limits and against what else PyTorch offers on a CPU.

    python benchmarks/bench_packed_linear.py [--quick] [--threads 1,2] [--json FILE] [--roofline FILE.png]

Results are verified before anything is timed. Then all contenders of a table take turns, round by round, so that they
see the same minutes of a shared machine; a figure is the median over the rounds (`--statistic min` for a machine that
others use at the same time). Weights cycle through 256 MiB or more, so that no cache holds them.

The limits are measured in the same rounds: reading memory with prefetch, and int8 products from registers, both by
`libmachine_limits.so` (cmake -DLOOP_SINGULAR_BIT_BENCHMARKS=ON). Without it, `torch.max` over int64 and `torch._int_mm`
stand in for them, which reach less; the output says which was used.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import loop_singular_bit.ops  # noqa: E402, F401  (loads the operators)

OPS = torch.ops.loop_singular_bit
MEBIBYTE = 1 << 20
CYCLED_BYTES = 256 * MEBIBYTE
LIMIT_BYTES = 256 * MEBIBYTE
# Plane scales in units of the format's grid.
PLANE_LEVELS = {1: (126,), 2: (84, 42), 3: (72, 36, 18), 4: (66, 33, 18, 9)}


@dataclass
class Contender:
    """One line of a table: `call(i)` does its work once, on the i-th of `copies` weights."""

    name: str
    call: Callable[[int], object]
    copies: int
    stored_bytes: int
    seconds: list[float] = field(default_factory=list)


# ---- limits ----


class MachineLimits:
    """Memory bandwidth and int8 rate that kernels are held against."""

    def __init__(self) -> None:
        libraries = sorted(ROOT.glob("build*/**/libmachine_limits.so"), key=lambda path: path.stat().st_mtime)
        self.library = ctypes.CDLL(str(libraries[-1])) if libraries else None
        if self.library is not None:
            self.library.loop_singular_bit_read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
            self.library.loop_singular_bit_spin_int8_products.argtypes = [ctypes.c_int64, ctypes.c_int32]
            self.library.loop_singular_bit_spin_int8_products.restype = ctypes.c_int64
        self.data = torch.ones(LIMIT_BYTES // 8, dtype=torch.int64)
        self.square = torch.ones(1024, 1024, dtype=torch.int8)

    @property
    def source(self) -> str:
        return "libmachine_limits.so" if self.library is not None else "torch.max(int64) and torch._int_mm"

    def read_memory(self) -> int:
        """Reads LIMIT_BYTES with all of torch's threads."""
        if self.library is None:
            self.data.max()
        else:
            self.library.loop_singular_bit_read_memory(self.data.data_ptr(), LIMIT_BYTES, torch.get_num_threads())
        return LIMIT_BYTES

    def multiply_int8(self) -> int:
        """Returns the multiply-accumulates done by all of torch's threads."""
        if self.library is None:
            torch._int_mm(self.square, self.square)
            return 1024**3
        return self.library.loop_singular_bit_spin_int8_products(1_000_000, torch.get_num_threads())


# ---- contenders ----


def random_packed(out_features: int, in_features: int, planes: int) -> tuple[torch.Tensor, ...]:
    """A packed weight as the quantizer would write it, with 1 % outliers: signs, scales, outliers, column scales."""
    tiles, words, outliers = -(-out_features // 32), -(-in_features // 32), -(-in_features // 100)
    unit = (1 + torch.rand(tiles, 1, 32)) * 2**-13
    levels = torch.tensor(PLANE_LEVELS[planes], dtype=torch.float32).reshape(1, planes, 1)
    edges = torch.arange(outliers + 1) * in_features // outliers
    span = (edges[1:] - edges[:-1]).reshape(1, outliers, 1)
    columns = edges[:-1].reshape(1, outliers, 1) + (torch.rand(tiles, outliers, 32) * span).long()
    return (
        torch.randint(-(2**31), 2**31 - 1, (tiles, planes, words, 32), dtype=torch.int32),
        (levels * unit).half(),
        columns.to(torch.uint16),
        torch.randint(-127, 128, (tiles, outliers, 32), dtype=torch.int8),
        torch.full((tiles, 32), 2**-10, dtype=torch.float16),
        (0.5 + torch.rand(in_features)).half(),
    )


def packed_bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def packed_linear(x: torch.Tensor, packed: tuple[torch.Tensor, ...], out_features: int, precision: str) -> torch.Tensor:
    return OPS.packed_linear(x, *packed, None, None, out_features, activation_precision=precision)


def verify(out_features: int, in_features: int, planes: int) -> None:
    """Raises when the operator is further from the dequantized product than its precision allows."""
    packed = random_packed(out_features, in_features, planes)
    dense = OPS.dequantize(*packed, None, out_features, in_features, dtype=torch.float32).double()
    for tokens in (1, 8, 33):
        x = torch.randn(tokens, in_features)
        exact = F.linear(x.double(), dense)
        for precision, bound in (("int8", 0.02), ("int16", 1e-3), ("exact", 1e-5)):
            got = packed_linear(x, packed, out_features, precision).double()
            error = float((got - exact).norm() / exact.norm())
            if not error <= bound:
                raise SystemExit(f"b{planes}, {tokens} tokens, {precision}: relative error {error:.2e} > {bound:.0e}")


def cycled(make: Callable[[], tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
    first = make()
    return [first] + [make() for _ in range(math.ceil(CYCLED_BYTES / packed_bytes(first)) - 1)]


def contenders(out_features: int, in_features: int, tokens: int, dense: bool, precision: str) -> list[Contender]:
    x = torch.randn(tokens, in_features)
    low = x.bfloat16()
    lines: list[Contender] = []

    def add(name: str, weights: list[tuple[torch.Tensor, ...]], call: Callable[..., object]) -> None:
        lines.append(Contender(name, lambda i: call(*weights[i]), len(weights), packed_bytes(weights[0])))

    for planes in range(1, 5):
        weights = cycled(lambda planes=planes: random_packed(out_features, in_features, planes))
        add(f"b{planes}", weights, lambda *packed: packed_linear(low, packed, out_features, precision))
    if dense:
        bf16 = cycled(lambda: (torch.randn(out_features, in_features).bfloat16(),))
        add("F.linear bfloat16", bf16, lambda weight: F.linear(low, weight))
        f32 = cycled(lambda: (torch.randn(out_features, in_features),))
        add("F.linear float32", f32, lambda weight: F.linear(x, weight))
        int4 = cycled(lambda: int4_weight(out_features, in_features))
        add(
            "PyTorch int4 (group 128)",
            int4,
            lambda weight, scales: torch.ops.aten._weight_int4pack_mm_for_cpu(low, weight, 128, scales),
        )
    return lines


def int4_weight(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    scales = torch.full((in_features // 128, out_features, 2), 0.01, dtype=torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales


# ---- timing ----


@dataclass
class Table:
    """Figures of one shape, number of tokens and number of threads."""

    out_features: int
    in_features: int
    tokens: int
    threads: int
    bandwidth: float  # bytes per second
    int8_rate: float  # multiply-accumulates per second
    rows: dict[str, dict[str, float]]

    @property
    def title(self) -> str:
        return (
            f"{self.out_features}x{self.in_features}, {self.tokens} token{'s' if self.tokens > 1 else ''}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}; reads {self.bandwidth / 1e9:.1f} GB/s, "
            f"int8 {self.int8_rate / 1e9:.0f} GMAC/s"
        )


def timed(work: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def time_round(line: Contender, offset: int, target_seconds: float) -> int:
    """Appends seconds per call. Returns the weight to go on with, so that every call finds its weight out of cache."""
    calls = 0
    begin = time.perf_counter()
    while True:
        line.call((offset + calls) % line.copies)
        calls += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= target_seconds:
            line.seconds.append(elapsed / calls)
            return (offset + calls) % line.copies


def measure(
    lines: list[Contender], limits: MachineLimits, shape: tuple[int, int, int], rounds: int, statistic: str
) -> Table:
    out_features, in_features, tokens = shape
    summarize = statistics.median if statistic == "median" else min
    bandwidth: list[float] = []
    int8_rate: list[float] = []
    offsets = [0] * len(lines)
    for line in lines:
        line.seconds.clear()
        line.call(0)
    for _ in range(rounds):
        seconds, read = timed(limits.read_memory)
        bandwidth.append(seconds / read)
        seconds, done = timed(limits.multiply_int8)
        int8_rate.append(seconds / done)
        for i, line in enumerate(lines):
            offsets[i] = time_round(line, offsets[i], 0.012)
    table = Table(out_features, in_features, tokens, torch.get_num_threads(), 0.0, 0.0, {})
    table.bandwidth = 1 / summarize(bandwidth)
    table.int8_rate = 1 / summarize(int8_rate)
    reference = {line.name: summarize(line.seconds) for line in lines}.get("F.linear bfloat16", math.nan)
    for line in lines:
        seconds = summarize(line.seconds)
        macs = out_features * in_features * tokens / seconds
        table.rows[line.name] = {
            "ms": seconds * 1e3,
            "gb_per_s": line.stored_bytes / seconds / 1e9,
            "bandwidth_share": line.stored_bytes / seconds / table.bandwidth,
            "gmac_per_s": macs / 1e9,
            "int8_share": macs / table.int8_rate,
            "times_bf16": reference / seconds,
            "stored_bytes": line.stored_bytes,
        }
    return table


def print_table(table: Table) -> None:
    print(f"\n**{table.title}**\n")
    print("| | ms | GB/s stored | of bandwidth | GMAC/s | of int8 peak | times bf16 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in table.rows.items():
        ratio = f"{row['times_bf16']:.2f}" if row["times_bf16"] == row["times_bf16"] else ""
        print(
            f"| {name} | {row['ms']:.3f} | {row['gb_per_s']:.1f} | {row['bandwidth_share']:.0%} | "
            f"{row['gmac_per_s']:.0f} | {row['int8_share']:.0%} | {ratio} |"
        )
    sys.stdout.flush()


def call_overhead(rounds: int, statistic: str) -> dict[str, float]:
    """Microseconds of one call on a 256x256 weight that stays in cache."""
    packed = random_packed(256, 256, 2)
    x = torch.randn(1, 256).bfloat16()
    weight = torch.randn(256, 256).bfloat16()
    lines = [
        Contender("b2", lambda i: packed_linear(x, packed, 256, "int8"), 1, 0),
        Contender("F.linear bfloat16", lambda i: F.linear(x, weight), 1, 0),
    ]
    for _ in range(rounds):
        for line in lines:
            time_round(line, 0, 0.005)
    summarize = statistics.median if statistic == "median" else min
    return {line.name: summarize(line.seconds) * 1e6 for line in lines}


def plot_roofline(tables: list[Table], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(table.threads for table in tables)
    chosen = [table for table in tables if table.threads == threads]
    bandwidth = max(table.bandwidth for table in chosen)
    peak = max(table.int8_rate for table in chosen)
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities = [2.0**i for i in range(0, 14)]
    axes.plot(intensities, [min(peak, i * bandwidth) / 1e9 for i in intensities], "k-", label="memory, int8 products")
    for name in chosen[0].rows:
        points = [
            (table.out_features * table.in_features * table.tokens / row["stored_bytes"], row["gmac_per_s"])
            for table in chosen
            if (row := table.rows.get(name)) is not None
        ]
        axes.plot(*zip(*sorted(points), strict=True), "o", label=name, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("multiply-accumulates per stored byte")
    axes.set_ylabel("GMAC/s")
    axes.set_title(f"packed_linear, {threads} threads")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds: under a minute")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}", help="numbers of threads, comma-separated")
    parser.add_argument("--precision", choices=("int8", "int16", "exact"), default="int8")
    parser.add_argument("--statistic", choices=("median", "min"), default="median")
    parser.add_argument("--json", metavar="FILE", help="also write all figures here")
    parser.add_argument("--roofline", metavar="FILE.png", help="also draw a roofline plot (needs matplotlib)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    threads = sorted({int(count) for count in arguments.threads.split(",")})
    shapes = [(4096, 4096)] if arguments.quick else [(4096, 4096), (14336, 4096), (4096, 14336)]
    token_counts = [1, 8, 128] if arguments.quick else [1, 8, 32, 128, 512]
    rounds = 5 if arguments.quick else 11
    limits = MachineLimits()

    with torch.inference_mode():
        for planes in range(1, 5):
            verify(300, 1000, planes)
        print(
            f"isa {OPS.isa()}, activations {arguments.precision}, 1 % outliers, limits from {limits.source}, "
            f"{arguments.statistic} of {rounds} rounds"
        )
        tables: list[Table] = []
        for out_features, in_features in shapes:
            for tokens in token_counts:
                lines = contenders(out_features, in_features, tokens, True, arguments.precision)
                for count in threads:
                    torch.set_num_threads(count)
                    shape = (out_features, in_features, tokens)
                    tables.append(measure(lines, limits, shape, rounds, arguments.statistic))
                    print_table(tables[-1])
        torch.set_num_threads(threads[-1])
        overhead = call_overhead(4 * rounds, arguments.statistic)
        print("\n**One call, 256x256, one token, µs**\n")
        print("| b2 | F.linear bfloat16 | ratio |\n|---:|---:|---:|")
        ratio = overhead["b2"] / overhead["F.linear bfloat16"]
        print(f"| {overhead['b2']:.2f} | {overhead['F.linear bfloat16']:.2f} | {ratio:.2f} |")

    if arguments.json:
        report = {"tables": [vars(table) for table in tables], "call_overhead_us": overhead}
        Path(arguments.json).write_text(json.dumps(report, indent=1))
    if arguments.roofline:
        plot_roofline(tables, arguments.roofline)


if __name__ == "__main__":
    main()
