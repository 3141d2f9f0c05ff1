"""The commands compress, inspect and verify as a user types them: output, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from source_checkpoints import hashed_files, llama_config, llama_tensors, write_llama, write_source

from loop_singular_bit import cli_compress
from loop_singular_bit.cli import build_parser, main
from loop_singular_bit.quantization.tuning import TuningOptions

RAM = ["--target-ram-mb", "4000"]  # the process of the tests holds more than a compression may


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_compress_prints_a_table_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_llama(tmp_path / "source", layers=3, tied=True)
    code, output, errors = run(capsys, "compress", source, tmp_path / "packed", *RAM)
    assert code == 0
    assert "model.layers.*.mlp.down_proj (3)" in output
    assert "17 modules" not in output and "22 modules packed at" in output
    assert "tied: lm_head uses model.embed_tokens" in output
    assert "quality: not evaluated" in output
    assert "warning: preset 'b2' without calibration" in errors
    assert "tensors" in errors and "error 0." in errors and "MB RAM" in errors


def test_json_is_one_object_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_llama(tmp_path / "source")
    code, output, errors = run(capsys, "compress", source, tmp_path / "packed", "--json", *RAM)
    facts = json.loads(output)
    assert code == 0 and "warning" in errors
    assert facts["compression_summary"]["layers_compressed"] == 16
    assert facts["validation"]["ram"]["status"] == "pass"
    assert facts["output"] == str(tmp_path / "packed")
    code, output, errors = run(capsys, "inspect", tmp_path / "packed", "--json")
    assert code == 0 and len(json.loads(output)["modules"]) == 16
    code, output, errors = run(capsys, "verify", tmp_path / "packed", "--against", source, "--json")
    assert code == 0 and json.loads(output)["passed"]
    code, output, errors = run(capsys, "verify", tmp_path, "--json")
    assert code == 3 and json.loads(output)["exit_code"] == 3
    assert "config.json" in json.loads(output)["error"] and "config.json" in errors


def test_quiet_prints_nothing_but_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_llama(tmp_path / "source")
    assert run(capsys, "compress", source, tmp_path / "packed", "--quiet", "--preset", "b4", *RAM) == (0, "", "")
    assert run(capsys, "verify", tmp_path / "packed", "--quiet") == (0, "", "")


def test_options_reach_the_compressor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_llama(tmp_path / "source", layers=3)
    arguments = ["compress", source, tmp_path / "packed", *RAM, "--json", "--preset", "b3", "--outlier-ratio", "0.05"]
    arguments += ["--threads", "1", "--skip-modules", "q_proj", "model.layers.0.mlp", "--keep-embeddings"]
    arguments += ["--max-layers", "2", "--max-shard-gb", "100e-6", "--target-storage-gb", "1"]
    arguments += ["--uniform"]
    code, output, _ = run(capsys, *arguments)
    assert code == 0
    facts = json.loads(output)
    names = {layer["name"] for layer in facts["layer_results"]}
    assert names == {
        *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kvo"),
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert {layer["planes"] for layer in facts["layer_results"]} == {3}
    assert facts["layer_results"][0]["outliers"] == 4
    assert facts["machine"]["threads"] == 1
    assert facts["validation"]["storage"]["status"] == "pass"
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1


def test_options_reach_the_tuning() -> None:
    words = "compress SRC DST --calibration TEXT --tune signs --tuning-steps 7 --tuning-layer-steps 3"
    words += " --tuning-sampled-windows 5 --tuning-memory-gb 1.5"
    options = cli_compress._tuning_options(build_parser().parse_args(words.split()))
    assert options == TuningOptions(signs=True, steps=7, layer_steps=3, sampled_windows=5, memory_gb=1.5)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_llama(tmp_path / "source")
    packed = tmp_path / "packed"
    assert run(capsys, "compress")[0] == 2
    assert run(capsys, "compress", source, packed, "--preset", "b9", *RAM)[0] == 2
    code, _, errors = run(capsys, "compress", tmp_path / "nowhere", packed, *RAM)
    assert code == 3 and "expected a directory, or a Hub name" in errors
    code, _, errors = run(capsys, "compress", source, packed, "--target-ram-mb", "30")
    assert code == 4 and "cannot be met" in errors
    code, _, errors = run(capsys, "compress", source, packed, "--preset", "b1", *RAM)
    assert code == 5 and "--force" in errors
    assert run(capsys, "compress", source, packed, "--preset", "b1", "--force", "--quiet", *RAM)[0] == 0
    code, _, errors = run(capsys, "compress", source, packed, *RAM)
    assert code == 2 and "--overwrite" in errors
    too_small = ["--overwrite", "--target-storage-gb", "1e-6", *RAM]
    code, _, errors = run(capsys, "compress", source, packed, *too_small)
    assert code == 2 and "cannot be met" in errors and "is the least" in errors
    code, _, errors = run(capsys, "compress", source, packed, "--uniform", *too_small)
    assert code == 5 and "storage target missed" in errors
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    bad = write_source(tmp_path / "bad", llama_config(), tensors)
    code, _, errors = run(capsys, "compress", bad, tmp_path / "other", "--quiet", *RAM)
    assert code == 3 and "tensor model.layers.1.mlp.up_proj.weight: expected finite weights" in errors
    (packed / "checksums.sha256").unlink()
    code, output, errors = run(capsys, "verify", packed)
    assert code == 3 and "PROBLEM model.safetensors: not listed" in output and "1 problem" in errors
    assert run(capsys, "inspect", source)[0] == 3


def test_resume_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = llama_tensors()
    good = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    source = write_source(tmp_path / "source", llama_config(), tensors)
    packed = tmp_path / "packed"
    assert run(capsys, "compress", source, packed, *RAM)[0] == 3
    code, _, errors = run(capsys, "compress", source, packed, *RAM)
    assert code == 2 and "--resume" in errors
    tensors["model.layers.1.mlp.up_proj.weight"] = good
    write_source(tmp_path / "source", llama_config(), tensors)
    code, _, errors = run(capsys, "compress", source, packed, "--resume", *RAM)
    assert code == 2 and "started with another source" in errors
    assert run(capsys, "compress", source, packed, "--overwrite", "--quiet", *RAM)[0] == 0
    before = hashed_files(packed)
    assert run(capsys, "compress", source, packed, "--resume", "--quiet", *RAM)[0] == 0
    assert hashed_files(packed) == before


def test_inspect_folds_layers_that_look_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = llama_tensors(4) | {
        f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(64).bfloat16() for layer in range(4)
    }
    source = write_source(tmp_path / "source", llama_config(4), tensors)
    run(capsys, "compress", source, tmp_path / "packed", "--max-layers", "3", *RAM)
    code, output, _ = run(capsys, "inspect", tmp_path / "packed")
    assert code == 0
    assert output.count("q_proj") == 2 and "0 to 2, each" in output
    assert output.count("bias  BF16 64, 128 bytes") == 2
    assert "linear 64 x 136: 2 planes, 2 outliers a row" in output
    assert "signs" in output and "bits per weight: all" in output
    assert run(capsys, "inspect", tmp_path / "packed", "--all")[1].count("q_proj") == 4


def test_evaluating_on_text_decides_about_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).parents[1] / "examples" / "books-llama-7m"
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 4)
    arguments = ["compress", model, tmp_path / "packed", "--evaluate-text", text, "--json", *RAM]
    code, output, errors = run(capsys, *arguments)
    facts = json.loads(output)
    loss = facts["compression_summary"]["average_quality_loss_percent"]
    assert loss == pytest.approx(100 * (facts["evaluation"]["perplexity_ratio"] - 1))
    assert code == 5 and loss > 1 and "quality target missed" in errors
    assert (
        json.loads((tmp_path / "packed" / "compression_report.json").read_text())["evaluation"] == facts["evaluation"]
    )
    code, output, _ = run(capsys, *arguments[:-2], *RAM, "--resume", "--quality-threshold", "1e6")
    assert code == 0 and json.loads(output)["validation"]["quality"]["status"] == "pass"


def test_hub_names_are_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_llama(tmp_path / "models--someone--small" / "snapshots" / "abc")
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.bin" not in allow_patterns and "*.py" not in allow_patterns
        return str(snapshot)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert run(capsys, "compress", "someone/small", tmp_path / "packed", "--quiet", *RAM)[0] == 0
    assert asked == ["someone/small"]
    assert 'base_model: "someone/small"' in (tmp_path / "packed" / "README.md").read_text()


def test_help_and_version_need_no_torch() -> None:
    program = "import sys; from loop_singular_bit.cli import main\n"
    program += "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.endswith("False\n")
    for command in ("compress", "inspect", "verify", "evaluate", "generate", "env"):
        assert command in output
    module = [sys.executable, "-m", "loop_singular_bit", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout.startswith("loop-singular-bit ")


def test_an_interrupted_compression_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama(tmp_path / "source")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli_compress._Progress, "update", interrupt)
        code, _, errors = run(capsys, "compress", source, tmp_path / "packed", *RAM)
    assert code == 130 and "interrupted; continue with --resume" in errors
    assert not (tmp_path / "packed").exists()
    assert run(capsys, "compress", source, tmp_path / "packed", "--resume", "--quiet", *RAM)[0] == 0
