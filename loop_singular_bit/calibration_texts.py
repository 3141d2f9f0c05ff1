"""Texts to calibrate with: files, directories, and data sets of the Hugging Face Hub or of the same formats on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_DATA_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DEFAULT_SPLIT = "train"
_DEFAULT_COLUMN = "text"
_DEFAULT_CHARACTERS = 1 << 20


def read_texts(names: Sequence[str | os.PathLike[str]], *, max_characters: int = _DEFAULT_CHARACTERS) -> list[str]:
    """The texts that the names stand for, in their order.

    A name is one of
    - a UTF-8 text file;
    - a directory: all its *.txt, by name; without any, a data set on disk;
    - a data set on disk (*.jsonl, *.json, *.parquet, *.csv, *.arrow, or a directory of them) or on the Hugging Face
      Hub, as `NAME[:CONFIG[:SPLIT[:COLUMN]]]`; parts may be left empty. The split is "train" and the column "text"
      unless said otherwise; a data set with one column of strings needs no COLUMN. Its rows become one text, blank
      lines between them.

    Data sets are read with the library `datasets`, row by row, and no further than max_characters: of a large one on
    the Hub only the beginning is downloaded.

    Args:
        max_characters: of each data set; text files are read whole.

    Raises:
        ValueError: a directory with neither text nor data, a file that is not UTF-8, a configuration, split or column
            that does not exist, or a data set without text.
        OSError: a file cannot be read, or there is no such file and the Hub does not have, or does not answer for, a
            data set of that name.
        ImportError: `datasets` is needed and missing.
    """
    texts: list[str] = []
    for given in names:
        name, path = os.fspath(given), Path(given)
        if path.is_dir():
            files = sorted(path.glob("**/*.txt"))
            texts += [_read_file(file) for file in files] or [_read_directory(name, max_characters)]
        elif path.suffix in _DATA_SUFFIXES and path.is_file():
            texts.append(_read_data_set(name, name, _Parts(), max_characters))
        elif path.exists():
            texts.append(_read_file(path))
        else:
            texts.append(_read_named(name, max_characters))
    return texts


class _Parts:
    """What follows the name of a data set: configuration, split and column."""

    def __init__(self, parts: Sequence[str] = ()) -> None:
        config, split, column = [*parts, "", "", ""][:3]
        self.config = config or None
        self.split = split or _DEFAULT_SPLIT
        self.column = column or None


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def _read_directory(name: str, max_characters: int) -> str:
    if not any(file.suffix in _DATA_SUFFIXES for file in Path(name).glob("**/*")):
        suffixes = ", ".join(f"*{suffix}" for suffix in _DATA_SUFFIXES)
        raise ValueError(f"{name}: expected text files (*.txt) or data ({suffixes}) in the directory, found none")
    return _read_data_set(name, name, _Parts(), max_characters)


def _read_named(name: str, max_characters: int) -> str:
    """A data set with parts after its name, or one of the Hub."""
    base, *parts = name.split(":")
    if len(parts) > 3:
        raise ValueError(f"{name}: expected NAME[:CONFIG[:SPLIT[:COLUMN]]], got {len(parts)} parts after the name")
    if not Path(base).exists() and (not _HUB_NAME.fullmatch(base) or Path(base).suffix in {".txt", *_DATA_SUFFIXES}):
        raise FileNotFoundError(f"{name}: no such file or directory, and no name of a data set")
    return _read_data_set(name, base, _Parts(parts), max_characters)


def _read_data_set(name: str, base: str, parts: _Parts, max_characters: int) -> str:
    on_disk = Path(base).exists()
    try:
        import datasets
    except ImportError as error:
        what = "data" if on_disk else "no file or directory; a data set of the Hugging Face Hub"
        raise ImportError(f"{name}: {what} needs: pip install 'loop-singular-bit[datasets]'") from error
    options: dict[str, Any] = {"split": parts.split, "streaming": True}
    try:
        if Path(base).is_file():
            rows = datasets.load_dataset(_DATA_SUFFIXES[Path(base).suffix], parts.config, data_files=base, **options)
        else:
            rows = datasets.load_dataset(base, parts.config, **options)
        return _join_rows(name, rows, parts.column, max_characters)
    except _NoText:
        raise
    except ValueError as error:  # a configuration or split that does not exist: the message lists the choices
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        reason = "" if on_disk else "no such file or directory, and the Hugging Face Hub says: "
        raise OSError(f"{name}: {reason}{type(error).__name__}: {error}") from error


class _NoText(ValueError):
    """A data set that can be read and has nothing to read."""


def _join_rows(name: str, rows: Iterable[Mapping[str, Any]], column: str | None, max_characters: int) -> str:
    pieces: list[str] = []
    characters = 0
    for row in rows:
        if column is None:
            column = _text_column(name, row)
        value = row.get(column)
        if not isinstance(value, str):
            raise _NoText(
                f"{name}: expected strings in column {column!r}, got {type(value).__name__}; columns: {', '.join(row)}"
            )
        pieces.append(value)
        characters += len(value) + 2
        if characters >= max_characters:
            break
    if not any(piece.strip() for piece in pieces):
        raise _NoText(f"{name}: no text in {len(pieces)} rows")
    return "\n\n".join(pieces)


def _text_column(name: str, row: Mapping[str, Any]) -> str:
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if _DEFAULT_COLUMN in strings:
        return _DEFAULT_COLUMN
    if len(strings) != 1:
        raise _NoText(
            f"{name}: which column is the text? say NAME:CONFIG:SPLIT:COLUMN; "
            f"columns with strings: {', '.join(strings) or 'none'}"
        )
    return strings[0]
