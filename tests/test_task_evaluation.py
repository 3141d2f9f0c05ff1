"""Tasks of lm-evaluation-harness that lie on disk, on packed and on ordinary models; nothing is downloaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop_singular_bit import LoopCompressor
from loop_singular_bit.cli import EXIT_OK, EXIT_USAGE, main

transformers = pytest.importorskip("transformers")
from tiny_models import write_tiny_checkpoint  # noqa: E402

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'loop-singular-bit[eval]'")

# b1 and b2 without calibration are what is wanted here: models that are damaged.
pytestmark = pytest.mark.filterwarnings("ignore::loop_singular_bit.quantization.presets.UncalibratedWarning")

BOOKS = Path(__file__).parents[1] / "examples" / "books-llama-7m"

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

QUESTIONS = [
    ("The old man sat down in his", ["chair", "of", "whom"], 0),
    ("She opened the door and", ["seven", "went"], 1),
    ("He said that he", ["would", "table"], 0),
    ("In the middle of the", ["went", "night"], 1),
    ("They looked at each", ["other", "said"], 0),
    ("I do not", ["know", "chair"], 0),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny random model with the tokenizer of the bundled one, the same model packed, and two tasks."""
    base = tmp_path_factory.mktemp("tasks")
    write_tiny_checkpoint(base / "original")
    LoopCompressor(preset="b2", target_ram_mb=None).compress_model(base / "original", base / "packed")
    tasks = base / "definitions"
    tasks.mkdir()
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer})
        for question, choices, answer in QUESTIONS
    ]
    (tasks / "next_word.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tasks / "next_word.yaml").write_text(CHOICES.format(name="next_word", data=tasks / "next_word.jsonl"))
    return SimpleNamespace(original=str(base / "original"), packed=str(base / "packed"), tasks=str(tasks))


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a task reads is on disk; an attempt to reach the Hub fails."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == EXIT_OK
    return json.loads(capsys.readouterr().out)


def accuracy(directory: str, questions: list[tuple[str, list[str], int]]) -> float:
    """Share of questions whose answer has the highest log-probability, computed without the harness."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    right = 0
    for question, choices, answer in questions:
        start = tokenizer(question)["input_ids"]
        scores = []
        for choice in choices:
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            with torch.no_grad():
                log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        right += scores.index(max(scores)) == answer
    return right / len(questions)


def test_packed_against_original(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_json(
        capsys,
        *("evaluate", directories.packed, "--against", directories.original),
        *("--tasks", "next_word", "--include-path", directories.tasks),
    )
    metric = results["tasks"]["next_word"]["acc"]
    assert metric["value"] == pytest.approx(accuracy(directories.packed, QUESTIONS))
    assert metric["original"] == pytest.approx(accuracy(directories.original, QUESTIONS))
    assert metric["difference"] == pytest.approx(metric["value"] - metric["original"])
    share = metric["value"]
    assert metric["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))
    assert metric["higher_is_better"] is True
    assert results["num_questions"] == {"next_word": len(QUESTIONS)}
    assert results["harness_version"].startswith("0.4.")
    assert "perplexity" not in results


def test_plain_model_with_text_and_a_limit(
    directories: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the old man sat down in his chair.", encoding="utf-8")
    arguments = [
        *("evaluate", directories.original, "--tasks", "next_word", "--include-path", directories.tasks),
        *("--limit", "4", "--batch-size", "2", "--text", str(text), "--window", "32"),
    ]
    results = run_json(capsys, *arguments)
    assert results["tasks"]["next_word"]["acc"]["value"] == pytest.approx(accuracy(directories.original, QUESTIONS[:4]))
    assert "original" not in results["tasks"]["next_word"]["acc"]
    assert results["num_questions"] == {"next_word": 4}
    assert results["perplexity"] > 1
    assert main(arguments) == EXIT_OK
    printed = capsys.readouterr().out
    assert "next_word" in printed and "acc" in printed and "perplexity" in printed


def test_what_is_wrong_is_named(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", directories.packed, "--tasks", "next_word", "--include-path"]
    assert main([*arguments, "/nowhere"]) == EXIT_USAGE
    assert "/nowhere" in capsys.readouterr().err
    assert main(["evaluate", directories.packed]) == EXIT_USAGE
    assert "--tasks" in capsys.readouterr().err
    assert main([*arguments, directories.tasks, "--quality-threshold", "1"]) == EXIT_USAGE
    assert "--against" in capsys.readouterr().err


@pytest.mark.slow
def test_unknown_tasks_are_refused(directories: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", directories.packed, "--tasks", "next_sentence", "--include-path", directories.tasks]
    assert main(arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "'next_sentence'" in error and directories.tasks in error
