"""The commands that run models: run-plan, chat, generate; which engine they take, and the budget of the process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loop_singular_bit import LoopCompressor
from loop_singular_bit.cli import EXIT_BAD_CHECKPOINT, EXIT_INTERRUPTED, EXIT_MEMORY_BUDGET, EXIT_OK, EXIT_USAGE, main

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "loop_singular_bit"]
PROMPT = "The old sailor looked at the"
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("books") / "books-b4"
    LoopCompressor(preset="b4", target_ram_mb=None).compress_model(ROOT / "examples" / "books-llama-7m", directory)
    return str(directory)


@pytest.fixture(scope="module")
def gelu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A packed model of a kind that the native runtime does not run: its activation is another."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("gelu")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, hidden_act="gelu", bos_token_id=0, eos_token_id=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / "original")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "books-llama-7m" / name, directory / "original")
    path = directory / "original" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    LoopCompressor(preset="b4", target_ram_mb=None).compress_model(directory / "original", directory / "packed")
    return str(directory / "packed")


@pytest.fixture
def chat_model(books: str, tmp_path: Path) -> str:
    shutil.copytree(books, tmp_path / "chat")
    path = tmp_path / "chat" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    return str(tmp_path / "chat")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("back_end", ["resident", "direct"])
def test_generate_stays_within_its_budget(books: str, back_end: str) -> None:
    done = run(
        *("generate", books, "--prompt", PROMPT, "--max-new-tokens", "60", "--json"),
        *("--target-ram-mb", "60", "--back-end", back_end),
    )
    assert done.returncode == EXIT_OK, done.stderr
    result = json.loads(done.stdout)
    assert result["peak_resident_mb"] < 60
    assert result["engine"] == "native" and result["plan"]["back_end"] == back_end
    assert result["new_tokens"] == 60 and result["text"]


def test_a_budget_that_cannot_be_met_has_its_own_exit_code(books: str) -> None:
    done = run("generate", books, "--prompt", PROMPT, "--target-ram-mb", "10")
    assert done.returncode == EXIT_MEMORY_BUDGET
    assert "a budget of 10.0 MB cannot be met" in done.stderr


def test_both_engines_write_the_same(books: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["generate", books, "--prompt", PROMPT, "--max-new-tokens", "30", "--activation-precision", "exact"]
    texts = []
    for engine, extra in (("transformers", ["--dtype", "float32"]), ("native", ["--cache-type", "float32"])):
        assert main([*arguments, "--json", "--engine", engine, *extra]) == EXIT_OK
        result = json.loads(capsys.readouterr().out)
        assert result["engine"] == engine and result["new_tokens"] == 30
        texts.append(result["text"])
    assert texts[0] == texts[1]


def test_what_the_native_engine_does_not_run_goes_to_transformers_with_a_reason(
    books: str, gelu: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    original = str(ROOT / "examples" / "books-llama-7m")
    no_tokenizer = tmp_path / "copy"
    shutil.copytree(books, no_tokenizer)
    (no_tokenizer / "tokenizer.json").unlink()
    for model, extra, reason in (
        (original, [], "is not a packed checkpoint"),
        (gelu, [], 'hidden_act: expected silu, got "gelu"'),
        (books, ["--dtype", "float32"], "--dtype was given"),
    ):
        assert main(["generate", model, "--prompt", PROMPT, "--max-new-tokens", "3", *extra]) == EXIT_OK
        captured = capsys.readouterr()
        assert captured.err.count("using Transformers: ") == 1 and reason in captured.err
        assert "3 written" in captured.err and captured.out.startswith(PROMPT)
        budget = ["generate", model, "--prompt", PROMPT, *extra, "--target-ram-mb", "900"]
        assert main(budget) == EXIT_USAGE
        errors = capsys.readouterr().err
        assert "--target-ram-mb: needs the native engine" in errors and reason in errors
    assert main(["generate", str(no_tokenizer), "--prompt", PROMPT]) == EXIT_BAD_CHECKPOINT
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert main(["generate", gelu, "--prompt", PROMPT, "--engine", "native"]) == EXIT_BAD_CHECKPOINT
    assert main(["generate", str(tmp_path / "none"), "--prompt", PROMPT]) == EXIT_BAD_CHECKPOINT


def test_stop_and_top_k_work_with_transformers_too(books: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", books, "--engine", "transformers", "--prompt", PROMPT, "--json", "--max-new-tokens", "12"]

    def text(*extra: str) -> str:
        assert main([*arguments, *extra]) == EXIT_OK
        result: str = json.loads(capsys.readouterr().out)["text"]
        return result

    whole = text()
    assert text("--stop", whole[8:14]) == whole[: whole.index(whole[8:14])]
    assert text("--temperature", "0.9", "--top-k", "1") == whole


def test_generate_prints_text_and_figures(books: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", books, "--prompt", PROMPT, "--max-new-tokens", "5"]) == EXIT_OK
    captured = capsys.readouterr()
    assert captured.out.startswith(PROMPT)
    assert "5 written" in captured.err and "tokens/s" in captured.err and "peak resident memory" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "native", "--dtype", "float32"], "--dtype: the native engine"),
        (["--engine", "transformers", "--target-ram-mb", "100"], "--target-ram-mb: needs the native engine"),
        (["--engine", "transformers", "--no-prefetch"], "--no-prefetch: needs the native engine"),
        (["--top-k", "-1"], "--top-k: expected at least 0"),
    ],
)
def test_options_that_the_engine_does_not_read_are_refused(
    books: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", books, "--prompt", PROMPT, *arguments]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_run_plan_has_a_line_per_consumer(books: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run-plan", books, "--context-length", "300", "--back-end", "direct", "--max-layers-in-ram", "2"]
    assert main([*arguments, "--json"]) == EXIT_OK
    plan = json.loads(capsys.readouterr().out)
    assert plan["context"] == 300 and plan["back_end"] == "direct"
    assert sum(line["bytes"] for line in plan["lines"]) == plan["total_bytes"]
    assert main([*arguments, "--cache-type", "int8", "--no-prefetch", "--threads", "1"]) == EXIT_OK
    text = capsys.readouterr().out
    for part in ("process before", "keys and values of 300 tokens", "weights, 1 buffer", "in all", "1 threads"):
        assert part in text
    assert main(["run-plan", books, "--target-ram-mb", "3"]) == EXIT_MEMORY_BUDGET
    assert main(["run-plan", str(ROOT / "examples" / "books-llama-7m")]) == EXIT_BAD_CHECKPOINT


def test_chat_answers_each_message(chat_model: str) -> None:
    done = run(
        *("chat", chat_model, "--max-new-tokens", "8", "--temperature", "0", "--system", "Be brief."),
        input="Hello there\nWhat did the sailor say?\n\n",
    )
    assert done.returncode == EXIT_OK, done.stderr
    assert done.stderr.count("written") == 2
    assert done.stdout.strip()


def test_chat_with_transformers(gelu: str) -> None:
    done = run("chat", gelu, "--max-new-tokens", "4", "--temperature", "0", input="Hello there\nAnd you?\n\n")
    assert done.returncode == EXIT_OK, done.stderr
    assert "using Transformers: " in done.stderr and done.stderr.count("written") == 2


def test_chat_needs_a_chat_template(books: str) -> None:
    done = run("chat", books, input="Hello\n")
    assert done.returncode == EXIT_USAGE
    assert "has no chat template" in done.stderr


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_control_c_stops_cleanly_and_reports(books: str, engine: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", books, "--engine", engine, "--prompt", PROMPT, "--max-new-tokens", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # A shell starts its background jobs with SIGINT ignored, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        # Slow enough for a signal to come in the middle.
        env={**os.environ, **({"LOOP_SINGULAR_BIT_ISA": "scalar"} if engine == "native" else {})},
    )
    assert process.stdout is not None
    # Some text has come: the model is running.
    start = process.stdout.read(len(PROMPT) + 30)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert (start + rest).startswith(PROMPT)
    assert "interrupted" in errors and "tokens/s" in errors and "peak resident memory" in errors
    assert "Traceback" not in errors
