"""A Hugging Face checkpoint on disk: its shards, its configuration, the files that go along with it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import CheckpointError
from .safetensors_stream import SafetensorsReader, TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 100_000_000

# Read by tokenizers, processors, generation and Sentence Transformers. Code is not copied: nothing here needs it.
_COMPANION_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "modules.json",
    "sentence_*config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "LICENSE*",
    "NOTICE*",
)


class CheckpointDirectory:
    """The tensors of a directory with `model.safetensors` or with shards and their index, and its `config.json`.

    Raises:
        CheckpointError: something is missing, damaged, or points outside of the directory; names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: expected a directory with config.json and safetensors files")
        self.config = read_json_object(self.path / CONFIG_FILE)
        self._readers: dict[str, SafetensorsReader] = {}
        self._shard_of: dict[str, str] = {}
        try:
            for tensor, shard in self._locate():
                self._shard_of[tensor] = shard
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    @property
    def tensor_names(self) -> list[str]:
        return list(self._shard_of)

    @property
    def file_bytes(self) -> int:
        """Bytes of the shards."""
        return sum(self.shard_bytes().values())

    def shard_bytes(self) -> dict[str, int]:
        """File name of each shard to its size."""
        return {name: reader.file_bytes for name, reader in self._readers.items()}

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._shard_of

    def reader(self, tensor: str) -> SafetensorsReader:
        """The shard that holds a tensor."""
        if tensor not in self._shard_of:
            raise CheckpointError(f"{self.path}: tensor {tensor} is missing")
        return self._readers[self._shard_of[tensor]]

    def entry(self, tensor: str) -> TensorEntry:
        return self.reader(tensor).entry(tensor)

    def identity(self) -> list[list[Any]]:
        """Name, size and time of change of each shard, and the SHA-256 of config.json: another source differs."""
        shards: list[list[Any]] = []
        for name in sorted(self._readers):
            status = (self.path / name).stat()
            shards.append([name, status.st_size, status.st_mtime_ns])
        config = (self.path / CONFIG_FILE).read_bytes()
        return [*shards, [CONFIG_FILE, len(config), hashlib.sha256(config).hexdigest()]]

    def companion_files(self) -> list[Path]:
        """Paths, relative to the directory, of the files that a packed checkpoint takes along unchanged."""
        candidates = [path for path in self.path.glob("*") if path.is_file()]
        candidates += [path for path in self.path.glob("*/config.json") if path.is_file()]
        relative = (path.relative_to(self.path) for path in candidates)
        return sorted(
            path
            for path in relative
            if any(fnmatch.fnmatchcase(path.as_posix(), pattern) for pattern in _COMPANION_PATTERNS)
        )

    def license(self) -> str | None:
        """The licence in the front matter of the source's model card, if it says one."""
        card = self.path / "README.md"
        if not card.is_file():
            return None
        with open(card, encoding="utf-8", errors="replace") as file:
            lines = file.read(65536).splitlines()
        if not lines or lines[0].strip() != "---":
            return None
        for line in lines[1:]:
            if line.strip() == "---":
                return None
            key, _, value = line.partition(":")
            if key == "license" and value.strip():
                return value.strip().strip("'\"")
        return None

    def _locate(self) -> Iterator[tuple[str, str]]:
        index_path = self.path / INDEX_FILE
        if not (self.path / SINGLE_FILE).exists() and not index_path.exists():
            raise CheckpointError(
                f"{self.path}: expected {SINGLE_FILE} or {INDEX_FILE}; weights in other formats, such as pickles, are "
                "not read: save the model with safetensors first"
            )
        if (self.path / SINGLE_FILE).exists():
            reader = self._open(SINGLE_FILE)
            for tensor in reader.entries:
                yield tensor, SINGLE_FILE
            return
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: expected an object weight_map from tensor to shard")
        for tensor, shard in weight_map.items():
            if not is_plain_file_name(shard):
                raise CheckpointError(
                    f"{index_path}: tensor {tensor}: shard {shard!r} is not the name of a safetensors file beside it"
                )
            if tensor not in self._open(shard).entries:
                raise CheckpointError(f"{self.path / shard}: tensor {tensor} is missing, {INDEX_FILE} promises it")
            yield tensor, shard

    def _open(self, shard: str) -> SafetensorsReader:
        if shard not in self._readers:
            self._readers[shard] = SafetensorsReader(self.path / shard)
        return self._readers[shard]


def is_plain_file_name(name: Any) -> bool:
    """Whether a name out of an index stays inside its directory."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and os.path.basename(name) == name
        and "\\" not in name
        and "\0" not in name
        and not name.startswith(".")
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: missing, unreadable, too large, or not a JSON object; names the file.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
