"""Disks that read short, report errors, or end early: no wrong text, no crash, and the file is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loop_singular_bit import LoopCompressor
from loop_singular_bit.cli import EXIT_FAILURE

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
from loop_singular_bit.streaming import load_compressed_model

tokens, errors = [], []
for attempt in range(2):
    try:
        manager = load_compressed_model(sys.argv[1], back_end=sys.argv[2])
        break
    except OSError as error:
        errors.append(str(error))
for attempt in range(2):
    tokens.append([])
    try:
        for token in manager.generate_tokens([5, 6, 7], 6):
            tokens[-1].append(token)
    except OSError as error:
        errors.append(str(error))
print(json.dumps([tokens, errors]))
"""


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("books") / "books-b2"
    LoopCompressor(target_ram_mb=None).compress_model(ROOT / "examples" / "books-llama-7m", directory)
    return directory


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes reads fail when it is preloaded."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(ROOT / "tests" / "failing_disk.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the library does not compile here: {done.stderr}")
    return library


def environment(disk: Path, fault: str, after: int) -> dict[str, str]:
    return {**os.environ, "LD_PRELOAD": str(disk), "FAULT": fault, "FAULT_AFTER": str(after)}


def run(books: Path, disk: Path, back_end: str, fault: str, after: int) -> tuple[list[list[int]], list[str]]:
    """The tokens of two generations and the errors that came, on opening or while generating."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(books), back_end],
        capture_output=True,
        text=True,
        env=environment(disk, fault, after),
    )
    assert done.returncode == 0, done.stderr
    tokens, errors = json.loads(done.stdout)
    return tokens, errors


@pytest.fixture(scope="module")
def expected(books: Path, disk: Path) -> list[int]:
    (first, second), errors = run(books, disk, "resident", "none", 0)
    assert first == second and len(first) == 6 and not errors
    return first


@pytest.mark.parametrize("back_end", ["resident", "direct"])
@pytest.mark.parametrize("fault", ["short", "eintr"])
def test_reads_that_are_incomplete_are_completed(
    books: Path, disk: Path, expected: list[int], back_end: str, fault: str
) -> None:
    assert run(books, disk, back_end, fault, 0) == ([expected, expected], [])


# Some 35 reads open the file, some 60 are a pass over the weights.
@pytest.mark.parametrize(
    ("back_end", "after"),
    [("resident", 40), ("direct", 0), ("direct", 40), ("direct", 200), ("mmap", 60), ("mmap", 200)],
)
def test_a_read_that_fails_stops_generation_and_the_next_one_is_right(
    books: Path, disk: Path, expected: list[int], back_end: str, after: int
) -> None:
    (first, second), errors = run(books, disk, back_end, "eio", after)
    assert len(errors) == 1
    assert "model.safetensors: reading" in errors[0]
    assert ("Bad address" if back_end == "mmap" else "Input/output error") in errors[0]
    # What came before the fault is right, and so is everything after it.
    assert first == expected[: len(first)]
    assert second == expected


@pytest.mark.parametrize("after", [60, 150])
def test_a_file_that_ends_early_stops_generation(books: Path, disk: Path, expected: list[int], after: int) -> None:
    (first, second), errors = run(books, disk, "direct", "eof", after)
    assert len(errors) == 2
    assert all("model.safetensors: ends before byte" in error for error in errors)
    assert first == expected[: len(first)] != expected and second == []


def test_the_command_line_says_what_failed(books: Path, disk: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loop_singular_bit", "generate", str(books), "--prompt", "The old sailor"),
            *("--back-end", "direct", "--max-new-tokens", "20"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(disk, "eio", 300),
    )
    assert done.returncode == EXIT_FAILURE
    assert done.stdout.startswith("The old sailor")
    assert "model.safetensors: reading" in done.stderr and "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_missing_or_short_is_refused_on_opening(books: Path, tmp_path: Path) -> None:
    from loop_singular_bit.errors import CheckpointError
    from loop_singular_bit.streaming import load_compressed_model

    directory = tmp_path / "copy"
    shutil.copytree(books, directory)
    size = (directory / "model.safetensors").stat().st_size
    for cut in (size - 1, size // 2, 1000, 7, 0):
        os.truncate(directory / "model.safetensors", cut)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            load_compressed_model(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError), match=r"model\.safetensors: cannot be opened"):
        load_compressed_model(directory)
