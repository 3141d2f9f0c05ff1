"""Quality of every preset on the bundled model: true bits, weight error, and the effect on held-out text.

    python benchmarks/bench_presets.py [--model DIRECTORY] [--text FILE...] [--json]

No calibration. Bits are counted from stored bytes, at this model's small matrices and as the same preset stores a
4096 x 4096 weight.
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


def measure(model: Path, texts: list[Path], preset: str, max_tokens: int | None) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loop_singular_bit import LoopCompressor, PackedLayout, evaluate_language_model
    from loop_singular_bit.quantization.presets import PRESETS, outlier_count

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = Path(folder) / preset
        compressor = LoopCompressor(preset=preset, force=True, target_ram_mb=None)
        summary = compressor.compress_model(model, packed)["compression_summary"]
        quality = evaluate_language_model(
            AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32),
            AutoTokenizer.from_pretrained(model),
            [path.read_text(encoding="utf-8") for path in texts],
            original=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            max_tokens=max_tokens,
        )
    choice = PRESETS[preset]
    outliers = outlier_count(4096, choice.outlier_fraction)
    layout = PackedLayout(4096, 4096, choice.planes, outliers, column_scales=choice.column_scales, means=choice.means)
    return {
        "preset": preset,
        "bits_per_weight_linears": summary["bits_per_weight_linears"],
        "bits_per_weight_at_4096": layout.bits_per_weight,
        "output_bytes": summary["output_bytes"],
        "relative_error": summary["relative_error"],
        **quality.to_dict(),
    }


def main() -> None:
    from loop_singular_bit.quantization.presets import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "books-llama-7m")
    parser.add_argument("--text", type=Path, nargs="+", default=sorted((EXAMPLES / "text" / "held_out").glob("*.txt")))
    parser.add_argument("--max-tokens", type=int, help="evaluate on at most this many tokens (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    rows = [measure(arguments.model, arguments.text, preset, arguments.max_tokens) for preset in PRESETS]
    if arguments.json:
        print(json.dumps({"presets": rows}))
        return
    print(
        f"{rows[0]['tokens']} tokens of held-out text in windows of {rows[0]['window']}; "
        f"perplexity of the original {rows[0]['perplexity_original']:.2f}; "
        f"original file {(arguments.model / 'model.safetensors').stat().st_size / 1e6:.1f} MB."
    )
    print()
    print(
        "| preset | bits/weight of the linears, here | at 4096x4096 | whole checkpoint, MB | relative weight error "
        "| perplexity ratio | KL, nats/token | same top-1 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| `{row['preset']}` | {row['bits_per_weight_linears']:.2f} | {row['bits_per_weight_at_4096']:.2f} "
            f"| {row['output_bytes'] / 1e6:.2f} | {row['relative_error']:.3f} "
            f"| {row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_standard_error']:.4f} "
            f"| {row['kl_divergence']:.4f} | {100 * row['top1_agreement']:.1f} % |"
        )


if __name__ == "__main__":
    main()
