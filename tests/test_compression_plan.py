"""Which modules Transformers wants in float32: the plan of a stream keeps those that a loaded model would keep."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers
from transformers import T5Config, T5ForConditionalGeneration

from loop_singular_bit import compression_plan
from loop_singular_bit.checkpoint_directory import CheckpointDirectory
from loop_singular_bit.quantization.presets import PRESETS, UncalibratedWarning
from loop_singular_bit.quantization.quantize_model import quantize_model

REASON = "the model wants it in float32 (_keep_in_fp32_modules)"


def float32_modules_in_source(model_type: str) -> set[str]:
    """What the classes of a model type list, read from their source: importing them all takes minutes."""
    folder = Path(transformers.__file__).parent / "models" / model_type.replace("-", "_")
    names: set[str] = set()
    for path in folder.glob("modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
                continue
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            if any(isinstance(one, ast.Name) and one.id.startswith("_keep_in_fp32_modules") for one in targets):
                names.update(ast.literal_eval(node.value) or ())
    return names


@pytest.mark.parametrize("model_type", sorted(compression_plan.FLOAT32_MODULES))
def test_the_table_says_what_transformers_says(model_type: str) -> None:
    if not (Path(transformers.__file__).parent / "models" / model_type.replace("-", "_")).is_dir():
        pytest.skip(f"this version of Transformers does not know {model_type}")
    listed = {name.removesuffix(".weight") for name in float32_modules_in_source(model_type)}
    assert set(compression_plan.FLOAT32_MODULES[model_type]) <= listed


@pytest.mark.filterwarnings(f"ignore::{UncalibratedWarning.__module__}.{UncalibratedWarning.__name__}")
def test_t5_keeps_what_a_loaded_model_keeps(tmp_path: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 1100}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    model.save_pretrained(tmp_path)
    with CheckpointDirectory(tmp_path) as source:
        plan = compression_plan.plan_compression(source, PRESETS["b4"])
    kept = {name for name, reason in plan.kept_weights.items() if reason == REASON}
    skipped = {name for name, reason in quantize_model(model).skipped if reason == REASON}
    assert (
        kept
        == skipped
        == {
            f"{stack}.block.{block}.layer.{layer}.DenseReluDense.wo"
            for stack, layer in (("encoder", 1), ("decoder", 2))
            for block in range(2)
        }
    )
    assert any(module.name.endswith("DenseReluDense.wi") for module in plan.packed_modules)
