"""packed_linear against the machine's limits and against what else multiplies with few bits on a CPU.

    python benchmarks/bench_packed_linear.py [--quick] [--threads 1,2] [--json FILE] [--roofline FILE.png]

Results are verified before anything is timed. Then all contenders of a table take turns, round by round, so that they
see the same minutes of a shared machine; a figure is the median over the rounds (`--statistic min` for a machine that
others use at the same time). Weights cycle through 256 MiB or more, so that no cache holds them.

The limits are measured in the same rounds: reading memory with prefetch, and int8 products from registers, both by
`libmachine_limits.so` (cmake -DLOOP_SINGULAR_BIT_BENCHMARKS=ON). Without it, `torch.max` over int64 and `torch._int_mm`
stand in for them, which reach less; the output says which was used. For one token there is a third: what the product
takes when its weight is in cache, as the difference between two small weights, so that the cost of a call drops out.
F = max(stored bytes / bandwidth, that time / threads) is what a perfect kernel would take from memory.

Printed are two tables and the goals; benchmarks/results/packed_linear.md gets every table. With --quick peers take part
in one shape at 1 and 128 tokens: a minute and a half instead of far more than ten.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from linear_contenders import OPS, ROOT, Contender, Dense, Packed, our_contenders, peers, verify
from measured_on import provenance

MEBIBYTE = 1 << 20
CYCLED_BYTES = 256 * MEBIBYTE
LIMIT_BYTES = 256 * MEBIBYTE
CACHED_BYTES = MEBIBYTE // 2
ROUND_SECONDS = 0.012
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
TOKENS = [1, 8, 32, 128, 512]
PRINTED_TOKENS = (1, 128)
BFLOAT16 = "F.linear bfloat16"


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
        # Where packed weights are too: pages of 4 KiB are read a sixth slower.
        (self.data,) = OPS.copy_to_huge_pages([torch.ones(LIMIT_BYTES // 8, dtype=torch.int64)])
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


class CachedProduct:
    """Seconds that one token times `out_features` rows take one thread when nothing has to come from memory."""

    def __init__(self, packed: Packed) -> None:
        row_bytes = packed.stored_bytes / packed.out_features
        self.packed = packed
        self.rows = [max(32, int(share * CACHED_BYTES / row_bytes) // 32 * 32) for share in (0.5, 1.0)]
        shapes = [(rows, packed.in_features, 1) for rows in self.rows]
        self.weights = [Packed(packed.planes, packed.precision, *shape) for shape in shapes]
        self.seconds: list[float] = []

    def time_round(self, input: torch.Tensor) -> None:
        """Appends one figure, by torch's threads, of which there should be one."""
        taken = []
        for weight in self.weights:
            call = weight.prepared(input, 1)
            call()
            taken.append(min(seconds_of(call, 20) for _ in range(3)))
        per_row = (taken[1] - taken[0]) / (self.rows[1] - self.rows[0])
        self.seconds.append(per_row * self.packed.out_features)


# ---- timing ----


@dataclass
class Table:
    """Figures of one shape, number of tokens and number of threads."""

    out_features: int
    in_features: int
    tokens: int
    threads: int
    bandwidth: float = 0.0  # bytes per second
    int8_rate: float = 0.0  # multiply-accumulates per second
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return (
            f"{self.out_features}x{self.in_features}, {self.tokens} token{'s' if self.tokens > 1 else ''}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}; reads {self.bandwidth / 1e9:.1f} GB/s, "
            f"int8 {self.int8_rate / 1e9:.0f} GMAC/s"
        )


def seconds_of(call: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def time_limit(work: Callable[[], int]) -> float:
    """Seconds for each unit of work."""
    begin = time.perf_counter()
    done = work()
    return (time.perf_counter() - begin) / done


def time_round(call: Callable[[], tuple[int, object]], target_seconds: float = ROUND_SECONDS) -> float:
    """Seconds per weight."""
    weights = 0
    begin = time.perf_counter()
    while True:
        weights += call()[0]
        elapsed = time.perf_counter() - begin
        if elapsed >= target_seconds:
            return elapsed / weights


def measure(
    contenders: Sequence[Contender],
    limits: MachineLimits,
    tokens: int,
    threads: int,
    rounds: int,
    summarize: Callable[[list[float]], float],
) -> Table:
    torch.set_num_threads(threads)
    table = Table(contenders[0].out_features, contenders[0].in_features, tokens, threads)
    input = torch.randn(tokens, table.in_features)
    calls = {contender.name: contender.prepared(input, threads) for contender in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cached = {each.name: CachedProduct(each) for each in contenders if tokens == 1 and isinstance(each, Packed)}
    bandwidth: list[float] = []
    int8_rate: list[float] = []
    for call in calls.values():
        call()
    for _ in range(rounds):
        bandwidth.append(time_limit(limits.read_memory))
        int8_rate.append(time_limit(limits.multiply_int8))
        torch.set_num_threads(1)
        for product in cached.values():
            product.time_round(input)
        torch.set_num_threads(threads)
        for name, call in calls.items():
            seconds[name].append(time_round(call))
    table.bandwidth = 1 / summarize(bandwidth)
    table.int8_rate = 1 / summarize(int8_rate)
    reference = summarize(seconds[BFLOAT16])
    for contender in contenders:
        taken = summarize(seconds[contender.name])
        macs = table.out_features * table.in_features * tokens / taken
        row = {
            "ms": taken * 1e3,
            "gb_per_s": contender.stored_bytes / taken / 1e9,
            "bandwidth_share": contender.stored_bytes / taken / table.bandwidth,
            "gmac_per_s": macs / 1e9,
            "int8_share": macs / table.int8_rate,
            "times_bf16": reference / taken,
            "stored_bytes": contender.stored_bytes,
        }
        if contender.name in cached:
            in_cache = summarize(cached[contender.name].seconds) / threads
            row["cached_ms"] = in_cache * 1e3
            row["to_f"] = taken / max(contender.stored_bytes / table.bandwidth, in_cache)
        table.rows[contender.name] = row
    return table


def call_overhead(rounds: int, summarize: Callable[[list[float]], float]) -> dict[str, float]:
    """Microseconds of one call on a 256x256 weight that stays in cache."""
    shape, input = (256, 256, 1), torch.randn(1, 256)
    calls = {each.name: each.prepared(input, 1) for each in (Packed(2, "int8", *shape), Dense(torch.bfloat16, *shape))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(time_round(call, 0.005))
    return {name: summarize(values) * 1e6 for name, values in seconds.items()}


# ---- printing ----


def table_lines(table: Table) -> list[str]:
    has_f = any("to_f" in row for row in table.rows.values())
    lines = [
        f"**{table.title}**",
        "",
        "| | bits | ms | GB/s stored | of bandwidth | GMAC/s | of int8 peak | times bf16 |" + " to F |" * has_f,
        "|---|---:|---:|---:|---:|---:|---:|---:|" + "---:|" * has_f,
    ]
    for name, row in table.rows.items():
        bits = 8 * row["stored_bytes"] / (table.out_features * table.in_features)
        to_f = f" {row['to_f']:.2f} |" if "to_f" in row else " |" if has_f else ""
        lines.append(
            f"| {name} | {bits:.2f} | {row['ms']:.3f} | {row['gb_per_s']:.1f} | {row['bandwidth_share']:.0%} | "
            f"{row['gmac_per_s']:.0f} | {row['int8_share']:.0%} | {row['times_bf16']:.2f} |{to_f}"
        )
    return [*lines, ""]


def goal_lines(tables: list[Table], overhead: dict[str, float]) -> list[str]:
    """Ratios that do not depend on the machine's mood, with what they should reach; b1 / b2 / b3 / b4 in each cell."""
    by_key = {(table.out_features, table.in_features, table.tokens, table.threads): table for table in tables}
    shapes = list(dict.fromkeys((table.out_features, table.in_features) for table in tables))
    token_counts = sorted({table.tokens for table in tables})

    def values(shape: tuple[int, int], tokens: int, threads: int, name: str, planes: Sequence[int]) -> list[float]:
        return [by_key[(*shape, tokens, threads)].rows[f"b{count}"][name] for count in planes]

    goals: list[tuple[str, str, str, int, Callable[[tuple[int, int], int], list[float]]]] = []

    def goal(
        tokens: int, name: str, least: str, stretch: str, cell: Callable[[tuple[int, int], int], list[float]]
    ) -> None:
        if tokens in token_counts:
            goals.append((name, least, stretch, tokens, cell))

    every = (1, 2, 3, 4)
    goal(1, "1 token: time / F", "≤ 1.25", "≤ 1.1", lambda shape, count: values(shape, 1, count, "to_f", every))
    goal(
        1,
        "1 token: times bf16, b1 / b2",
        "7 / 4.5",
        "10 / 6",
        lambda s, count: values(s, 1, count, "times_bf16", (1, 2)),
    )
    goal(
        1,
        "1 token: b2 time / b1 time",
        "1.5",
        "1.6",
        lambda s, count: [values(s, 1, count, "ms", (2,))[0] / values(s, 1, count, "ms", (1,))[0]],
    )
    goal(
        8,
        "8 tokens: time / 4 x that of 1",
        "≤ 1.3",
        "1",
        lambda s, count: [
            few / (4 * one)
            for few, one in zip(values(s, 8, count, "ms", every), values(s, 1, count, "ms", every), strict=True)
        ],
    )
    for tokens, least, stretch in ((32, "65 %", "80 %"), (128, "75 %", "85 %"), (512, "75 %", "86 %")):
        goal(
            tokens,
            f"{tokens} tokens: % of int8 peak",
            least,
            stretch,
            lambda s, count, tokens=tokens: [100 * x for x in values(s, tokens, count, "int8_share", every)],
        )
    goal(512, "512 tokens: times bf16, b2", "1.5", "2", lambda s, count: values(s, 512, count, "times_bf16", (2,)))

    lines = [
        "**Goals** (b1 / b2 / b3 / b4)",
        "",
        "| | goal | stretch | threads | " + " | ".join(f"{rows}x{columns}" for rows, columns in shapes) + " |",
        "|---|---:|---:|---:|" + "---|" * len(shapes),
    ]
    for name, least, stretch, tokens, cell in goals:
        for threads in sorted({table.threads for table in tables}):
            cells = []
            for shape in shapes:
                digits = 0 if "%" in name else 2
                cells.append(
                    " / ".join(f"{value:.{digits}f}" for value in cell(shape, threads))
                    if (*shape, tokens, threads) in by_key
                    else ""
                )
            lines.append(f"| {name} | {least} | {stretch} | {threads} | " + " | ".join(cells) + " |")
    ours, theirs = overhead["b2"], overhead[BFLOAT16]
    lines.append(
        f"| one call, 256x256: time / bf16 | ≤ 1.3 | | | {ours / theirs:.2f} ({ours:.1f} µs) |"
        + " |" * (len(shapes) - 1)
    )
    return [*lines, ""]


def plot_roofline(tables: list[Table], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(table.threads for table in tables)
    chosen = [table for table in tables if table.threads == threads]
    bandwidth = statistics.median(table.bandwidth for table in chosen)
    peak = statistics.median(table.int8_rate for table in chosen)
    figure, axes = plt.subplots(figsize=(9, 5.5))
    intensities = [2.0**i for i in range(-2, 14)]
    axes.plot(intensities, [min(peak, i * bandwidth) / 1e9 for i in intensities], "k-", label="memory, int8 products")
    for name in dict.fromkeys(name for table in chosen for name in table.rows):
        points = [
            (table.out_features * table.in_features * table.tokens / row["stored_bytes"], row["gmac_per_s"])
            for table in chosen
            if (row := table.rows.get(name)) is not None
        ]
        is_ours = name.startswith("b") and name[1:].isdigit()
        axes.plot(*zip(*sorted(points), strict=True), "o" if is_ours else "x", label=name, markersize=6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("multiply-accumulates per stored byte")
    axes.set_ylabel("GMAC/s")
    axes.set_title(f"Linear layers from memory, {threads} threads: {', '.join(map(str, TOKENS))} tokens")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, peers in one shape: a minute and a half")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}", help="numbers of threads, comma-separated")
    parser.add_argument("--precision", choices=("int8", "int16", "exact"), default="int8")
    parser.add_argument("--statistic", choices=("median", "min"), default="median")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    parser.add_argument(
        "--report",
        type=Path,
        default=ROOT / "benchmarks/results/packed_linear.md",
        metavar="FILE.md",
        help="where every table goes",
    )
    parser.add_argument(
        "--roofline",
        type=Path,
        default=ROOT / "benchmarks/results/packed_linear_roofline.png",
        metavar="FILE.png",
        help="where the roofline plot goes (needs matplotlib)",
    )
    arguments = parser.parse_args()

    torch.manual_seed(0)
    threads = sorted({int(count) for count in arguments.threads.split(",")})
    summarize = statistics.median if arguments.statistic == "median" else min
    rounds = 11
    limits = MachineLimits()
    tables: list[Table] = []
    with torch.inference_mode():
        largest = verify(arguments.precision, threads[-1])
        protocol = (
            f"Instruction set {OPS.isa()}, activations {arguments.precision}, 1 % outliers; limits from "
            f"{limits.source}; {arguments.statistic} of {rounds} rounds"
            f"{', from 128 tokens up of 4' * arguments.quick}; "
            f"all results verified (largest relative error {largest:.4f})."
        )
        print(f"{protocol}\n")
        for shape in SHAPES:
            ours = our_contenders(shape, arguments.precision, CYCLED_BYTES)
            others = peers(shape, CYCLED_BYTES) if not arguments.quick or shape == SHAPES[0] else []
            for tokens in TOKENS:
                with_peers = others if not arguments.quick or tokens in PRINTED_TOKENS else []
                few = arguments.quick and tokens >= 128
                for count in threads:
                    table = measure([*ours, *with_peers], limits, tokens, count, 4 if few else rounds, summarize)
                    tables.append(table)
                    if shape == SHAPES[0] and tokens in PRINTED_TOKENS and count == threads[-1]:
                        print("\n".join(table_lines(table)), flush=True)
        torch.set_num_threads(threads[-1])
        overhead = call_overhead(4 * rounds, summarize)
    goals = goal_lines(tables, overhead)
    print("\n".join(goals), flush=True)
    command = " ".join(["python benchmarks/bench_packed_linear.py", *sys.argv[1:]])
    every_table = [line for table in tables for line in table_lines(table)]
    arguments.report.write_text("\n".join([provenance(command), "", protocol, "", *goals, *every_table]))
    if arguments.json:
        report = {"tables": [vars(table) for table in tables], "call_overhead_us": overhead}
        arguments.json.write_text(json.dumps(report, indent=1))
    plot_roofline(tables, arguments.roofline)


if __name__ == "__main__":
    main()
