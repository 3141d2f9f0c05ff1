"""`compress --calibration`: lower output errors, the same bytes again, resumable, on the command line."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loop_singular_bit import LoopCompressor
from loop_singular_bit.calibrated_compression import Calibration, CalibrationStep, compress_calibrated
from loop_singular_bit.cli import main
from loop_singular_bit.errors import CheckpointError, OutputExistsError
from loop_singular_bit.quantization.tuning import TuningOptions

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import tiny_encoder, tiny_language_model

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "examples/text/calibration/e-nesbit_the-railway-children.txt").read_text(encoding="utf-8")[:20_000]
CALIBRATION = Calibration(window=64, max_windows=8, rounds=2)
UNIFORM = replace(CALIBRATION, adaptive_precision=False)


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
    results = compress_calibrated(source, tmp_path / "one", [TEXT], "b2", UNIFORM)
    linears = results["calibration"]["linears"]
    assert len(linears) == 14
    assert all(linear["output_error"] < linear["output_error_before"] for linear in linears)
    assert results["calibration"]["tokens"] == 8 * 64
    report = json.loads((tmp_path / "one" / "compression_report.json").read_text())
    assert report["calibration"] == results["calibration"]
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "2 rounds" in config["quantization_config"]["options"]["calibration"]
    assert not (tmp_path / "one.calibration").exists()
    compress_calibrated(source, tmp_path / "two", [TEXT], "b2", UNIFORM, threads=1)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    compress_calibrated(source, tmp_path / "three", [TEXT[::-1]], "b2", UNIFORM)
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
    assert len({linear["planes"] for linear in linears.values()}) > 1
    tuned = replace(CALIBRATION, tuning=TuningOptions(steps=1))
    with pytest.raises(ValueError, match="tuning needs a causal language model, got BertModel"):
        compress_calibrated(tmp_path / "source", tmp_path / "tuned", [TEXT], "b3", tuned)


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
    assert main([*other, "--calibration", str(tmp_path / "nowhere.txt")]) == 1
    assert "no such file or directory" in capsys.readouterr().out
    (text / "book.txt").write_text("too short")
    assert main([*other, "--calibration", str(text)]) == 2
    assert "do not fill one window" in capsys.readouterr().out
    assert not list(tmp_path.glob("other*"))
    for option in (["--tune", "scales"], ["--no-error-compensation"]):
        assert main([*other, *option]) == 2
        assert "--tune and --no-error-compensation need --calibration" in capsys.readouterr().out


def options_of(results: dict[str, Any]) -> tuple[float, set[int], list[float]]:
    """Bits per weight of the linears, their planes, their output errors."""
    linears = results["calibration"]["linears"]
    return (
        results["compression_summary"]["bits_per_weight_linears"],
        {linear["planes"] for linear in linears},
        [linear["output_error"] for linear in linears],
    )


def test_calibration_alone_mixes_layouts_within_the_bits_of_the_preset(source: Path, tmp_path: Path) -> None:
    uniform = options_of(compress_calibrated(source, tmp_path / "uniform", [TEXT], "b2", UNIFORM))
    mixed = options_of(compress_calibrated(source, tmp_path / "mixed", [TEXT], "b2", CALIBRATION))
    assert uniform[1] == {2}
    assert len(mixed[1]) > 1
    assert 0.9 * uniform[0] < mixed[0] <= uniform[0]


def test_the_knobs_of_the_compressor_reach_the_calibration(source: Path, tmp_path: Path) -> None:
    def compress(name: str, **options: Any) -> tuple[dict[str, Any], LoopCompressor]:
        compressor = LoopCompressor(**options)
        results = compressor.compress_model(source, tmp_path / name, calibration_texts=[TEXT], calibration=CALIBRATION)
        return results, compressor

    compensated = options_of(compress("uniform", adaptive_precision=False)[0])
    weighted = options_of(compress("weighted", adaptive_precision=False, error_compensation=False)[0])
    assert compensated[0] == weighted[0] and compensated[1] == weighted[1] == {2}
    assert all(error < other for error, other in zip(compensated[2], weighted[2], strict=True))

    results, compressor = compress("sized", target_storage_gb=305e-6)
    stored = sum(path.stat().st_size for path in (tmp_path / "sized").glob("*.safetensors"))
    assert 0.98 * 305_000 < stored <= 305_000
    assert results["compression_summary"]["output_bytes"] == stored
    assert compressor.validate_compression()["storage"]["status"] == "pass"
    assert compressor.validate_compression()["ram"]["status"] == "not evaluated"
    assert options_of(compress("bits", target_bits=3.0)[0])[0] <= 3.0
    with pytest.raises(ValueError, match=r"cannot be met: 0\.\d+ GB is the least, with linears at 2\.\d+ bits"):
        compress("small", target_storage_gb=1e-4)
    assert not list(tmp_path.glob("small*"))
    with pytest.raises(ValueError, match="acts through adaptive_precision, which is off"):
        replace(UNIFORM, target_bits=3.0)


def test_hidden_states_are_spooled_beside_the_output(source: Path, tmp_path: Path) -> None:
    compress_calibrated(source, tmp_path / "memory", [TEXT], "b2", UNIFORM)
    compress_calibrated(source, tmp_path / "file", [TEXT], "b2", replace(UNIFORM, activation_mb=0))
    assert files(tmp_path / "memory") == files(tmp_path / "file")


def test_what_an_interrupted_calibration_left_is_not_mixed_up(source: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(_: CalibrationStep) -> None:
        raise Killed

    def compress(text: str = TEXT, **options: Any) -> None:
        compress_calibrated(source, tmp_path / "cut", [text], "b2", UNIFORM, **options)

    with pytest.raises(Killed):
        compress(calibration_progress=kill)
    with pytest.raises(OutputExistsError, match=r"left by a calibration that did not finish.*--resume.*--overwrite"):
        compress()
    with pytest.raises(OutputExistsError, match="was started with another source, text or options"):
        compress(TEXT[::-1], resume=True)
    with pytest.raises(Killed):
        compress(TEXT[::-1], overwrite=True, calibration_progress=kill)
    compress(TEXT[::-1], resume=True)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        compress()


def test_weights_that_are_not_finite_are_named_before_the_pass(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    tensors = safetensors.torch.load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    safetensors.torch.save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight: .* nan at \[3, 4\]"):
        compress_calibrated(bad, tmp_path / "packed", [TEXT], "b2", UNIFORM)
    assert not list(tmp_path.glob("packed*"))


def test_a_full_disk_is_an_error_of_the_system_and_can_be_resumed(source: Path, tmp_path: Path) -> None:
    """Only a limit of the size of files can be had without privileges; torch reports it as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cut\.calibration: cannot be written"):
            compress_calibrated(source, tmp_path / "cut", [TEXT], "b2", UNIFORM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    compress_calibrated(source, tmp_path / "cut", [TEXT], "b2", UNIFORM, resume=True)
    compress_calibrated(source, tmp_path / "whole", [TEXT], "b2", UNIFORM)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.slow
def test_a_killed_process_resumes_with_the_same_bytes_and_figures(source: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of statistics, of measurements and of packing."""
    text = tmp_path / "book.txt"
    text.write_text(TEXT, encoding="utf-8")
    command = [sys.executable, "-m", "loop_singular_bit", "compress", str(source), "--quiet", "--resume"]
    command += ["--calibration", str(text), "--calibration-window", "64", "--calibration-windows", "24"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    assert whole.returncode == 0
    for stage in ("*.pt", "candidates.jsonl", "linears.jsonl"):
        process = subprocess.Popen([*command, str(tmp_path / "cut")], cwd=ROOT)
        before = state(tmp_path, stage)
        while process.poll() is None and state(tmp_path, stage) == before:
            time.sleep(0.002)
        assert process.poll() is None, "ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run([*command, str(tmp_path / "cut")], cwd=ROOT, check=True)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    whole_figures, cut_figures = (
        json.loads((tmp_path / name / "compression_report.json").read_text())["calibration"]
        for name in ("whole", "cut")
    )
    assert whole_figures == cut_figures


def state(directory: Path, pattern: str) -> list[tuple[str, int]]:
    """Files of an unfinished calibration, and their sizes."""
    found = []
    for path in sorted((directory / "cut.calibration").glob(pattern)):
        try:
            found.append((path.name, path.stat().st_size))
        except FileNotFoundError:
            continue
    return found
