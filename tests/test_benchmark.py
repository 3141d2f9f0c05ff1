"""CompressionBenchmark and its command on a tiny random model: figures, files, refusals, and that runs repeat."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop_singular_bit import CompressionBenchmark, LoopCompressor, evaluate_language_model, quantize_weight
from loop_singular_bit.benchmark import METRICS, BenchmarkProgress
from loop_singular_bit.cli import EXIT_OK, EXIT_USAGE, main
from loop_singular_bit.comparison.continuations import bleu, rouge
from loop_singular_bit.comparison.linears import linears_of
from loop_singular_bit.comparison.methods import METHODS, VARIANTS
from loop_singular_bit.comparison.report import comparison_markdown, comparison_table, plot_comparison

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
BOOKS = EXAMPLES / "books-llama-7m"
SMALL = CompressionBenchmark(
    window=32,
    max_tokens=300,
    calibration_window=32,
    calibration_windows=6,
    continuations=4,
    prompt_tokens=8,
    new_tokens=8,
)
ONE_OF_EACH = (
    *("loop_singular_bit-b2", "loop_singular_bit-b2-calibrated", "loop_singular_bit-2.31bit-calibrated"),
    *("binary", "bitnet", "rtn-4bit-g64", "hqq-3bit-g64", "gptq-3bit-g64", "int8", "llm_int8", "smoothquant"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny random model with the tokenizer of the bundled one, texts to evaluate on and to calibrate with."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, bos_token_id=0, eos_token_id=1, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BOOKS / name, directory)
    held_out, calibration = (sorted((EXAMPLES / "text" / part).glob("*.txt")) for part in ("held_out", "calibration"))
    texts = [path.read_text(encoding="utf-8")[3000:4500] for path in held_out]
    return SimpleNamespace(
        directory=str(directory), texts=texts, calibration=calibration[0].read_text(encoding="utf-8")[3000:6000]
    )


@pytest.fixture(scope="module")
def results(inputs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    steps: list[BenchmarkProgress] = []
    directory = tmp_path_factory.mktemp("output")
    results = SMALL.run_comprehensive_test(
        inputs.directory,
        ONE_OF_EACH,
        texts=inputs.texts,
        calibration_texts=inputs.calibration,
        output_directory=directory,
        progress=steps.append,
    )
    assert [step.description for step in steps][3:-1] == [row["name"] for row in results["rows"]]
    assert (steps[-1].done, steps[-1].total) == (len(ONE_OF_EACH), len(ONE_OF_EACH))
    return {**results, "directory": directory}


def row_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["name"] == name)


def test_every_method_and_every_metric(results: dict[str, Any]) -> None:
    rows = results["rows"]
    assert [row["name"] for row in rows] == list(ONE_OF_EACH)
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        for figure in ("perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement", "bleu", "rouge1", "rougeL"):
            low, high = row[f"{figure}_interval"]
            assert low <= row[figure] * (1 + 1e-9) and row[figure] <= high * (1 + 1e-9) + 1e-9, (row["name"], figure)
        assert 0 < row["kl_divergence_median"] <= row["kl_divergence_p99"]
        assert row["bits_per_weight"] >= row["bits_per_weight_at_4096"] - 0.05
    errors = [row_of(results, name)["kl_divergence"] for name in ("int8", "rtn-4bit-g64", "gptq-3bit-g64", "bitnet")]
    assert errors == sorted(errors) and errors[0] < 0.01 * errors[-1]
    calibrated = row_of(results, "loop_singular_bit-b2-calibrated")
    assert calibrated["kl_divergence"] < row_of(results, "loop_singular_bit-b2")["kl_divergence"]
    assert row_of(results, "int8")["relative_error"] < 0.01 < row_of(results, "binary")["relative_error"]
    assert row_of(results, "smoothquant")["relative_error"] == "not evaluated"
    assert row_of(results, "int8")["bleu"] > row_of(results, "binary")["bleu"]
    assert results["protocol"]["linears"] == 14 and results["original"]["tokens"] == 300


def test_figures_are_those_of_the_packed_model(results: dict[str, Any], inputs: SimpleNamespace) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(inputs.directory, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs.directory, dtype=torch.float32)
    stored = weights = 0
    for linear in linears_of(model).values():
        packed = quantize_weight(linear.weight, "b2")
        linear.weight.data = packed.dequantize()
        stored += packed.nbytes
        weights += packed.out_features * packed.in_features
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.directory)
    expected = evaluate_language_model(
        model, tokenizer, inputs.texts, original=original, window=32, max_tokens=300
    ).to_dict()
    row = row_of(results, "loop_singular_bit-b2")
    assert row["bits_per_weight"] == 8 * stored / weights
    for name in ("perplexity", "perplexity_ratio", "kl_divergence", "kl_divergence_p99", "top1_agreement"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5), name
    assert results["original"]["perplexity"] == pytest.approx(expected["perplexity_original"], rel=1e-5)
    mixed = row_of(results, "loop_singular_bit-2.31bit-calibrated")
    assert mixed["bits_per_weight_at_4096"] == pytest.approx(2.31, abs=0.06)


def test_files_table_and_plot(results: dict[str, Any], tmp_path: Path) -> None:
    directory = results["directory"]
    assert sorted(path.name for path in directory.iterdir()) == [
        f"method_comparison.{suffix}" for suffix in ("json", "md", "png")
    ]
    stored = json.loads((directory / "method_comparison.json").read_text(encoding="utf-8"))
    assert [row["kl_divergence"] for row in stored["rows"]] == [row["kl_divergence"] for row in results["rows"]]
    assert (directory / "method_comparison.png").read_bytes().startswith(b"\x89PNG")
    markdown = (directory / "method_comparison.md").read_text(encoding="utf-8")
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(ONE_OF_EACH)
    assert lines[1].startswith("| binary | ") and "mean KL" in lines[0]
    assert "300 tokens" in markdown and "4 greedy continuations" in markdown
    table = comparison_table(results)
    assert table.row_count == len(ONE_OF_EACH) and len(table.columns) == lines[0].count("|") - 1
    # What a broken model gives must neither stop the plot nor make invalid JSON.
    broken = {**results, "rows": [{**results["rows"][0], "perplexity_ratio": math.inf}, *results["rows"][1:]]}
    plot_comparison(broken, tmp_path / "broken.png")
    assert "inf" in comparison_markdown(broken)


def test_only_what_is_asked_for_and_the_same_again(inputs: SimpleNamespace) -> None:
    def run() -> dict[str, Any]:
        return SMALL.run_comprehensive_test(
            inputs.directory,
            compression_methods=["rtn-2bit-g64", "smoothquant"],
            quality_metrics=["kl_divergence"],
            texts=inputs.texts,
        )

    first = run()
    assert first["metrics"] == ["kl_divergence"]
    for row in first["rows"]:
        assert "kl_divergence" in row
        assert not {"perplexity", "top1_agreement", "bleu", "rouge1", "relative_error", "continuation"} & set(row)
    assert first["protocol"]["calibration_texts"].startswith("written by the original")
    assert run() == first


def test_without_texts_the_model_writes_them(inputs: SimpleNamespace) -> None:
    results = SMALL.run_comprehensive_test(inputs.directory, ["int8"], ["perplexity"])
    assert results["protocol"]["texts"].startswith("written by the original")
    assert results["original"]["tokens"] == 300
    assert results["rows"][0]["perplexity_ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("methods", "metrics", "message"),
    [
        (["awq"], None, "loop_singular_bit, binary, bitnet, rtn, hqq, gptq, int8, llm_int8, smoothquant; got 'awq'"),
        (["int8"], ["perplexity", "speed"], f"{', '.join(METRICS)}; got 'speed'"),
        (["int8"], [], "got none"),
    ],
)
def test_unknown_names_are_refused_before_any_work(methods: list[str], metrics: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionBenchmark().run_comprehensive_test("/nowhere", methods, metrics)
    with pytest.raises(TypeError, match="sequence of names"):
        CompressionBenchmark().run_comprehensive_test("/nowhere", ["int8"], "perplexity")


def test_what_cannot_work_is_refused_before_any_work(
    inputs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoopCompressor(preset="b4", target_ram_mb=None).compress_model(inputs.directory, tmp_path / "packed")
    with pytest.raises(ValueError, match="unquantized"):
        SMALL.run_comprehensive_test(tmp_path / "packed", ["int8"], ["perplexity"], texts=inputs.texts)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"'bleu' needs sacrebleu; .*loop-singular-bit\[benchmarks\]"):
        CompressionBenchmark().run_comprehensive_test("/nowhere", ["int8"], ["bleu"])


def test_bleu_and_rouge() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    references = ["the cat sat on the mat today", "a quick brown fox jumps over it"]
    same, other = bleu(references, references), bleu(["nothing of this", "is there at all"], references)
    assert same["bleu"] == pytest.approx(100) and other["bleu"] < 10
    assert "tok:13a" in same["bleu_signature"]
    half = rouge(["the cat sat on the mat today", "zzz"], references)
    assert half["rougeL"] == pytest.approx(0.5) and half["rouge2_interval"] == (0, 1)
    # One of two words right, two of seven found: F = 2 * .5 * (1 / 7) / (.5 + 1 / 7).
    partial = rouge(["the dog"], ["the cat sat on a mat today"])["rouge1"]
    assert partial == pytest.approx(2 * 0.5 * (1 / 7) / (0.5 + 1 / 7))


def test_command(inputs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(inputs.texts[0], encoding="utf-8")
    arguments = [
        *("benchmark", inputs.directory, "--methods", "int8", "binary", "--metrics", "kl_divergence", "top1_agreement"),
        *("--text", str(text), "--window", "32", "--max-tokens", "100"),
    ]
    assert main([*arguments, "--json"]) == EXIT_OK
    results = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in results["rows"]] == ["int8", "binary"]
    assert results["original"]["tokens"] == 100
    assert main([*arguments, "--output", str(tmp_path / "out")]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "binary" in printed and "mean KL" in printed and "perplexity of the original" in printed
    assert (tmp_path / "out" / "method_comparison.png").exists()
    assert main(["benchmark", inputs.directory, "--methods", "none"]) == EXIT_USAGE
    assert "smoothquant" in capsys.readouterr().err


@pytest.mark.slow
def test_every_variant_runs(inputs: SimpleNamespace) -> None:
    results = SMALL.run_comprehensive_test(
        inputs.directory,
        None,
        ["kl_divergence"],
        texts=inputs.texts,
        calibration_texts=inputs.calibration,
    )
    # One outlier in 64 columns is too many for 1.25 bits.
    assert [entry["name"] for entry in results["skipped"]] == ["loop_singular_bit-1.25bit-calibrated"]
    assert "cannot be met" in results["skipped"][0]["reason"]
    skipped = {entry["name"] for entry in results["skipped"]}
    measured = [variant.name for variant in VARIANTS if variant.name not in skipped]
    assert [row["name"] for row in results["rows"]] == measured
    with pytest.raises(ValueError, match=r"1\.25bit-calibrated: .*cannot be met"):
        SMALL.run_comprehensive_test(inputs.directory, list(skipped), ["kl_divergence"], texts=inputs.texts)
    assert all(0 < row["kl_divergence"] < 10 for row in results["rows"])
