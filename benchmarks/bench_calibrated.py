"""Quality of calibrated quantization on the bundled model: KL divergence and perplexity ratio on held-out text.

    python benchmarks/bench_calibrated.py [--only REGEX] [--list] [--again]

Measures what benchmarks/results/calibrated_quality.json lacks, row by row, and writes calibrated_quality.{json,md,png}
there; it may be stopped at any time and goes on where it was. All rows together take about an hour on two cores, most
of it the tuning of signs.

All linears are packed, embeddings and head are those of the original, as in the published comparisons. Calibration and
tuning see the three books of examples/text/calibration and what the model itself writes; the figures are those of 40
windows of 512 tokens, spread evenly over the two books of examples/text/held_out, the first token of each being context
only. Bits are counted from stored bytes, at this model's small matrices and as the same layouts would be at 16 times
the size.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from quality_bars import BARS, best_bar  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from loop_singular_bit.calibration_texts import read_texts  # noqa: E402
from loop_singular_bit.machine import processor_name  # noqa: E402
from loop_singular_bit.ops import isa  # noqa: E402
from loop_singular_bit.packed_weight import PackedLayout, PackedWeight  # noqa: E402
from loop_singular_bit.quantization.allocation import allocate, measure_candidates  # noqa: E402
from loop_singular_bit.quantization.calibration import (  # noqa: E402
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from loop_singular_bit.quantization.presets import PRESETS, outlier_count  # noqa: E402
from loop_singular_bit.quantization.quantize_calibrated import quantize_weight_calibrated  # noqa: E402
from loop_singular_bit.quantization.tuning import TuningOptions, TuningProgress, tune  # noqa: E402

EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "quality"
# 256 columns here stand for 4096 there.
ENLARGEMENT = 16
EVALUATED_WINDOWS = 40
WINDOW = 512
SCALES = TuningOptions(steps=40, batch=2, sampled_windows=128)
SIGNS = replace(SCALES, signs=True, steps=700, sampled_windows=384)
# As a model is tuned that does not fit: signs layer by layer, then scales by KL.
LAYERS = replace(SCALES, signs=True, memory_gb=0.1)
BOTH = replace(SIGNS, steps=300, layer_steps=40)


@dataclass(frozen=True)
class Recipe:
    """One row: uniform planes or a mixed layout of so many bits, with or without the parts of the algorithm."""

    name: str
    planes: int = 1
    target_bits: float | None = None
    rounds: int = 5
    outlier_fraction: float = 1 / 128
    column_scales: bool = True
    tuning: TuningOptions | None = None


def mixed(bits: float, tuning: TuningOptions | None = None) -> Recipe:
    names = {
        None: "",
        SCALES: ", scales tuned",
        LAYERS: ", signs tuned layer by layer",
        SIGNS: ", signs tuned",
        BOTH: ", signs tuned layer by layer, then all",
    }
    return Recipe(f"{bits:g} bits{names[tuning]}", target_bits=bits, tuning=tuning)


def ablation(planes: int) -> list[Recipe]:
    """Each has one technique more than the one before; the mixed layouts go on from there."""
    name = f"{planes} plane{'s' if planes > 1 else ''}"
    bare = Recipe(f"{name}, sweep only", planes, rounds=0, outlier_fraction=0.0, column_scales=False)
    rounds = replace(bare, name=f"{name}, + 5 rounds", rounds=5)
    columns = replace(rounds, name=f"{name}, + column scales", column_scales=True)
    return [bare, rounds, columns, replace(columns, name=f"{name}, + outliers", outlier_fraction=1 / 128)]


QUALITY = [
    *(mixed(1.25, tuning) for tuning in (None, SCALES, LAYERS, SIGNS, BOTH)),
    *(mixed(bits, tuning) for bits in (1.57, 2.31, 2.57) for tuning in (None, SCALES)),
    mixed(3.31),
    mixed(4.31),
]
ABLATIONS = {
    1: [*ablation(1), *(mixed(1.25, tuning) for tuning in (None, SCALES, SIGNS))],
    2: [*ablation(2), *(mixed(2.31, tuning) for tuning in (None, SCALES))],
}


class Bench:
    """The model, its texts and what is measured once for all rows."""

    def __init__(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self.model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "books-llama-7m", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "books-llama-7m")
        head = self.model.get_output_embeddings()
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        self.windows = calibration_windows(tokenizer, read_texts([EXAMPLES / "text" / "calibration"]))
        self.held_out = evaluation_windows(tokenizer, read_texts([EXAMPLES / "text" / "held_out"]))
        self.store = StatisticsStore(WORK / "statistics", f"{len(self.windows)} windows of {WINDOW}")
        collect_statistics(self.model, self.windows, self.linears, store=self.store)
        self.candidates: dict[str, Any] | None = None
        self.expected: list[torch.Tensor] = []

    def pack(self, recipe: Recipe) -> dict[str, PackedWeight]:
        preset = replace(PRESETS["b1"], column_scales=recipe.column_scales)
        return {
            name: quantize_weight_calibrated(
                self.linears[name].weight,
                self.store[name].hessian,
                preset,
                planes=planes,
                outliers=outliers,
                rounds=recipe.rounds,
            ).packed_weight
            for name, (planes, outliers) in self._layouts(recipe).items()
        }

    def _layouts(self, recipe: Recipe) -> dict[str, tuple[int, int]]:
        if recipe.target_bits is None:
            fraction = recipe.outlier_fraction
            return {
                name: (recipe.planes, outlier_count(module.in_features, fraction) if fraction > 0 else 0)
                for name, module in self.linears.items()
            }
        if self.candidates is None:
            weights = {name: module.weight for name, module in self.linears.items()}
            self.candidates = measure_candidates(
                self.model,
                weights,
                self.store,
                self.windows[::16],
                enlargement=ENLARGEMENT,
                checkpoint=WORK / "candidates.jsonl",
            )
        return allocate(self.candidates, recipe.target_bits)

    def tune(self, recipe: Recipe, packed: dict[str, PackedWeight]) -> tuple[dict[str, PackedWeight], dict[str, Any]]:
        assert recipe.tuning is not None
        name = re.sub(r"\W+", "-", recipe.name)
        # A run that was stopped goes on; the time it has taken is that of all its parts.
        clock = WORK / f"{name}.seconds"
        before = float(clock.read_text()) if clock.is_file() else 0.0
        start = time.process_time()

        def show(step: TuningProgress) -> None:
            clock.write_text(str(before + time.process_time() - start))
            if step.step % 10 == 0:
                print(f"{recipe.name}: step {step.step}, {step.description}", file=sys.stderr, flush=True)

        result = tune(
            self.model,
            packed,
            self.windows,
            recipe.tuning,
            checkpoint=WORK / f"{name}.tuning",
            sampled=WORK / "sampled.pt",
            progress=show,
        )
        clock.unlink(missing_ok=True)
        figures = {
            "tuning_seconds": before + time.process_time() - start,
            "kl_divergence_of_text_before": result.kl_before,
            "kl_divergence_of_text": result.kl_after,
            "kept": result.kept,
            "changed_signs": result.changed_signs,
        }
        return result.packed_weights, figures

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        start = time.process_time()
        packed = self.pack(recipe)
        figures: dict[str, Any] = {"packing_seconds": time.process_time() - start}
        if recipe.tuning is not None:
            packed, tuning = self.tune(recipe, packed)
            figures.update(tuning)
        layouts = [weight.layout for weight in packed.values()]
        weights = sum(layout.out_features * layout.in_features for layout in layouts)
        return {
            "recipe": asdict(recipe),
            "bits": bits(layouts),
            "bits_enlarged": bits(layouts, ENLARGEMENT),
            **self.evaluate(packed),
            **figures,
            "weights": weights,
            "date": datetime.date.today().isoformat(),
            "machine": f"{processor_name()}, {isa()}",
        }

    @torch.no_grad()
    def evaluate(self, packed: dict[str, PackedWeight]) -> dict[str, float]:
        """Means over the windows, with the standard errors of these means."""
        model = copy.deepcopy(self.model)
        for name, weight in packed.items():
            model.get_submodule(name).weight.data = weight.dequantize()
        if not self.expected:
            self.expected = [
                self.model(input_ids=window[None]).logits[0, :-1].log_softmax(-1) for window in self.held_out
            ]
        divergences, log_ratios, agreements = [], [], []
        for window, expected in zip(self.held_out, self.expected, strict=True):
            given = model(input_ids=window[None]).logits[0, :-1].log_softmax(-1)
            divergences.append((expected.exp() * (expected - given)).sum(-1).double().mean())
            chosen = (expected - given).gather(1, window[1:, None])
            log_ratios.append(chosen.double().mean())
            agreements.append((expected.argmax(-1) == given.argmax(-1)).double().mean())
        divergence, log_ratio, agreement = map(torch.stack, (divergences, log_ratios, agreements))
        ratio = log_ratio.mean().exp().item()
        return {
            "kl_divergence": divergence.mean().item(),
            "kl_divergence_error": standard_error(divergence),
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": ratio * standard_error(log_ratio),
            "top1_agreement": agreement.mean().item(),
            "predictions": self.held_out[:, 1:].numel(),
        }


def evaluation_windows(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    each = EVALUATED_WINDOWS // len(texts)
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        firsts = [index * (len(ids) - WINDOW) // (each - 1) for index in range(each)]
        windows += [ids[first : first + WINDOW] for first in firsts]
    return torch.tensor(windows)


def bits(layouts: list[PackedLayout], enlargement: int = 1) -> float:
    stored = weights = 0
    for layout in layouts:
        rows, columns = layout.out_features * enlargement, layout.in_features * enlargement
        scaled = PackedLayout(rows, columns, layout.planes, layout.outliers * enlargement, layout.column_scales)
        stored += 8 * scaled.nbytes
        weights += rows * columns
    return stored / weights


def standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="rows whose names this matches")
    parser.add_argument("--list", action="store_true", help="names of the rows, with their KL divergence if measured")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    arguments = parser.parse_args()

    path = RESULTS / "calibrated_quality.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    recipes = list({recipe.name: recipe for recipe in [*QUALITY, *ABLATIONS[1], *ABLATIONS[2]]}.values())
    if arguments.list:
        for recipe in recipes:
            found = stored.get(recipe.name)
            print(recipe.name, "" if found is None else f"{found['kl_divergence']:.4f}")
        return
    bench: Bench | None = None
    for recipe in recipes:
        present = is_of(recipe, stored.get(recipe.name))
        if not arguments.only.search(recipe.name) or (present and not arguments.again):
            continue
        bench = bench or Bench()
        row = bench.measure(recipe)
        print(f"{recipe.name}: KL {row['kl_divergence']:.4f}", file=sys.stderr, flush=True)
        # Another process may have measured other rows in the meantime.
        stored = {**(json.loads(path.read_text()) if path.is_file() else {}), recipe.name: row}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    (RESULTS / "calibrated_quality.md").write_text(report(stored))
    plot(stored, RESULTS / "calibrated_quality.png")


def is_of(recipe: Recipe, row: dict[str, Any] | None) -> bool:
    """Whether a stored row is what the recipe says; options that came later had their default then."""
    if row is None:
        return False
    tuning = row["recipe"]["tuning"]
    return {**row["recipe"], "tuning": tuning and {**asdict(TuningOptions()), **tuning}} == asdict(recipe)


def report(stored: dict[str, Any]) -> str:
    rows = [stored[recipe.name] for recipe in QUALITY if recipe.name in stored]
    dates = sorted({row["date"] for row in rows})
    lines = [
        "# Calibrated quantization of the bundled model",
        "",
        "Written by `make bench-quality` (benchmarks/bench_calibrated.py, which says how it is measured), "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, {rows[0]['machine']}. All 56 linears are packed; "
        f"{rows[0]['predictions']} predictions on held-out text; ± is one standard error over 40 windows. Bits are "
        "those of stored bytes, here and for the same layouts at 16 times the size (4096 columns); peers are compared "
        "at the latter: the best one of at most so many bits, and our share of its KL divergence. CPU seconds are of "
        "a core that other work was sharing.",
        "",
        "| | bits here | bits at 4096 | mean KL, nats | perplexity ratio | same top-1 | best peer, its KL | our share "
        "| CPU s per M weights |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for name, row in ((recipe.name, stored[recipe.name]) for recipe in QUALITY if recipe.name in stored):
        peer = best_bar(row["bits_enlarged"] + 0.005)
        seconds = (row["packing_seconds"] + row.get("tuning_seconds", 0.0)) / row["weights"] * 1e6
        cells = [
            name,
            f"{row['bits']:.3f}",
            f"{row['bits_enlarged']:.3f}",
            kl(row),
            f"{row['perplexity_ratio']:.3f} ± {row['perplexity_ratio_error']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{peer.name}, {peer.kl_divergence:.4f}",
            f"{row['kl_divergence'] / peer.kl_divergence:.2f}",
            f"{seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Layouts are mixed: planes and outliers chosen linear by linear. " + describe_tuning(rows),
        "",
        "![KL divergence against bits per weight](calibrated_quality.png)",
        "",
        "## What each technique contributes",
        "",
        "Each row has what the one before has, and one thing more.",
    ]
    for planes, recipes in ABLATIONS.items():
        about = 1.25 if planes == 1 else 2.31
        lines += [
            "",
            f"| about {about} bits | bits here | bits at 4096 | mean KL, nats | perplexity ratio |",
            "|---|---:|---:|---:|---:|",
        ]
        for recipe in recipes:
            if recipe.name in stored:
                row = stored[recipe.name]
                name = (
                    recipe.name
                    if recipe.target_bits is None
                    else recipe.name.replace(" bits", " bits, mixed layout", 1)
                )
                lines.append(
                    f"| {name} | {row['bits']:.3f} | {row['bits_enlarged']:.3f} | {kl(row)} "
                    f"| {row['perplexity_ratio']:.3f} |"
                )
    return "\n".join(lines) + "\n"


def kl(row: dict[str, Any]) -> str:
    digits = 3 if row["kl_divergence"] >= 0.1 else 4
    return f"{row['kl_divergence']:.{digits}f} ± {row['kl_divergence_error']:.{digits}f}"


def describe_tuning(rows: list[dict[str, Any]]) -> str:
    described = {}
    for tuning in filter(None, (row["recipe"]["tuning"] for row in rows)):
        if tuning["memory_gb"] == LAYERS.memory_gb or tuning.get("layer_steps"):
            continue
        kind = "Signs" if tuning["signs"] else "Scales"
        described[kind] = (
            f"{kind} are tuned in {tuning['steps']} steps of {tuning['batch']} windows, of the text and of "
            f"{tuning['sampled_windows']} that the model wrote."
        )
    layers = (
        f"Layer by layer: {LAYERS.steps} steps for each, to put out what the original's does, then {LAYERS.steps} for "
        f"scales by KL, or {BOTH.steps} for signs (then all)."
    )
    return " ".join([*described.values(), layers])


def plot(stored: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = {"untuned": [], "scales tuned": [], "signs tuned": []}
    for recipe in QUALITY:
        if recipe.name in stored:
            row = stored[recipe.name]
            kind = "untuned" if recipe.tuning is None else "signs tuned" if recipe.tuning.signs else "scales tuned"
            series[kind].append((row["bits_enlarged"], row["kl_divergence"]))
    for (kind, points), marker in zip(series.items(), "osD", strict=True):
        axes.plot(
            *zip(*sorted(points), strict=True), marker=marker, label=f"loop-singular-bit, {kind}"
        ) if points else None
    for family, marker in (("ggml", "x"), ("GPTQ", "+")):
        bars = [bar for bar in BARS if bar.name.startswith(family)]
        axes.plot([bar.bits for bar in bars], [bar.kl_divergence for bar in bars], marker, color="grey", label=family)
        for bar in bars:
            label = bar.name.removeprefix(family).replace(" act-order", "").replace(" imatrix", "").strip()
            axes.annotate(label, (bar.bits, bar.kl_divergence), (4, 3), textcoords="offset points", fontsize=7)
    axes.set(yscale="log", xlabel="bits per weight of the linears (at 4096 columns)", ylabel="mean KL divergence, nats")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
