"""The README.md of a packed checkpoint: front matter that the Hugging Face Hub reads, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .checkpoint_directory import CheckpointDirectory

_HUB_CACHE_DIRECTORY = re.compile(r"models--([^/]+)--([^/]+)$")


def model_card(source: CheckpointDirectory, results: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter. The same compression gives the same text: no time, no machine."""
    summary = results["compression_summary"]
    preset = results["options"]["preset"]
    base = base_model_name(source)
    front = [f"base_model: {json.dumps(base)}", "base_model_relation: quantized", "library_name: transformers"]
    if (license_name := source.license()) is not None:
        front.append(f"license: {json.dumps(license_name)}")
    front.append("tags:")
    front += [f"- {tag}" for tag in ("loop_singular_bit", "quantized", f"{summary['bits_per_weight']:.1f}-bit", "cpu")]
    lines = ["---", *front, "---", "", f"# {base}, packed with loop-singular-bit ({preset})", ""]
    lines += [
        "Load it **after** `import loop_singular_bit`: without that, Transformers would fill the packed layers with",
        "random numbers.",
        "",
        "```python",
        "import loop_singular_bit",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| preset | {preset}, without calibration |",
        f"| packed modules | {summary['layers_compressed']} |",
        f"| bits per weight, linears | {_figure(summary['bits_per_weight_linears'])} |",
        f"| bits per weight, embeddings and heads | {_figure(summary['bits_per_weight_embeddings_and_heads'])} |",
        f"| bits per parameter, whole file | {summary['bits_per_parameter']:.3f} |",
        f"| bytes of the shards | {summary['output_bytes']:,} |",
        f"| packed weights, {summary['baseline_dtype']} bytes over stored | {_ratio(summary)} |",
        f"| relative error of the weights (Frobenius) | {_figure(summary['relative_error'])} |",
        "",
        "Bits count every stored byte: signs, scales, outliers and their positions, padding. The error is that of the",
        "weights; what it does to the model's text is **not evaluated** here: `loop-singular-bit evaluate` does that.",
        "`compression_report.json` has the figures of every layer; `sha256sum -c checksums.sha256` checks the shards.",
        "",
    ]
    return "\n".join(lines)


def base_model_name(source: CheckpointDirectory) -> str:
    """The Hub name of the source if its path or configuration tells, else the name of its directory."""
    resolved = source.path.absolute()
    if len(resolved.parents) > 1 and (match := _HUB_CACHE_DIRECTORY.search(resolved.parents[1].as_posix())):
        return f"{match[1]}/{match[2]}"
    name = source.config.get("_name_or_path")
    return name if isinstance(name, str) and name and not name.startswith((".", "/")) else resolved.name


def _ratio(summary: Mapping[str, Any]) -> str:
    return f"{summary['average_compression_ratio']:.2f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
