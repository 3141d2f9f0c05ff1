"""The commands on the native runtime: run-plan, chat, generate --engine native, as processes with a budget."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
        *("generate", books, "--engine", "native", "--prompt", PROMPT, "--max-new-tokens", "60", "--json"),
        *("--target-ram-mb", "60", "--back-end", back_end),
    )
    assert done.returncode == EXIT_OK, done.stderr
    result = json.loads(done.stdout)
    assert result["peak_resident_mb"] < 60
    assert result["plan"]["back_end"] == back_end
    assert result["new_tokens"] == 60 and result["text"]


def test_a_budget_that_cannot_be_met_has_its_own_exit_code(books: str) -> None:
    done = run("generate", books, "--engine", "native", "--prompt", PROMPT, "--target-ram-mb", "10")
    assert done.returncode == EXIT_MEMORY_BUDGET
    assert "a budget of 10.0 MB cannot be met" in done.stderr


def test_both_engines_write_the_same(books: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["generate", books, "--prompt", PROMPT, "--max-new-tokens", "30", "--activation-precision", "exact"]
    texts = []
    for extra in (["--dtype", "float32"], ["--engine", "native", "--cache-type", "float32"]):
        assert main([*arguments, "--json", *extra]) == EXIT_OK
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]


def test_generate_prints_text_and_figures(books: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", books, "--engine", "native", "--prompt", PROMPT, "--max-new-tokens", "5"]) == EXIT_OK
    captured = capsys.readouterr()
    assert captured.out.startswith(PROMPT)
    assert "5 written" in captured.err and "tokens/s" in captured.err and "peak resident memory" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "native", "--dtype", "float32"], "--dtype: the native engine"),
        (["--top-k", "3"], "--top-k: needs --engine native"),
        (["--stop", "x"], "--stop: needs --engine native"),
        (["--target-ram-mb", "100"], "--target-ram-mb: needs --engine native"),
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


def test_chat_needs_a_chat_template(books: str) -> None:
    done = run("chat", books, input="Hello\n")
    assert done.returncode == EXIT_USAGE
    assert "has no chat template" in done.stderr


def test_control_c_stops_cleanly_and_reports(books: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", books, "--engine", "native", "--prompt", PROMPT, "--max-new-tokens", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    # Some text has come: the model is running.
    start = process.stdout.read(len(PROMPT) + 3)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    if process.returncode == EXIT_OK:
        pytest.skip("the text was complete before the signal came")
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert (start + rest).startswith(PROMPT)
    assert "interrupted" in errors and "peak resident memory" in errors
    assert "Traceback" not in errors
