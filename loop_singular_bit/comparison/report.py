"""The results of `CompressionBenchmark` as a table, as Markdown, as JSON, and as a plot of quality against bits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loop_singular_bit.compression_run import json_bytes
from loop_singular_bit.safetensors_stream import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

FILE_STEM = "method_comparison"

# Figure, heading, how a row shows it.
_Column = tuple[str, str, Callable[[Mapping[str, Any]], str]]

# Figure, title, scale.
_PLOTTED = (
    ("kl_divergence", "mean KL divergence, nats per token", "log"),
    ("perplexity_ratio", "perplexity / that of the original", "log"),
    ("top1_agreement", "share of equal first words", "linear"),
    ("bleu", "BLEU of greedy continuations against the original's", "linear"),
    ("rougeL", "ROUGE-L of greedy continuations against the original's", "linear"),
    ("relative_error", "relative error of the weights", "log"),
)
_TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
_OURS = "loop_singular_bit"


def save_comparison(results: Mapping[str, Any], directory: str | os.PathLike[str], stem: str = FILE_STEM) -> list[Path]:
    """Writes <stem>.json, .md and .png into a directory, which is made if it does not exist.

    Raises:
        ImportError: matplotlib is not installed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stem}.{suffix}" for suffix in ("json", "md", "png")]
    replace_file(paths[0], json_bytes(without_infinities(results)))
    heading = f"# Compression methods on {Path(results['model']).name}\n\n![]({paths[2].name})\n\n"
    replace_file(paths[1], (heading + comparison_markdown(results)).encode())
    plot_comparison(results, paths[2])
    return paths


def without_infinities(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for what a broken model gives."""
    if isinstance(value, Mapping):
        return {name: without_infinities(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison_table(results: Mapping[str, Any]) -> Table:
    """For the terminal: one line per variant, by bits."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = _columns(results)
    for index, (_, heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in _by_bits(results):
        style = "bold" if row["method"] == _OURS else None
        table.add_row(*(show(row) for _, _, show in columns), style=style)
    return table


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """The same table, with what was measured and how below it."""
    columns = _columns(results)
    lines = [
        "| " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    lines += ["| " + " | ".join(show(row) for _, _, show in columns) + " |" for row in _by_bits(results)]
    return "\n".join([*lines, "", *protocol_lines(results), ""])


def protocol_lines(results: Mapping[str, Any]) -> list[str]:
    """What the figures are of, in sentences."""
    protocol, original, machine = results["protocol"], results["original"], results["machine"]
    windows, tokens = protocol["calibration_windows"]
    lines = [
        f"{protocol['linears']} linears with {protocol['weights'] / 1e6:.2f} M weights; embeddings, output head and "
        "norms stay. Bits: everything stored for the linears; at 4096: the same format for a 4096 x 4096 matrix.",
    ]
    if windows:
        lines.append(f"Calibration text ({protocol['calibration_texts']}): {windows} windows of {tokens} tokens.")
    if "tokens" in original:
        lines.append(
            f"Evaluation text ({protocol['texts']}): {original['tokens']} tokens in {original['windows']} windows of "
            f"{protocol['window']}; perplexity of the original {original['perplexity']:.2f}. ± is the standard error "
            "over windows."
        )
    if "continuation" in original:
        lines.append(
            f"BLEU and ROUGE: {protocol['continuations']} greedy continuations of {protocol['new_tokens']} tokens "
            f"after {protocol['prompt_tokens']}, against the original's."
        )
    lines += [f"Skipped: {entry['name']}: {entry['reason']}." for entry in results["skipped"]]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    lines.append(f"{results['date']}, {machine['processor']}, {machine['isa']}, {threads}, {versions}.")
    return lines


def plot_comparison(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """A PNG: each measured figure against bits per weight at 4096, one curve per method.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'loop-singular-bit[plots]'") from error
    rows = results["rows"]
    plotted = [panel for panel in _PLOTTED if any(_is_number(row.get(panel[0])) for row in rows)]
    across = min(2, max(1, len(plotted)))
    down = max(1, math.ceil(len(plotted) / across))
    # Not pyplot: a figure of our own leaves the user's backend and figures alone.
    figure = Figure(figsize=(7.0 * across, 4.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).flat
    styles = _styles([row["curve"] for row in rows])
    for place, panel in zip(axes, plotted, strict=False):
        _draw_curves(place, rows, styles, *panel)
    for place in list(axes)[len(plotted) :]:
        place.set_visible(False)
    curves: dict[str, Any] = {}
    for place in figure.axes:
        handles, labels = place.get_legend_handles_labels()
        curves.update(zip(labels, handles, strict=True))
    if curves:
        figure.legend(handles=list(curves.values()), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{Path(results['model']).name}: quality against stored bits of the linears", fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_curves(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    styles: Mapping[str, Mapping[str, Any]],
    figure: str,
    title: str,
    scale: str,
) -> None:
    for curve, style in styles.items():
        points = sorted(
            (row["bits_per_weight_at_4096"], row[figure], _interval(row, figure))
            for row in rows
            if row["curve"] == curve and _is_number(row.get(figure)) and math.isfinite(row[figure])
        )
        if not points:
            continue
        bits = [point[0] for point in points]
        values = [point[1] for point in points]
        spans = [[value - point[2][0] for value, point in zip(values, points, strict=True)],
                 [point[2][1] - value for value, point in zip(values, points, strict=True)]]  # fmt: skip
        spans = [[max(0.0, length) for length in side] for side in spans]
        axes.errorbar(bits, values, yerr=spans, label=curve, capsize=1.5, elinewidth=0.8, **style)
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    ticks = [bits for bits in _TICKS if low <= bits <= high]
    axes.set_xticks(ticks, [f"{bits:g}" for bits in ticks])
    axes.minorticks_off()
    axes.set_yscale(scale)
    if figure == "perplexity_ratio":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("bits per weight at 4096 x 4096, everything counted", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(curves: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ours in one colour and thick, each other method in its own; markers differ where colours may not."""
    colors = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#999999", "#8c6d31", "#5e3c99")
    markers = "osv^DPX<>"
    styles: dict[str, dict[str, Any]] = {}
    ours = others = 0
    for curve in dict.fromkeys(curves):
        if curve.startswith(_OURS):
            dashes = ("dotted", "dashed", "solid")[min(ours, 2)]
            styles[curve] = {"color": "#d62728", "linestyle": dashes, "linewidth": 2.0, "marker": "o", "markersize": 5}
            ours += 1
        else:
            index = others % len(colors)
            styles[curve] = {"color": colors[index], "linewidth": 1.1, "marker": markers[index], "markersize": 4.5}
            others += 1
    return styles


def _columns(results: Mapping[str, Any]) -> list[_Column]:
    columns: list[_Column] = [
        ("name", "method", lambda row: str(row["name"])),
        ("bits_per_weight", "bits here", lambda row: f"{row['bits_per_weight']:.3f}"),
        ("bits_per_weight_at_4096", "at 4096", lambda row: f"{row['bits_per_weight_at_4096']:.3f}"),
        ("data", "data", lambda row: str(row["data"])),
        ("perplexity_ratio", "perplexity ratio", lambda row: _with_error(row, "perplexity_ratio", 3)),
        ("kl_divergence", "mean KL", lambda row: _with_error(row, "kl_divergence", 4)),
        ("kl_divergence_median", "median", lambda row: _shown(row["kl_divergence_median"], 4)),
        ("kl_divergence_p99", "99 %", lambda row: _shown(row["kl_divergence_p99"], 3)),
        ("top1_agreement", "same top-1, %", lambda row: _shown(row["top1_agreement"], 1, 100)),
        ("bleu", "BLEU", lambda row: _shown(row["bleu"], 1)),
        ("rouge1", "ROUGE-1", lambda row: _shown(row["rouge1"], 3)),
        ("rougeL", "ROUGE-L", lambda row: _shown(row["rougeL"], 3)),
        ("relative_error", "weight error, %", lambda row: _shown(row["relative_error"], 1, 100)),
    ]
    present = {name for row in results["rows"] for name in row}
    return [column for column in columns if column[0] in present]


def _with_error(row: Mapping[str, Any], figure: str, digits: int) -> str:
    error = row[f"{figure}_standard_error"]
    return _shown(row[figure], digits) + (f" ± {error:.{digits}f}" if _is_number(error) else "")


def _shown(value: Any, digits: int, factor: float = 1.0) -> str:
    return f"{factor * value:.{digits}f}" if _is_number(value) else "-"


def _interval(row: Mapping[str, Any], figure: str) -> Sequence[float]:
    interval = row.get(f"{figure}_interval")
    return (row[figure], row[figure]) if interval is None or isinstance(interval, str) else interval


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _by_bits(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(results["rows"], key=lambda row: row["bits_per_weight_at_4096"])
