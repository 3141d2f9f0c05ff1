"""The commands that run models: evaluate, generate, env, and the plot of inspect."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop_singular_bit import LoopCompressor
from loop_singular_bit.cli import EXIT_BAD_CHECKPOINT, EXIT_INTERRUPTED, EXIT_OK, EXIT_QUALITY, EXIT_USAGE, main
from loop_singular_bit.errors import CheckpointError
from loop_singular_bit.plots import plot_report

transformers = pytest.importorskip("transformers")
from tiny_models import write_tiny_checkpoint  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
BOOKS = EXAMPLES / "books-llama-7m"
HELD_OUT = sorted((EXAMPLES / "text/held_out").glob("*.txt"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny random model with the tokenizer of the bundled one, the same model packed, and a text."""
    base = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(base / "original")
    LoopCompressor(preset="b4", target_ram_mb=None).compress_model(base / "original", base / "packed")
    text = base / "text.txt"
    text.write_text(HELD_OUT[0].read_text(encoding="utf-8")[5000:7000], encoding="utf-8")
    return SimpleNamespace(original=str(base / "original"), packed=str(base / "packed"), text=str(text))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = EXIT_OK) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_evaluate_against_the_original(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", directories.packed, "--text", directories.text, "--window", "32"]
    results = run_json(capsys, *arguments, "--against", directories.original)
    assert results["tokens"] > 300
    assert results["perplexity_ratio"] == pytest.approx(results["perplexity"] / results["perplexity_original"])
    assert 0 < results["kl_divergence"] < 1
    assert 0.2 < results["top1_agreement"] <= 1
    assert results["passed"] == "not evaluated"
    assert results["beginning_token"] is True
    few = run_json(capsys, *arguments, "--max-tokens", "50")
    assert few["tokens"] == 50
    assert few["perplexity"] > 1
    for name in ("perplexity_original", "perplexity_ratio", "kl_divergence", "top1_agreement"):
        assert few[name] == "not evaluated"
    exact = run_json(capsys, *arguments, "--max-tokens", "50", "--activation-precision", "exact")
    assert exact["perplexity"] != few["perplexity"]
    assert exact["perplexity"] == pytest.approx(few["perplexity"], rel=0.1)


def test_evaluate_judges_by_a_threshold(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("evaluate", directories.packed, "--against", directories.original, "--text", directories.text),
        *("--window", "32", "--max-tokens", "100"),
    ]
    assert run_json(capsys, *arguments, "--quality-threshold", "1e9")["passed"] is True
    # The packed model as the original of the dense one: one of the two directions has the higher perplexity.
    reversed_arguments = [arguments[0], arguments[3], arguments[2], arguments[1], *arguments[4:]]
    codes = [main([*each, "--quality-threshold", "0"]) for each in (arguments, reversed_arguments)]
    assert sorted(codes) == [EXIT_OK, EXIT_QUALITY]
    captured = capsys.readouterr()
    assert "percent increase of perplexity, the limit is 0" in captured.err
    assert "KL divergence, nats per token" in captured.out
    assert "top-1 agreement" in captured.out
    without_original = [arguments[0], arguments[1], *arguments[4:], "--quality-threshold", "1"]
    assert main(without_original) == EXIT_USAGE
    # Each limit alone decides, and only the one that is set.
    assert main([*arguments, "--max-kl-divergence", "1e-9"]) == EXIT_QUALITY
    assert "nats of KL divergence per token, the limit is 1e-09" in capsys.readouterr().err
    assert main([*arguments, "--max-kl-divergence", "100", "--min-top1-agreement", "0"]) == EXIT_OK
    assert main([*arguments, "--min-top1-agreement", "1"]) == EXIT_QUALITY


def test_evaluate_several_texts_with_intervals(
    directories: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.txt"
    second.write_text(HELD_OUT[1].read_text(encoding="utf-8")[5000:6500], encoding="utf-8")
    arguments = [
        *("evaluate", directories.packed, "--against", directories.original),
        *("--text", directories.text, str(second), "--window", "32", "--max-tokens", "200"),
    ]
    results = run_json(capsys, *arguments)
    assert [text["tokens"] for text in results["per_text"]] == [100, 100]
    for figures in (results, *results["per_text"]):
        for name in ("perplexity", "perplexity_ratio", "kl_divergence", "kl_divergence_p99", "top1_agreement"):
            low, high = figures[f"{name}_interval"]
            assert low <= figures[name] <= high, name
    assert main(arguments) == EXIT_OK
    printed = capsys.readouterr().out
    assert "second.txt" in printed and "all texts" in printed and "95 % confidence" in printed


def test_evaluate_names_what_is_wrong(
    directories: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path), "--text", directories.text]) == EXIT_BAD_CHECKPOINT
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["evaluate", directories.packed, "--text", str(tmp_path / "none.txt")]) != EXIT_OK
    assert "none.txt" in capsys.readouterr().err
    assert main(["evaluate", directories.packed, "--text", directories.text, "--window", "65"]) == EXIT_USAGE
    assert "64 positions" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "engine"), [("packed", "native"), ("packed", "transformers"), ("original", "auto")])
def test_generate(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str], kind: str, engine: str) -> None:
    arguments = ["generate", getattr(directories, kind), "--prompt", "The old sailor", "--max-new-tokens", "6"]
    arguments += ["--engine", engine]
    results = run_json(capsys, *arguments)
    assert results["new_tokens"] <= 6 and results["text"]
    assert results["tokens_per_second"] > 0 and results["peak_resident_mb"] > 50
    assert main(arguments) == EXIT_OK
    captured = capsys.readouterr()
    assert captured.out.startswith("The old sailor" + results["text"])
    assert "tokens/s" in captured.err and "peak resident memory" in captured.err


def test_generate_samples_by_seed(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", directories.original, "--prompt", "The", "--max-new-tokens", "8", "--temperature", "1.5"]
    texts = [run_json(capsys, *arguments, "--top-p", "0.99", "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_prints_what_came_before_an_interrupt(
    directories: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = transformers.TextStreamer.put, []

    def interrupted_put(self: Any, value: torch.Tensor) -> None:
        calls.append(value)
        if len(calls) == 6:
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(transformers.TextStreamer, "put", interrupted_put)
    arguments = ["generate", directories.original, "--prompt", "The old sailor", "--max-new-tokens", "40"]
    assert main(arguments) == EXIT_INTERRUPTED
    captured = capsys.readouterr()
    assert len(captured.out.strip()) > len("The old sailor")
    assert "interrupted" in captured.err
    calls.clear()
    results = run_json(capsys, *arguments, code=EXIT_INTERRUPTED)
    assert results["interrupted"] is True
    assert captured.out.strip() == ("The old sailor" + results["text"]).strip()


@pytest.mark.parametrize(
    "option", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--top-p", "0"), ("--repetition-penalty", "0")]
)
def test_generate_refuses_values_out_of_range(
    directories: SimpleNamespace, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert main(["generate", directories.packed, "--prompt", "The", *option]) == EXIT_USAGE
    assert option[0] in capsys.readouterr().err


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "env")
    assert facts["torch"] == torch.__version__
    assert facts["isa"] in facts["supported_isas"]
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["cpus"] >= 1 and facts["ram_mb"] > 100
    assert main(["env"]) == EXIT_OK
    assert f"supported isas     {', '.join(facts['supported_isas'])}" in capsys.readouterr().out


def test_plot(directories: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["inspect", directories.packed, "--plot", str(tmp_path / "plot.png")]) == EXIT_OK
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert main(["inspect", directories.original, "--plot", str(tmp_path / "no.png")]) == EXIT_BAD_CHECKPOINT
    assert not (tmp_path / "no.png").exists()


def layer_result(name: str, out_features: int, in_features: int, planes: int) -> dict[str, Any]:
    layout = {"out_features": out_features, "in_features": in_features, "planes": planes, "outliers": 1}
    return {"name": name, "kind": "linear", **layout, "column_scales": True, "means": False, "relative_error": 0.1}


@pytest.mark.parametrize(
    "names", [["0", "2"], ["model.layers.0.up", "model.layers.1.up", "head"], [f"h.{layer}.fc" for layer in range(40)]]
)
def test_plot_of_any_kind_of_model(names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = {"layer_results": [layer_result(name, 64, 96, 2) for name in names]}
    assert plot_report(report, tmp_path / "plot.png").stat().st_size > 10_000


def test_plot_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="layer_results"):
        plot_report({"layer_results": []}, tmp_path / "plot.png")
    with pytest.raises(CheckpointError, match=r"compression_report\.json: no such file"):
        plot_report(tmp_path, tmp_path / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'loop-singular-bit\[plots\]'"):
        plot_report({"layer_results": [layer_result("0", 64, 96, 2)]}, tmp_path / "plot.png")


@pytest.mark.skipif(not BOOKS.exists() or not HELD_OUT, reason="the bundled model is not here")
def test_the_bundled_model_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compressed to 4 bits the bundled model keeps its perplexity, and both write the same kind of text."""
    # The budget counts the whole process, and this one runs tests.
    compress = ["compress", str(BOOKS), str(tmp_path / "packed"), "--preset", "b4", "--target-ram-mb", "9000"]
    assert main([*compress, "--quiet"]) == EXIT_OK
    assert (tmp_path / "packed/model.safetensors").stat().st_size < 0.33 * (BOOKS / "model.safetensors").stat().st_size
    capsys.readouterr()
    results = run_json(
        capsys, "evaluate", str(tmp_path / "packed"), "--against", str(BOOKS), "--text", *map(str, HELD_OUT),
        "--window", "256", "--max-tokens", "1500", "--quality-threshold", "3",
    )  # fmt: skip
    assert results["passed"] is True
    assert 40 < results["perplexity_original"] < 80
    assert 0.99 < results["perplexity_ratio"] < 1.03
    assert 0.002 < results["kl_divergence"] < 0.03 and results["grade"] in ("good", "transparent")
    assert results["top1_agreement"] > 0.85
    text = run_json(capsys, "generate", str(tmp_path / "packed"), "--prompt", "The old sailor looked at the")["text"]
    assert "said" in text and len(set(text.split())) > 8
