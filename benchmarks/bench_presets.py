"""Quality of every preset on the bundled model: true bits, weight error, and the effect on held-out text.

    python benchmarks/bench_presets.py [--model DIRECTORY] [--text FILE...] [--json]

No calibration: this is what `loop-singular-bit compress` does today. Bits are counted from stored bytes, at this model's
small matrices and as the same preset stores a 4096 x 4096 weight.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXAMPLES = ROOT / "examples"


def measure(model: Path, texts: list[Path], preset: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loop_singular_bit import LoopCompressor, PackedLayout, evaluate_language_model
    from loop_singular_bit.quantization.presets import PRESETS, outlier_count

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = Path(folder) / preset
        results = LoopCompressor(target_ram_mb=None, preset=preset, force=True).compress_model(model, packed)
        quality = evaluate_language_model(
            AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32),
            AutoTokenizer.from_pretrained(model),
            [path.read_text(encoding="utf-8") for path in texts],
            original=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        )
        stored = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    choice = PRESETS[preset]
    large = PackedLayout(
        4096,
        4096,
        choice.planes,
        outlier_count(4096, choice.outlier_fraction),
        column_scales=choice.column_scales,
        means=choice.means,
    )
    return {
        "preset": preset,
        "bits_at_4096": large.bits_per_weight,
        "file_bytes": stored,
        "quality": quality,
        "summary": results["compression_summary"],
    }


def main() -> None:
    from loop_singular_bit.quantization.presets import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "books-llama-7m")
    parser.add_argument("--text", type=Path, nargs="+", default=sorted((EXAMPLES / "text" / "held_out").glob("*.txt")))
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    rows = [measure(arguments.model, arguments.text, preset) for preset in PRESETS]
    if arguments.json:
        print(json.dumps(rows, default=vars))
        return
    print("| preset | bits/weight, linears here | at 4096×4096 | files, MB | perplexity ratio | mean KL, nats | same top-1 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
