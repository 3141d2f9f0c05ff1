"""One PNG of what a compression did: error and bits of every packed weight, and where the bits go. Needs matplotlib."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compression_output import REPORT_FILE
from .errors import CheckpointError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {
    "signs": ("signs",),
    "scales": ("scales", "column_scales", "means"),
    "outliers": ("outlier_columns", "outlier_deltas", "outlier_scales"),
}
# Dark to light, distinguishable in grey and with the common colour blindnesses.
_PART_COLORS = {"signs": "#31688e", "scales": "#90d743", "outliers": "#fde725"}
_ANNOTATED_COLUMNS = 16


@dataclass(frozen=True)
class _Module:
    """One packed weight; `kind` is its name without the number of the layer, which is None outside of layers."""

    kind: str
    layer: int | None
    relative_error: float
    bits_per_weight: float
    part_bits: dict[str, float]


def plot_report(report: Mapping[str, Any] | str | Path, path: str | Path) -> Path:
    """Draws a compression report: relative error and bits per weight of every weight by layer, and the bits by part.

    Args:
        report: results of `LoopCompressor.compress_model`, a packed checkpoint's directory, or the path of its
            compression_report.json.
        path: the PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
        CheckpointError: there is no report, or it lists no packed weights.
    """
    if not isinstance(report, Mapping):
        report = _read_report(Path(report))
    modules = [_module(entry) for entry in report.get("layer_results", ())]
    if not modules:
        raise CheckpointError("compression report: expected packed weights in 'layer_results', got none")
    figure = _draw(modules, _title(report))
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _read_report(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / REPORT_FILE
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; only checkpoints that `loop-singular-bit compress` wrote have a report to plot"
        )
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(report).__name__}")
    return report


def _module(entry: Mapping[str, Any]) -> _Module:
    from .packed_weight import PackedLayout

    match = re.fullmatch(r"(?:.*?\.)??(\d+)\.(.+)", entry["name"])
    fields = ("out_features", "in_features", "planes", "outliers", "column_scales", "means")
    layout = PackedLayout.from_dict({name: entry[name] for name in fields})
    sizes = layout.part_nbytes()
    weights = layout.out_features * layout.in_features
    return _Module(
        kind=match[2] if match else entry["name"],
        layer=int(match[1]) if match else None,
        relative_error=entry["relative_error"],
        bits_per_weight=layout.bits_per_weight,
        part_bits={part: 8 * sum(sizes.get(name, 0) for name in names) / weights for part, names in _PARTS.items()},
    )


def _title(report: Mapping[str, Any]) -> str:
    summary = report.get("compression_summary", {})
    preset = report.get("options", {}).get("preset")
    parts = [
        None if preset is None else f"preset {preset}",
        _figure(summary.get("bits_per_weight"), "{:.2f} bits per weight"),
        _figure(summary.get("average_compression_ratio"), "{:.2f}x smaller than " + str(summary.get("baseline_dtype"))),
        _figure(summary.get("relative_error"), "relative error {:.3f}"),
    ]
    return ", ".join(part for part in parts if part)


def _figure(value: float | None, template: str) -> str | None:
    return None if value is None else template.format(value)


def _draw(modules: Sequence[_Module], title: str) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'loop-singular-bit[plots]'") from error

    kinds = list(dict.fromkeys(module.kind for module in sorted(modules, key=lambda module: module.layer is None)))
    in_layers = [module for module in modules if module.layer is not None]
    # A model without numbered layers is a column of weights.
    mapped = in_layers or list(modules)
    mapped_kinds = list(dict.fromkeys(module.kind for module in mapped))
    columns = sorted({-1 if module.layer is None else module.layer for module in mapped})
    heights = [0.9 + 0.3 * len(mapped_kinds)] * 2 + [0.9 + 0.3 * len(kinds)]
    width = min(16.0, max(9.0, 3.5 + 0.42 * len(columns)))
    # Not pyplot: a figure of our own leaves the user's backend and figures alone.
    figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, height_ratios=heights)
    figure.suptitle(title, fontsize=11)
    for place, heading, colors, template, value in (
        (axes[0], "relative error of each weight, %", "magma_r", "{:.1f}", lambda module: 100 * module.relative_error),
        (axes[1], "bits per weight, everything counted", "viridis_r", "{:.2f}", lambda module: module.bits_per_weight),
    ):
        cells = [[math.nan] * len(columns) for _ in mapped_kinds]
        for module in mapped:
            column = columns.index(-1 if module.layer is None else module.layer)
            cells[mapped_kinds.index(module.kind)][column] = value(module)
        _draw_map(figure, place, mapped_kinds, columns, cells, heading, colors, template)
    _draw_bars(axes[2], kinds, modules)
    return figure


def _draw_map(
    figure: Figure,
    axes: Axes,
    kinds: Sequence[str],
    columns: Sequence[int],
    cells: Sequence[Sequence[float]],
    title: str,
    colors: str,
    template: str,
) -> None:
    """A cell per weight: kinds down, layers across."""
    import numpy

    finite = [value for row in cells for value in row if math.isfinite(value)]
    low, high = min(finite), max(finite)
    # Differences below a fiftieth are not worth the whole range of colours; its ends make text on them hard to read.
    spread = max(high - low, 0.02 * abs(high), 1e-9)
    image = axes.imshow(cells, aspect="auto", cmap=colors, vmin=low - 0.3 * spread, vmax=low + 1.15 * spread)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    ticks = range(0, len(columns), max(1, math.ceil(len(columns) / 32)))
    axes.set_xticks(ticks, ["" if columns[tick] < 0 else str(columns[tick]) for tick in ticks], fontsize=8)
    if columns[0] >= 0:
        axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(columns) <= _ANNOTATED_COLUMNS:
        rgba = image.to_rgba(numpy.asarray(cells))
        for row, kind_values in enumerate(cells):
            for column, value in enumerate(kind_values):
                if math.isfinite(value):
                    red, green, blue, _ = rgba[row, column]
                    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                    color = "black" if is_light else "white"
                    label = template.format(value)
                    axes.text(column, row, label, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12).ax.tick_params(labelsize=7)


def _draw_bars(axes: Axes, kinds: Sequence[str], modules: Sequence[_Module]) -> None:
    """Mean bits per weight of each kind, stacked by what they are spent on, and the range of its errors."""
    left = [0.0] * len(kinds)
    for part, color in _PART_COLORS.items():
        widths = []
        for kind in kinds:
            values = [module.part_bits[part] for module in modules if module.kind == kind]
            widths.append(sum(values) / len(values))
        axes.barh(range(len(kinds)), widths, left=left, color=color, label=part, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (kind, total) in enumerate(zip(kinds, left, strict=True)):
        errors = [100 * module.relative_error for module in modules if module.kind == kind]
        span = f"{min(errors):.1f}" if len(errors) == 1 else f"{min(errors):.1f} to {max(errors):.1f}"
        axes.text(total, row, f" {total:.2f}, error {span} %", va="center", fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.25)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("bits per weight", fontsize=8)
    axes.set_title("where the bits go (mean over layers)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False, ncols=3, bbox_to_anchor=(1.0, 1.0))
