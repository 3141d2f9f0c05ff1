"""`compress --calibration`: lower output errors, the same bytes again, resumable, on the command line."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loop_singular_bit.calibrated_compression import Calibration, CalibrationStep, compress_calibrated, read_texts
from loop_singular_bit.cli import main
from loop_singular_bit.quantization.tuning import TuningOptions

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import tiny_encoder, tiny_language_model

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "examples/text/calibration/e-nesbit_the-railway-children.txt").read_text(encoding="utf-8")[:20_000]
CALIBRATION = Calibration(window=64, max_windows=8, rounds=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the bundled model's tokenizer."""
    directory = tmp_path_factory.mktemp("source")
    model = tiny_language_model("llama", tied=True)
    model.resize_token_embeddings(4096)
    model.config.vocab_size = 4096
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/books-llama-7m" / name, directory / name)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_packs_with_lower_output_errors_and_the_same_bytes_again(source: Path, tmp_path: Path) -> None:
    results = compress_calibrated(source, tmp_path / "one", [TEXT], "b2", CALIBRATION)
    linears = results["calibration"]["linears"]
    assert len(linears) == 14
    assert all(linear["output_error"] < linear["output_error_before"] for linear in linears)
    assert results["calibration"]["tokens"] == 8 * 64
    report = json.loads((tmp_path / "one" / "compression_report.json").read_text())
    assert report["calibration"] == results["calibration"]
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "2 rounds" in config["quantization_config"]["options"]["calibration"]
    assert not (tmp_path / "one.calibration").exists()
    compress_calibrated(source, tmp_path / "two", [TEXT], "b2", CALIBRATION, threads=1)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    compress_calibrated(source, tmp_path / "three", [TEXT[::-1]], "b2", CALIBRATION)
    assert files(tmp_path / "one") != files(tmp_path / "three")


def test_the_packed_checkpoint_loads(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress_calibrated(source, tmp_path / "packed", [TEXT], "b3", CALIBRATION)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits
    assert torch.nn.functional.cosine_similarity(packed, original, dim=-1).mean() > 0.9


def test_resumes(source: Path, tmp_path: Path) -> None:
    compress_calibrated(source, tmp_path / "whole", [TEXT], "b1", CALIBRATION)

    class Killed(Exception):
        pass

    def kill(progress: CalibrationStep) -> None:
        raise Killed

    with pytest.raises(Killed):
        compress_calibrated(source, tmp_path / "cut", [TEXT], "b1", CALIBRATION, calibration_progress=kill)
    assert (tmp_path / "cut.calibration").is_dir()
    seen: list[str] = []
    compress_calibrated(
        source,
        tmp_path / "cut",
        [TEXT],
        "b1",
        CALIBRATION,
        resume=True,
        calibration_progress=lambda step: seen.append(step.description),
    )
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    again = compress_calibrated(source, tmp_path / "cut", [TEXT], "b1", CALIBRATION, resume=True)
    assert again["calibration"]["linears"]


def test_mixed_layouts_and_tuning(source: Path, tmp_path: Path) -> None:
    calibration = replace(
        CALIBRATION, target_bits=3.3, tuning=TuningOptions(steps=3, learning_rate=1e-3, checkpoint_steps=1)
    )
    steps: list[CalibrationStep] = []
    results = compress_calibrated(
        source, tmp_path / "one", [TEXT], "b2", calibration, calibration_progress=steps.append
    )
    linears = results["calibration"]["linears"]
    assert len({linear["planes"] for linear in linears}) > 1
    assert 2.5 < results["compression_summary"]["bits_per_weight_linears"] <= 3.3
    assert results["calibration"]["tuning"]["steps"] == 3
    assert results["calibration"]["tuning"]["kl_before"] > 0
    assert [step.done for step in steps if step.description.startswith("tuning")] == [1, 2, 3]

    class Killed(Exception):
        pass

    def kill(step: CalibrationStep) -> None:
        if step.description.startswith("tuning") and step.done == 3:
            raise Killed

    with pytest.raises(Killed):
        compress_calibrated(source, tmp_path / "two", [TEXT], "b2", calibration, calibration_progress=kill)
    compress_calibrated(source, tmp_path / "two", [TEXT], "b2", calibration, resume=True)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    again = compress_calibrated(source, tmp_path / "two", [TEXT], "b2", calibration, resume=True)
    assert again["calibration"]["tuning"] == results["calibration"]["tuning"]


def test_encoders_are_calibrated_but_not_tuned(tmp_path: Path) -> None:
    model = tiny_encoder()
    model.resize_token_embeddings(4096)
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/books-llama-7m" / name, tmp_path / "source" / name)
    results = compress_calibrated(tmp_path / "source", tmp_path / "packed", [TEXT], "b3", CALIBRATION)
    linears = {linear["name"]: linear for linear in results["calibration"]["linears"]}
    assert {"encoder.layer.1.output.dense", "encoder.layer.0.attention.self.value"} <= linears.keys()
    assert all(linear["output_error"] < linear["output_error_before"] for linear in linears.values())
    mixed = replace(CALIBRATION, target_bits=4.0)
    with pytest.raises(ValueError, match="need a causal language model, got BertModel"):
        compress_calibrated(tmp_path / "source", tmp_path / "mixed", [TEXT], "b3", mixed)


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "book.txt").write_text(TEXT, encoding="utf-8")
    command = ["compress", str(source), str(tmp_path / "packed"), "--preset", "b1", "--json", "--quiet"]
    code = main([*command, "--calibration", str(text), "--calibration-window", "64", "--calibration-rounds", "1"])
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["calibration"]["rounds"] == 1
    assert printed["compression_summary"]["bits_per_weight"] is not None
    other = [*command[:2], str(tmp_path / "other"), *command[3:]]
    assert main([*other, "--calibration", str(tmp_path / "packed")]) == 2
    assert "expected text files" in capsys.readouterr().out
    assert main([*other, "--tune", "scales"]) == 2
    assert "--tune and --target-bits need --calibration" in capsys.readouterr().out


def test_texts_of_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_texts([tmp_path, tmp_path / "b.txt"]) == ["first", "second", "second"]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"c\.txt: expected UTF-8"):
        read_texts([tmp_path])
