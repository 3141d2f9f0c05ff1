"""Texts to calibrate with: files, directories, data sets on disk, and data sets of the Hub through a stub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loop_singular_bit.calibration_texts import read_texts


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_texts([tmp_path, tmp_path / "b.txt"]) == ["first", "second", "second"]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"c\.txt: expected UTF-8"):
        read_texts([tmp_path])


def test_what_does_not_exist(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "book.txt", "a/b/c", "rows.jsonl", "../org/name"):
        with pytest.raises(FileNotFoundError, match="no such file or directory, and no name of a data set"):
            read_texts([name])
    with pytest.raises(ValueError, match=r"expected NAME\[:CONFIG\[:SPLIT\[:COLUMN\]\]\], got 4 parts"):
        read_texts(["org/name:a:b:c:d"])
    with pytest.raises(ValueError, match=r"expected text files \(\*.txt\) or data"):
        read_texts([tmp_path])


def test_data_sets_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"org/name: no file or directory; .* needs: pip install 'loop-singular-bit"):
        read_texts(["org/name"])


class TestOnDisk:
    @pytest.fixture(autouse=True)
    def library(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def test_json_lines(self, tmp_path: Path) -> None:
        rows = write_rows(tmp_path / "rows.jsonl", [{"text": "one", "id": 1}, {"text": "two", "id": 2}])
        assert read_texts([rows]) == ["one\n\ntwo"]
        assert read_texts([rows], max_characters=3) == ["one"]
        with pytest.raises(ValueError, match=r"expected strings in column 'id', got int; columns: text, id"):
            read_texts([f"{rows}:::id"])

    def test_directory_with_splits(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train.jsonl", [{"body": "one"}])
        write_rows(tmp_path / "validation.jsonl", [{"body": "two"}, {"body": "three"}])
        assert read_texts([tmp_path, f"{tmp_path}::validation"]) == ["one", "two\n\nthree"]
        with pytest.raises(ValueError, match=r"Bad split: nowhere.*train"):
            read_texts([f"{tmp_path}::nowhere"])

    def test_columns(self, tmp_path: Path) -> None:
        rows = write_rows(tmp_path / "rows.jsonl", [{"question": "one", "answer": "two", "n": 1}])
        with pytest.raises(ValueError, match=r"which column is the text.*columns with strings: question, answer"):
            read_texts([rows])
        assert read_texts([f"{rows}:::answer"]) == ["two"]
        empty = write_rows(tmp_path / "empty.jsonl", [{"text": " "}])
        with pytest.raises(ValueError, match="no text in 1 rows"):
            read_texts([empty])


class TestOnTheHub:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("datasets")

    def test_reads_no_more_than_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []

        def rows() -> Iterator[dict[str, str]]:
            for number in range(1_000_000):
                calls.append(number)
                yield {"text": f"row {number}"}

        def load(*arguments: Any, **options: Any) -> Iterator[dict[str, str]]:
            calls.append((arguments, options))
            return rows()

        monkeypatch.setattr("datasets.load_dataset", load)
        assert read_texts(["org/name:small:test"], max_characters=20) == ["row 0\n\nrow 1\n\nrow 2"]
        assert calls == [(("org/name", "small"), {"split": "test", "streaming": True}), 0, 1, 2]
        calls.clear()
        read_texts(["name"], max_characters=1)
        assert calls[0] == (("name", None), {"split": "train", "streaming": True})

    def test_what_goes_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(error: Exception) -> None:
            def load(*_: Any, **__: Any) -> None:
                raise error

            monkeypatch.setattr("datasets.load_dataset", load)

        fail(ConnectionError("Couldn't reach 'org/name' on the Hub"))
        with pytest.raises(OSError, match=r"org/name: no such file or directory, and the Hugging Face Hub says: Conn"):
            read_texts(["org/name"])
        fail(ValueError("Config name is missing. Please pick one among the available configs: ['a', 'b']"))
        with pytest.raises(ValueError, match=r"org/name: Config name is missing\. .*'a', 'b'"):
            read_texts(["org/name"])
