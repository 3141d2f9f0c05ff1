"""LoopCompressor: what it packs, in which order, the same bytes always, and every way in which a run can end badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from source_checkpoints import hashed_files, llama_config, llama_tensors, write_llama, write_source

from loop_singular_bit import compression_run, ops
from loop_singular_bit.checkpoint import read_packed_checkpoint
from loop_singular_bit.compression_output import OutputDirectory
from loop_singular_bit.compression_run import CompressionProgress
from loop_singular_bit.compressor import LoopCompressor
from loop_singular_bit.errors import CheckpointError, MemoryBudgetExceeded, OutputExistsError, QualityRefusedError
from loop_singular_bit.language_model_evaluation import LanguageModelEvaluation
from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.outlier_preserving_quantizer import OutlierPreservingQuantizer
from loop_singular_bit.quantization.presets import PRESETS, UncalibratedWarning
from loop_singular_bit.quantization.quantize_weight import quantize_embedding_weight, quantize_weight
from loop_singular_bit.quantization.weight_errors import measure_weight_errors

# The process of the tests holds more than a compression may, most of it Transformers.
pytestmark = pytest.mark.filterwarnings("ignore::loop_singular_bit.quantization.presets.UncalibratedWarning")


def compressor(**options: Any) -> LoopCompressor:
    return LoopCompressor(**{"target_ram_mb": None, **options})


def compress(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return compressor(**options).compress_model(source, output)


def assert_same_weight(packed: PackedWeight, expected: PackedWeight) -> None:
    assert packed.layout == expected.layout
    for name, tensor in expected.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor), name


# ---- what is packed ----


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("block_bytes", [1 << 12, 1 << 24])
def test_streamed_blocks_give_the_bytes_of_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, block_bytes: int
) -> None:
    monkeypatch.setattr(compression_run, "_BLOCK_BYTES", (block_bytes,))
    source = write_llama(tmp_path / "source", layers=1, shards=3)
    compress(source, tmp_path / "packed", preset=preset, force=True)
    tensors = llama_tensors(1)
    with read_packed_checkpoint(tmp_path / "packed") as checkpoint:
        assert len(checkpoint.modules) == 9
        for name in checkpoint.modules:
            weight = tensors[f"{name}.weight"]
            special = name in ("lm_head", "model.embed_tokens")
            pack = quantize_embedding_weight if special else quantize_weight
            assert_same_weight(checkpoint.packed_weight(name), pack(weight, preset))
        for name in checkpoint.kept_tensors:
            assert torch.equal(checkpoint.tensor(name), tensors[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = llama_tensors(1, dtype=dtype)
    write_source(tmp_path / "source", llama_config(1), tensors)
    results = compress(tmp_path / "source", tmp_path / "packed")
    assert results["compression_summary"]["baseline_dtype"] == {torch.float32: "F32", torch.float16: "F16"}[dtype]
    with read_packed_checkpoint(tmp_path / "packed") as checkpoint:
        name = "model.layers.0.mlp.up_proj"
        assert_same_weight(checkpoint.packed_weight(name), quantize_weight(tensors[f"{name}.weight"]))


def test_tensors_are_in_execution_order_and_those_of_a_linear_adjacent(tmp_path: Path) -> None:
    compress(write_llama(tmp_path / "source", layers=11), tmp_path / "packed")
    content = (tmp_path / "packed" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    embedding = ("signs", "scales", "outlier_columns", "outlier_scales", "outlier_deltas")
    assert list(header)[:5] == [f"model.embed_tokens.{part}" for part in embedding]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in header))
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    expected = [f"model.layers.{number}.{name}" for number in range(11) for name in layer]
    assert modules == ["model.embed_tokens", *expected, "model.norm", "lm_head"]
    offsets = [fields["data_offsets"] for fields in header.values()]
    assert [begin for begin, _ in offsets[1:]] == [end for _, end in offsets[:-1]]
    assert "model.layers.0.mlp.up_proj.weight" not in header
    safetensors.torch.load(content)


def test_config_companions_checksums_and_card(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", tied=True)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    compress(source, tmp_path / "packed", skip_modules=["model.layers.1.mlp"], outlier_ratio=0.02)
    packed = tmp_path / "packed"
    assert {path.name for path in packed.iterdir()} == {
        *("README.md", "checksums.sha256", "compression_report.json", "config.json", "model.safetensors"),
        "tokenizer.json",
    }
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == llama_config(tied=True)
    assert quantization["quant_method"] == "loop_singular_bit"
    assert quantization["format_version"] == 1
    assert quantization["preset"] == "b2"
    assert quantization["tied_modules"] == {"lm_head": "model.embed_tokens"}
    assert quantization["modules"]["model.layers.0.mlp.down_proj"] == {
        **{"kind": "linear", "out_features": 64, "in_features": 136, "planes": 2, "outliers": 3},
        **{"column_scales": True, "means": False},
    }
    assert quantization["modules"]["model.embed_tokens"]["kind"] == "embedding"
    assert quantization["modules"]["model.embed_tokens"]["planes"] == 6
    assert quantization["modules_to_not_convert"] == [
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert quantization["options"]["outlier_fraction"] == 0.02
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=packed, check=True)
    card = (packed / "README.md").read_text()
    assert card.startswith('---\nbase_model: "source"\n')
    assert 'license: "apache-2.0"' in card
    assert "not evaluated" in card


def test_shards_are_cut_between_modules_and_indexed(tmp_path: Path) -> None:
    compress(write_llama(tmp_path / "source"), tmp_path / "packed", max_shard_gb=60e-6)
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    loaded: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors = safetensors.torch.load_file(shard)
        assert {name: index["weight_map"][name] for name in tensors} == dict.fromkeys(tensors, shard.name)
        loaded |= tensors
    assert loaded.keys() == index["weight_map"].keys()
    modules = {name.rpartition(".")[0]: shard for name, shard in index["weight_map"].items()}
    assert all(modules[name.rpartition(".")[0]] == shard for name, shard in index["weight_map"].items())
    compress(tmp_path / "source", tmp_path / "single")
    single = safetensors.torch.load_file(tmp_path / "single" / "model.safetensors")
    assert single.keys() == loaded.keys()
    assert all(torch.equal(single[name], tensor) for name, tensor in loaded.items())


def test_embeddings_and_heads_can_be_kept(tmp_path: Path) -> None:
    results = compress(write_llama(tmp_path / "source", tied=True), tmp_path / "packed", quantize_embeddings=False)
    kept = {tensor["name"]: tensor["reason"] for tensor in results["kept_tensors"]}
    assert "asked to stay" in kept["model.embed_tokens.weight"]
    assert results["tied_modules"] == {}
    assert results["compression_summary"]["bits_per_weight_embeddings_and_heads"] is None


def test_a_stored_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    config = llama_config(tied=True)
    results = compress(write_source(tmp_path / "source", config, llama_tensors()), tmp_path / "packed")
    assert results["tied_modules"] == {"lm_head": "model.embed_tokens"}
    assert results["dropped_tensors"] == {"lm_head.weight": "tied to model.embed_tokens"}
    assert "lm_head" not in {layer["name"] for layer in results["layer_results"]}


def test_max_layers_keeps_the_others_and_projects_the_whole(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", layers=3)
    results = compressor().compress_model(source, tmp_path / "packed", max_layers=1)
    whole = compressor().compress_model(source)
    assert results["compression_summary"]["layers_compressed"] == 9
    assert results["target_projections"]["layers"] == 9 + 2 * 7
    projected = results["target_projections"]["storage_gb"]
    assert projected == whole["compression_summary"]["output_bytes"] / 1e9
    assert projected < results["compression_summary"]["output_bytes"] / 1e9
    kept = {tensor["name"]: tensor["reason"] for tensor in results["kept_tensors"]}
    assert kept["model.layers.2.mlp.up_proj.weight"] == "max_layers: only the first 1 layers were asked for"
    stored = safetensors.torch.load_file(tmp_path / "packed" / "model.safetensors")
    original = llama_tensors(3)["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(stored["model.layers.2.mlp.up_proj.weight"], original)


def test_biases_norms_routers_experts_and_integers_are_kept_exactly(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.randn(64).bfloat16(),
        "model.layers.0.self_attn.q_norm.weight": torch.randn(16).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.0.mlp.experts.0.w1.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 64, 64).bfloat16(),
        "model.layers.0.some_conv.weight": torch.randn(64, 64, 3).bfloat16(),
        "model.layers.0.self_attn.table.weight": torch.arange(64 * 64).view(64, 64),
        "model.position_embeddings.weight": torch.randn(2048, 64).bfloat16(),
        "classifier.weight": torch.randn(3, 64).bfloat16(),
        "model.step": torch.tensor(7),
        "model.nothing": torch.empty(0, 3),
    }
    config = llama_config(1, model_type="unheard_of")
    results = compress(write_source(tmp_path / "source", config, llama_tensors(1) | extra), tmp_path / "packed")
    stored = safetensors.torch.load_file(tmp_path / "packed" / "model.safetensors")
    for name, tensor in extra.items():
        assert torch.equal(stored[name], tensor), name
    reasons = {tensor["name"]: tensor["reason"] for tensor in results["kept_tensors"]}
    for name, reason in {
        "model.layers.0.mlp.gate.weight": "routes tokens",
        "model.layers.0.mlp.experts.0.w1.weight": "one of many experts",
        "model.layers.0.mlp.experts.gate_up_proj": "experts fused into 3-D",
        "model.layers.0.self_attn.table.weight": "dtype I64",
        "model.position_embeddings.weight": "not of tokens",
        "classifier.weight": "tiny",
        "model.layers.0.self_attn.q_proj.bias": "not a 2-D weight",
    }.items():
        assert reason in reasons[name], name
    names = list(stored)
    assert set(names) > set(extra)
    header = (tmp_path / "packed" / "model.safetensors").read_bytes()
    assert header.index(b"q_proj.outlier_deltas") < header.index(b"q_proj.bias") < header.index(b"k_proj.signs")


def bert(prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = {
        "embeddings.word_embeddings.weight": torch.randn(1100, 64),
        "embeddings.position_embeddings.weight": torch.randn(1200, 64),
        "embeddings.LayerNorm.weight": torch.randn(64),
        "pooler.dense.weight": torch.randn(64, 64),
        "pooler.dense.bias": torch.randn(64),
    }
    for layer in range(2):
        for name, rows, columns in (
            ("attention.output.dense", 64, 64),
            ("attention.self.key", 64, 64),
            ("attention.self.query", 64, 64),
            ("attention.self.value", 64, 64),
            ("intermediate.dense", 96, 64),
            ("output.dense", 64, 96),
        ):
            tensors[f"encoder.layer.{layer}.{name}.weight"] = torch.randn(rows, columns)
            tensors[f"encoder.layer.{layer}.{name}.bias"] = torch.randn(rows)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def test_encoders(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 2, "vocab_size": 1100}
    results = compress(write_source(tmp_path / "source", config, bert()), tmp_path / "packed")
    names = [layer["name"] for layer in results["layer_results"]]
    layer = ["self.query", "self.key", "self.value", "output.dense"]
    assert names == [
        "embeddings.word_embeddings",
        *(f"encoder.layer.0.attention.{name}" for name in layer),
        *("encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"),
        *(f"encoder.layer.1.attention.{name}" for name in layer),
        *("encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"),
        "pooler.dense",
    ]
    assert results["tied_modules"] == {}


def test_masked_language_models_tie_their_decoder(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 2, "vocab_size": 1100}
    tensors = bert("bert.") | {"cls.predictions.bias": torch.randn(1100)}
    results = compress(write_source(tmp_path / "source", config, tensors), tmp_path / "packed")
    assert results["tied_modules"] == {"cls.predictions.decoder": "bert.embeddings.word_embeddings"}


def test_scaled_embeddings_are_kept(tmp_path: Path) -> None:
    source = write_source(
        tmp_path / "source", llama_config(tied=True, model_type="gemma3_text"), llama_tensors(tied=True)
    )
    results = compress(source, tmp_path / "packed")
    kept = {tensor["name"]: tensor["reason"] for tensor in results["kept_tensors"]}
    assert "multiply what they look up" in kept["model.embed_tokens.weight"]
    assert results["tied_modules"] == {}


# ---- what is reported ----


def test_results_have_the_keys_of_the_old_interface_and_true_figures(tmp_path: Path) -> None:
    runner = compressor(target_storage_gb=1.0)
    results = runner.compress_model(write_llama(tmp_path / "source"), tmp_path / "packed")
    summary = results["compression_summary"]
    assert summary["layers_compressed"] == 2 * 7 + 2
    assert summary["average_quality_loss_percent"] is None
    assert summary["max_ram_usage_mb"] > 100
    shard = tmp_path / "packed" / "model.safetensors"
    assert summary["output_bytes"] == shard.stat().st_size
    tensors = llama_tensors()
    stored = safetensors.torch.load_file(shard)
    assert summary["bits_per_parameter"] == pytest.approx(
        8 * sum(tensor.nbytes for tensor in stored.values()) / sum(tensor.numel() for tensor in tensors.values())
    )
    linears = [name for name in tensors if "proj" in name]
    linear_bytes = sum(tensor.nbytes for name, tensor in stored.items() if "proj" in name)
    assert summary["bits_per_weight_linears"] == pytest.approx(
        8 * linear_bytes / sum(tensors[name].numel() for name in linears)
    )
    squared_error = squared_weight = 0.0
    for layer in results["layer_results"]:
        weight = tensors[f"{layer['name']}.weight"]
        with read_packed_checkpoint(tmp_path / "packed") as checkpoint:
            errors = measure_weight_errors(weight, checkpoint.packed_weight(layer["name"]))
        assert layer["relative_error"] == pytest.approx(errors.relative_error, rel=1e-5)
        assert layer["sqnr_db"] == pytest.approx(errors.sqnr_db, rel=1e-5)
        assert layer["compression_ratio"] == weight.nbytes / layer["packed_bytes"]
        squared_error += errors.squared_error
        squared_weight += errors.squared_weight
    assert summary["relative_error"] == pytest.approx((squared_error / squared_weight) ** 0.5, rel=1e-5)
    assert json.loads((tmp_path / "packed" / "compression_report.json").read_text()) == results

    validation = runner.validate_compression()
    assert validation["storage"]["status"] == "pass"
    assert validation["ram"]["status"] == validation["quality"]["status"] == "not evaluated"
    assert validation["passed"]
    runner.save_results(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {**results, "validation": validation}


def test_validation_fails_what_misses_its_target(tmp_path: Path) -> None:
    runner = compressor(target_storage_gb=1e-6, adaptive_precision=False, quality_threshold=5.0)
    with pytest.raises(ValueError, match="nothing was compressed yet"):
        runner.validate_compression()
    runner.compress_model(write_llama(tmp_path / "source"))
    assert runner.validate_compression()["storage"]["status"] == "fail"
    assert not runner.validate_compression()["passed"]
    runner.results["evaluation"] = LanguageModelEvaluation(9, 1, 9, True, 53.0, perplexity_ratio=1.06).to_dict()
    assert runner.validate_compression()["quality"]["status"] == "fail"
    runner.validator.quality_threshold = 7.0
    assert runner.validate_compression()["quality"]["status"] == "pass"


def test_without_an_output_nothing_is_written(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    measured = compressor().compress_model(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    written = compress(source, tmp_path / "packed")
    without_times = [{k: v for k, v in layer.items() if k != "seconds"} for layer in measured["layer_results"]]
    assert without_times == [{k: v for k, v in layer.items() if k != "seconds"} for layer in written["layer_results"]]


def test_progress_tells_tensors_bytes_and_the_error_of_the_module_just_done(tmp_path: Path) -> None:
    calls: list[CompressionProgress] = []
    results = compressor().compress_model(write_llama(tmp_path / "source"), progress=calls.append)
    finished = [call for call in calls if call.finished]
    assert [call.tensors_done for call in finished] == list(range(1, 22))
    assert {call.tensors_total for call in calls} == {21}
    assert calls[-1].bytes_done == calls[-1].bytes_total == sum(t.nbytes for t in llama_tensors().values())
    errors = {call.name: call.relative_error for call in finished if call.relative_error is not None}
    assert errors == {layer["name"]: layer["relative_error"] for layer in results["layer_results"]}
    assert finished[5].eta_seconds is not None and finished[5].eta_seconds > 0
    assert finished[-1].eta_seconds == 0


def test_presets_that_need_calibration_say_so(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    with pytest.raises(QualityRefusedError, match="force"):
        compress(source, tmp_path / "packed", preset="b1")
    assert not (tmp_path / "packed").exists()
    for preset in ("b2", "b3"):
        with pytest.warns(UncalibratedWarning, match=preset):
            compressor(preset=preset).compress_model(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressor(preset="b4").compress_model(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outlier_ratio": 1.5}, "outlier"),
        ({"preset": "b9"}, "preset"),
        ({"target_ram_mb": 0}, "target_ram_mb"),
        ({"target_storage_gb": -1}, "target_storage_gb"),
        ({"quality_threshold": -1}, "quality_threshold"),
        ({"threads": 0}, "threads"),
        ({"max_shard_gb": 0}, "max_shard_gb"),
        ({"quantizer": OutlierPreservingQuantizer(), "outlier_ratio": 0.1}, "outlier_ratio"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopCompressor(**options)


# ---- quantizers ----


class _Negated(OutlierPreservingQuantizer):
    """Packs the negative of each weight: easy to recognize."""

    def quantize_weight(self, weight: torch.Tensor, name: str) -> PackedWeight:
        return super().quantize_weight(-weight, name)


class _OtherLayout(OutlierPreservingQuantizer):
    def quantize_weight(self, weight: torch.Tensor, name: str) -> PackedWeight:
        return quantize_weight(weight, "b4")


def test_a_subclass_of_the_quantizer_is_used_for_linears(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", layers=1)
    quantizer = _Negated(outlier_ratio=0.05, preset="b3")
    results = compress(source, tmp_path / "packed", quantizer=quantizer)
    assert "_Negated" in results["options"]["quantizer"]
    name = "model.layers.0.mlp.up_proj"
    weight = llama_tensors(1)[f"{name}.weight"]
    with read_packed_checkpoint(tmp_path / "packed") as checkpoint:
        assert_same_weight(checkpoint.packed_weight(name), quantize_weight(-weight, "b3", outlier_fraction=0.05))
    errors = {layer["name"]: layer["relative_error"] for layer in results["layer_results"]}
    assert errors[name] > 1.8
    assert errors["lm_head"] < 0.1
    with pytest.raises(ValueError, match="quantizer returned"):
        compress(source, tmp_path / "other", quantizer=_OtherLayout(preset="b2"))


def test_compress_layer_is_the_quantizers_dictionary() -> None:
    weight = torch.randn(64, 96)
    result = compressor(preset="b4", outlier_ratio=0.02).compress_layer(weight, "some.layer")
    assert result["weight_name"] == "some.layer"
    assert_same_weight(result["compressed_data"], quantize_weight(weight, "b4", outlier_fraction=0.02))


# ---- the same bytes ----


def test_bytes_do_not_depend_on_threads_runs_or_instruction_sets(tmp_path: Path, isa: str) -> None:
    source = write_llama(tmp_path / "source")
    compress(source, tmp_path / "one", threads=1)
    threads = torch.get_num_threads()
    compress(source, tmp_path / "three", threads=3)
    assert torch.get_num_threads() == threads
    assert hashed_files(tmp_path / "one") == hashed_files(tmp_path / "three")
    reports = [json.loads((tmp_path / name / "compression_report.json").read_text()) for name in ("one", "three")]
    errors = [[layer["relative_error"] for layer in report["layer_results"]] for report in reports]
    assert errors[0] == errors[1]


KILLED_RUN = """
import os, signal, sys
from loop_singular_bit.compressor import LoopCompressor
source, output, point = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def die_at_point(progress):
    global calls
    calls += 1
    if calls >= point:
        os.kill(os.getpid(), signal.SIGKILL)

LoopCompressor(max_shard_gb=60e-6).compress_model(source, output, resume=True, progress=die_at_point)
"""


def run_killed(source: Path, output: Path, point: int) -> int:
    arguments = [sys.executable, "-W", "ignore", "-c", KILLED_RUN, str(source), str(output), str(point)]
    return subprocess.run(arguments, check=False).returncode


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", layers=3)
    output = tmp_path / "packed"
    compress(source, tmp_path / "reference", max_shard_gb=60e-6)
    for point in (5, 30):
        assert run_killed(source, output, point) == -signal.SIGKILL
        assert not output.exists()
        assert not (tmp_path / "packed.partial" / "config.json").exists()
    compressor(max_shard_gb=60e-6).compress_model(source, output, resume=True)
    assert hashed_files(output) == hashed_files(tmp_path / "reference")
    assert not (tmp_path / "packed.partial").exists()
    report = json.loads((output / "compression_report.json").read_text())
    assert report["compression_summary"]["resumed_tensors"] > 10


class _Stop(Exception):
    pass


def stop_after(calls: int) -> Callable[[CompressionProgress], None]:
    seen = 0

    def progress(_: CompressionProgress) -> None:
        nonlocal seen
        seen += 1
        if seen == calls:
            raise _Stop

    return progress


def interrupt(source: Path, output: Path, calls: int, **options: Any) -> None:
    with pytest.raises(_Stop):
        compressor(**options).compress_model(source, output, resume=True, progress=stop_after(calls))


def test_resuming_trusts_no_bytes_that_were_lost_or_changed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    compress(source, tmp_path / "reference")
    output = tmp_path / "packed"
    interrupt(source, output, 20)
    partial = tmp_path / "packed.partial"
    shard = partial / "model.safetensors.partial"
    journal = partial / "compression_journal.jsonl"
    done = [json.loads(line)["unit"] for line in journal.read_text().splitlines()[1:]]
    assert len(done) >= 8
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    with open(shard, "r+b") as file:  # as if the power had failed before these reached the disk
        file.seek(8 + header + 60_000)
        file.write(bytes(50))
    with open(journal, "a") as file:
        file.write('{"unit": "half a li')
    results = compressor().compress_model(source, output, resume=True)
    assert hashed_files(output) == hashed_files(tmp_path / "reference")
    assert results["compression_summary"]["resumed_tensors"] == 0  # the first module was hit

    interrupt(source, tmp_path / "again", 20)
    (tmp_path / "again.partial" / "model.safetensors.partial").unlink()
    compressor().compress_model(source, tmp_path / "again", resume=True)
    assert hashed_files(tmp_path / "again") == hashed_files(tmp_path / "reference")


def test_a_run_stopped_when_only_small_files_were_missing_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama(tmp_path / "source")
    compress(source, tmp_path / "reference")

    def fail(*_: object) -> None:
        raise OSError("no space left for this")

    for place in ("_checksums", "_rename"):
        output = tmp_path / place
        with monkeypatch.context() as patch:
            patch.setattr(OutputDirectory, place, fail)
            with pytest.raises(OSError, match="no space left"):
                compress(source, output)
        assert not output.exists()
        results = compressor().compress_model(source, output, resume=True)
        assert results["compression_summary"]["resumed_tensors"] == 21
        assert hashed_files(output) == hashed_files(tmp_path / "reference")


def test_a_journal_left_by_a_kill_right_after_the_rename_is_removed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    results = compress(source, tmp_path / "packed")
    before = hashed_files(tmp_path / "packed")
    (tmp_path / "packed" / "compression_journal.jsonl").write_text("{}\n")
    assert compressor().compress_model(source, tmp_path / "packed", resume=True) == results
    assert hashed_files(tmp_path / "packed") == before


def test_resuming_a_finished_compression_returns_its_report(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    results = compress(source, tmp_path / "packed")
    assert compressor().compress_model(source, tmp_path / "packed", resume=True) == results
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        compressor(preset="b4").compress_model(source, tmp_path / "packed", resume=True)


def test_other_options_or_another_source_do_not_resume(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    output = tmp_path / "packed"
    interrupt(source, output, 20)
    with pytest.raises(OutputExistsError, match="started with another outlier_fraction, preset"):
        compressor(preset="b4", outlier_ratio=0.1).compress_model(source, output, resume=True)
    other = write_llama(tmp_path / "other", seed=1)
    with pytest.raises(OutputExistsError, match="started with another source"):
        compressor().compress_model(other, output, resume=True)
    with pytest.raises(OutputExistsError, match="did not finish"):
        compressor().compress_model(source, output)
    compressor(preset="b4").compress_model(source, output, overwrite=True)
    with read_packed_checkpoint(output) as checkpoint:
        assert checkpoint.quantization_config["preset"] == "b4"


def test_an_existing_output_is_replaced_only_when_asked_and_only_if_packed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    output = tmp_path / "packed"
    compress(source, output)
    before = hashed_files(output)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        compress(source, output, preset="b4")
    assert hashed_files(output) == before
    compressor(preset="b4").compress_model(source, output, overwrite=True)
    assert hashed_files(output) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not a packed checkpoint"):
        compressor().compress_model(source, precious, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="not a directory"):
        compressor().compress_model(source, tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="is the source"):
        compressor().compress_model(source, source, overwrite=True)
    (tmp_path / "empty").mkdir()
    compress(source, tmp_path / "empty")
    assert hashed_files(tmp_path / "empty") == before


def test_two_compressions_into_one_directory_do_not_mix(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    refused = 0

    def second(_: CompressionProgress) -> None:
        nonlocal refused
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputExistsError, match="another process is compressing"):
                compressor().compress_model(source, tmp_path / "packed", **options)
            refused += 1

    compressor().compress_model(source, tmp_path / "packed", progress=second)
    assert refused > 20


# ---- bad sources ----


def test_nan_and_infinity_name_file_tensor_row_and_column(tmp_path: Path) -> None:
    for bad, name, row in (
        (float("nan"), "model.layers.1.mlp.up_proj.weight", 100),
        (float("inf"), "lm_head.weight", 1077),
    ):
        tensors = llama_tensors()
        tensors[name][row, 5] = bad
        source = write_source(tmp_path / str(bad), llama_config(), tensors, shards=2)
        with pytest.raises(
            CheckpointError, match=rf"\.safetensors: tensor {name}: .* got {bad} at row {row}, column 5"
        ):
            compress(source, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        compressor(skip_modules=[name.removesuffix(".weight")]).compress_model(
            source, tmp_path / "packed", overwrite=True
        )
        with pytest.raises(OutputExistsError):
            compress(source, tmp_path / "packed")
        for path in (tmp_path / "packed").iterdir():
            path.unlink()
        (tmp_path / "packed").rmdir()


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        compress(write_source(tmp_path / "a", llama_config(), tensors), tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"tensors of layer 2 are missing; config\.json says there are 3 layers"):
        compress(write_source(tmp_path / "b", llama_config(3), llama_tensors(2)), tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing; .* not tied"):
        compress(write_source(tmp_path / "c", llama_config(), llama_tensors(tied=True)), tmp_path / "packed")
    source = write_llama(tmp_path / "d", shards=2)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors: tensor model\.extra\.weight is missing"
    ):
        compress(source, tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", 3, ""]
)
def test_an_index_cannot_point_outside_of_its_directory(tmp_path: Path, shard: Any) -> None:
    source = write_llama(tmp_path / "source", shards=2)
    index = {"weight_map": {"model.norm.weight": shard}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the name of a safetensors file"):
        compress(source, tmp_path / "packed")


def test_damaged_and_unsupported_sources(tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], None], message: str) -> None:
        source = write_llama(tmp_path / name, shards=2)
        change(source)
        with pytest.raises(CheckpointError, match=message) as caught:
            compress(source, tmp_path / "packed")
        assert str(tmp_path) in str(caught.value)
        assert not (tmp_path / "packed").exists()

    def config(**changes: Any) -> Callable[[Path], None]:
        return lambda source: (source / "config.json").write_text(json.dumps(llama_config(**changes))) and None

    shard = "model-00002-of-00002.safetensors"
    broken("cut", lambda source: os.truncate(source / shard, 5000), f"{shard}: truncated")
    broken("gone", lambda source: (source / shard).unlink(), f"{shard}: cannot be opened")
    broken("unconfigured", lambda source: (source / "config.json").unlink(), r"config\.json: cannot be read")
    broken("list", lambda source: (source / "config.json").write_text("[]") and None, "expected a JSON object")
    broken("quantized", config(quantization_config={"quant_method": "gptq"}), r"quantized already \(gptq\)")
    broken("conv1d", config(model_type="gpt2"), "Conv1D")
    with pytest.raises(CheckpointError, match="expected a directory"):
        compress(tmp_path / "nowhere", tmp_path / "packed")
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].double()
    message = r"model\.safetensors: tensor model\.layers\.0\.mlp\.up_proj\.weight: expected dtype .* got F64"
    with pytest.raises(CheckpointError, match=message):
        compress(write_source(tmp_path / "double", llama_config(), tensors), tmp_path / "packed")
    norms = {"model.norm.weight": torch.ones(64)}
    with pytest.raises(CheckpointError, match="nothing to pack"):
        compress(write_source(tmp_path / "norms", {"model_type": "llama"}, norms), tmp_path / "packed")


def test_a_source_that_shrinks_meanwhile_is_an_error_that_can_be_resumed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    shard = source / "model.safetensors"
    content = shard.read_bytes()
    calls = 0

    def shrink(_: CompressionProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.truncate(shard, len(content) // 2)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*: the file ends at byte"):
        compressor().compress_model(source, tmp_path / "packed", progress=shrink)
    assert (tmp_path / "packed.partial").is_dir()
    assert not (tmp_path / "packed.partial" / "config.json").exists()


LIMITED_RUN = """
import resource, sys
from loop_singular_bit.compressor import LoopCompressor
for limit in (1000, 40_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        LoopCompressor(max_shard_gb=60e-6).compress_model(sys.argv[1], sys.argv[2], resume=True)
    except OSError as error:
        print(error)
"""


def test_a_full_disk_names_the_file_and_can_be_resumed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    compress(source, tmp_path / "reference", max_shard_gb=60e-6)
    output = tmp_path / "packed"
    arguments = [sys.executable, "-W", "ignore", "-c", LIMITED_RUN, str(source), str(output)]
    errors = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(errors) == 2
    assert all("File too large" in error and "packed.partial" in error for error in errors)
    assert not output.exists()
    compressor(max_shard_gb=60e-6).compress_model(source, output, resume=True)
    assert hashed_files(output) == hashed_files(tmp_path / "reference")


def test_too_little_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255)))
    with pytest.raises(OSError, match="bytes are needed, 36864 are free"):
        compress(write_llama(tmp_path / "source"), tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()


# ---- memory ----


def test_a_memory_target_that_cannot_be_met_is_refused_with_one_that_can(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    with pytest.raises(MemoryBudgetExceeded, match="cannot be met") as caught:
        compress(source, tmp_path / "packed", target_ram_mb=50)
    assert not (tmp_path / "packed.partial").exists()
    assert caught.value.target_mb == 50
    compress(source, tmp_path / "packed", target_ram_mb=caught.value.needed_mb + 5)


def test_the_memory_target_chooses_the_block_size(tmp_path: Path) -> None:
    tensors = {**llama_tensors(1), "model.wide.weight": torch.zeros(64_000, 64, dtype=torch.bfloat16)}
    source = write_source(tmp_path / "source", llama_config(1), tensors)
    with pytest.raises(MemoryBudgetExceeded) as caught:
        compress(source, tmp_path / "packed", target_ram_mb=50)
    blocks = [
        compressor(target_ram_mb=target).compress_model(source)["memory"]["block_bytes"]
        for target in (caught.value.needed_mb + 5, caught.value.needed_mb + 100)
    ]
    assert blocks[0] < blocks[1] == 16 << 20


def test_growth_above_the_target_stops_the_work_and_can_be_resumed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    compress(source, tmp_path / "reference")
    with pytest.raises(MemoryBudgetExceeded) as refused:
        compress(source, tmp_path / "packed", target_ram_mb=50)
    hoard = []

    def waste(_: CompressionProgress) -> None:
        hoard.append(torch.ones(10_000_000))

    with pytest.raises(MemoryBudgetExceeded, match=r"peak resident memory is .* above the target") as caught:
        compressor(target_ram_mb=refused.value.needed_mb + 60).compress_model(
            source, tmp_path / "packed", progress=waste
        )
    hoard.clear()
    assert caught.value.needed_mb > caught.value.target_mb
    compressor().compress_model(source, tmp_path / "packed", resume=True)
    assert hashed_files(tmp_path / "packed") == hashed_files(tmp_path / "reference")


MEMORY_RUN = """
import json, sys
from loop_singular_bit.cli import main
code = main(["compress", sys.argv[1], sys.argv[2], "--quiet", "--preset", "b4"])
imported = sorted(set(sys.modules) & {"transformers", "tokenizers", "safetensors", "pandas", "matplotlib"})
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"code": code, "imported": imported, "peak_mb": peak * 1024 / 1e6}))
"""


def test_the_whole_process_stays_within_400_mb_on_wide_layers(tmp_path: Path) -> None:
    tensors = llama_tensors(1)
    prefix = "model.layers.0.mlp"
    tensors[f"{prefix}.down_proj.weight"] = (0.02 * torch.randn(2048, 14336)).bfloat16()
    source = write_source(tmp_path / "source", llama_config(1), tensors)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_RUN, str(source), str(tmp_path / "packed")],
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(result.stdout)
    assert facts["code"] == 0, result.stderr
    assert facts["imported"] == []
    assert facts["peak_mb"] <= 400
    report = json.loads((tmp_path / "packed" / "compression_report.json").read_text())
    assert report["memory"]["peak_mb"] == pytest.approx(facts["peak_mb"], rel=0.02)


def test_ops_report_their_instruction_set(tmp_path: Path) -> None:
    results = compressor().compress_model(write_llama(tmp_path / "source"))
    assert results["machine"]["isa"] == ops.isa()


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*; weights in other formats"):
        compress(source, tmp_path / "packed")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_runs_what_was_written_like_the_model_packed_in_memory(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    from tiny_models import VOCABULARY, tiny_language_model
    from transformers import AutoModelForCausalLM

    import loop_singular_bit

    model = tiny_language_model(architecture, tied=tied)
    model.save_pretrained(tmp_path / "source", max_shard_size="200KB")
    results = compress(tmp_path / "source", tmp_path / "packed", max_shard_gb=100e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    report = loop_singular_bit.quantize_model(model)
    assert [module.name for module in report.replaced if module.tied_to is None] != []
    names = {module.name for module in report.replaced if module.tied_to is None}
    assert {layer["name"] for layer in results["layer_results"]} == names
    tokens = torch.arange(40).view(2, 20) * 7 % VOCABULARY
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_transformers_runs_a_packed_encoder_like_the_model_packed_in_memory(tmp_path: Path) -> None:
    from tiny_models import VOCABULARY, tiny_encoder
    from transformers import AutoModel

    import loop_singular_bit

    model = tiny_encoder()
    model.save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "packed")
    loaded = AutoModel.from_pretrained(tmp_path / "packed")
    loop_singular_bit.quantize_model(model)
    tokens = torch.arange(40).view(2, 20) * 7 % VOCABULARY
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)
