"""Reads packed checkpoints: what is in them by config.json, checked against the headers of the shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .checkpoint_directory import CONFIG_FILE, CheckpointDirectory, read_json_object
from .errors import CheckpointError
from .packed_weight import FORMAT_VERSION, ROWS_PER_TILE, PackedLayout, PackedWeight
from .safetensors_stream import TensorEntry, dtype_name

QUANT_METHOD = "loop_singular_bit"
CHECKSUM_FILE = "checksums.sha256"

_KINDS = ("linear", "embedding")


@dataclass(frozen=True)
class StoredModule:
    """A packed linear or embedding of a checkpoint. `kind` is "linear" or "embedding"."""

    name: str
    kind: str
    layout: PackedLayout

    def tensor_names(self) -> dict[str, str]:
        """Part, such as "signs", to the name of the stored tensor."""
        return {part: f"{self.name}.{part}" for part in self.layout.tensors()}


def is_packed_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory's config.json says that this package wrote it."""
    try:
        quantization = read_json_object(Path(directory) / CONFIG_FILE).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_packed_checkpoint(directory: str | os.PathLike[str]) -> PackedCheckpointReader:
    """Opens a packed checkpoint; see `PackedCheckpointReader`."""
    return PackedCheckpointReader(directory)


class PackedCheckpointReader:
    """The modules of a packed checkpoint, read one at a time or by rows.

    That every tensor promised by config.json is there with the right dtype and shape is checked here, from the headers;
    contents are not (`PackedWeight.validate`, `loop-singular-bit verify`).

    Attributes:
        modules: by name, in the order of config.json.
        tied_modules: heads without a weight of their own, and the embedding whose they use.
        kept_tensors: names of tensors that are stored as they were.

    Raises:
        CheckpointError: not a packed checkpoint, of a newer format, or damaged; names file and tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = CheckpointDirectory(path)
        try:
            self.config = self.files.config
            self.quantization_config = self._quantization_config()
            self.modules = {
                name: self._stored_module(name, fields)
                for name, fields in _objects(self.quantization_config, "modules", self.path).items()
            }
            self.tied_modules: dict[str, str] = {
                str(head): str(owner)
                for head, owner in _objects(self.quantization_config, "tied_modules", self.path).items()
            }
            packed = {name for module in self.modules.values() for name in self._check_tensors(module)}
            self.kept_tensors = [
                name for name in self.files.tensor_names if name not in packed and not self._is_guard(name)
            ]
        except BaseException:
            self.files.close()
            raise

    def __enter__(self) -> PackedCheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.files.close()

    def packed_weight(self, module: str) -> PackedWeight:
        """A whole module in memory of its own."""
        stored = self._module(module)
        tensors = {part: self.tensor(name) for part, name in stored.tensor_names().items()}
        return PackedWeight.from_tensors(tensors, stored.layout.out_features, stored.layout.in_features)

    def packed_rows(self, module: str, first_row: int, rows: int) -> PackedWeight:
        """Some rows of a module; `first_row` is a multiple of 32, and so is `rows` unless they are the last."""
        stored = self._module(module)
        last_row = first_row + rows
        if first_row % ROWS_PER_TILE or not 0 <= first_row < last_row <= stored.layout.out_features:
            raise ValueError(
                f"rows {first_row} to {last_row} of {module}: expected to start at a multiple of {ROWS_PER_TILE} and "
                f"to lie within {stored.layout.out_features}"
            )
        first_tile, tiles = first_row // ROWS_PER_TILE, -(-rows // ROWS_PER_TILE)
        tensors = {
            part: self.tensor(name) if part == "column_scales" else self._read_tiles(name, first_tile, tiles)
            for part, name in stored.tensor_names().items()
        }
        return PackedWeight.from_tensors(tensors, rows, stored.layout.in_features)

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor in memory of its own."""
        return self.files.reader(name).read(name)

    def _is_guard(self, name: str) -> bool:
        """Whether a tensor is the empty one that stops readers which do not know the format."""
        module, _, part = name.rpartition(".")
        return part == "weight" and module in self.modules and 0 in self.files.entry(name).shape

    def _read_tiles(self, name: str, first: int, count: int) -> torch.Tensor:
        return self.files.reader(name).read_rows(name, first, count)

    def _module(self, name: str) -> StoredModule:
        if name not in self.modules:
            raise KeyError(f"{name} is not a packed module of {self.path}")
        return self.modules[name]

    def _quantization_config(self) -> dict[str, Any]:
        where = self.path / CONFIG_FILE
        quantization = self.config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{where}: quantization_config has no quant_method {QUANT_METHOD!r}: not packed")
        version = quantization.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{where}: format_version {version!r}: this package reads {FORMAT_VERSION}")
        return quantization

    def _stored_module(self, name: str, fields: Any) -> StoredModule:
        where = f"{self.path / CONFIG_FILE}: module {name}"
        if not isinstance(fields, dict) or fields.get("kind") not in _KINDS:
            raise CheckpointError(f"{where}: expected an object with kind {' or '.join(_KINDS)}, got {fields!r:.200}")
        try:
            return StoredModule(name, fields["kind"], PackedLayout.from_dict(fields))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from error

    def _check_tensors(self, module: StoredModule) -> list[str]:
        for part, (dtype, shape) in module.layout.tensors().items():
            entry: TensorEntry = self.files.entry(f"{module.name}.{part}")
            if (entry.dtype, entry.shape) != (dtype_name(dtype), shape):
                raise CheckpointError(
                    f"{self.files.reader(entry.name).path}: tensor {entry.name}: expected {dtype_name(dtype)} "
                    f"{list(shape)} by {CONFIG_FILE}, got {entry.dtype} {list(entry.shape)}"
                )
        return list(module.tensor_names().values())


def _objects(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / CONFIG_FILE}: quantization_config.{key}: expected an object")
    return value
