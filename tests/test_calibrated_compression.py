"""`compress --calibration`: a packed checkpoint with lower output errors, the same bytes again, resumable, on the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from loop_singular_bit.calibrated_compression import compress_calibrated, read_texts
from loop_singular_bit.cli import main
from loop_singular_bit.quantization.calibration import CalibrationProgress

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import tiny_language_model  # noqa: E402

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "examples/text/calibration/e-nesbit_the-railway-children.txt").read_text(encoding="utf-8")[:20_000]
OPTIONS = {"window": 64, "max_windows": 8, "rounds": 2}


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
    results = compress_calibrated(source, tmp_path / "one", [TEXT], "b2", **OPTIONS)
    linears = results["calibration"]["linears"]
    assert len(linears) == 14
    assert all(linear["output_error"] < linear["output_error_before"] for linear in linears)
    assert results["calibration"]["tokens"] == 8 * 64
    report = json.loads((tmp_path / "one" / "compression_report.json").read_text())
    assert report["calibration"] == results["calibration"]
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "2 rounds" in config["quantization_config"]["options"]["calibration"]
    assert not (tmp_path / "one.calibration").exists()
    compress_calibrated(source, tmp_path / "two", [TEXT], "b2", threads=1, **OPTIONS)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    compress_calibrated(source, tmp_path / "three", [TEXT[::-1]], "b2", **OPTIONS)
    assert files(tmp_path / "one") != files(tmp_path / "three")


def test_the_packed_checkpoint_loads(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress_calibrated(source, tmp_path / "packed", [TEXT], "b3", **OPTIONS)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits
    assert torch.nn.functional.cosine_similarity(packed, original, dim=-1).mean() > 0.9


def test_resumes(source: Path, tmp_path: Path) -> None:
    compress_calibrated(source, tmp_path / "whole", [TEXT], "b1", **OPTIONS)

    class Killed(Exception):
        pass

    def kill(progress: CalibrationProgress) -> None:
        raise Killed

    with pytest.raises(Killed):
        compress_calibrated(source, tmp_path / "cut", [TEXT], "b1", calibration_progress=kill, **OPTIONS)
    assert (tmp_path / "cut.calibration").is_dir()
    seen: list[str] = []
    compress_calibrated(
        source,
        tmp_path / "cut",
        [TEXT],
        "b1",
        resume=True,
        calibration_progress=lambda step: seen.append(step.name),
        **OPTIONS,
    )
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    again = compress_calibrated(source, tmp_path / "cut", [TEXT], "b1", resume=True, **OPTIONS)
    assert again["calibration"]["linears"]


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
    code = main([*command[:2], str(tmp_path / "other"), *command[3:], "--calibration", str(tmp_path / "packed")])
    assert code != 0
    assert "expected text files" in capsys.readouterr().out


def test_texts_of_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_texts([tmp_path, tmp_path / "b.txt"]) == ["first", "second", "second"]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"c\.txt: expected UTF-8"):
        read_texts([tmp_path])
