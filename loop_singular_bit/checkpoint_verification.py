"""Checks every byte of a packed checkpoint: hashes, shapes, the rules of the format, the error against the original."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .checkpoint import CHECKSUM_FILE, PackedCheckpointReader, StoredModule, read_packed_checkpoint
from .checkpoint_directory import CheckpointDirectory, is_plain_file_name
from .compression_output import REPORT_FILE
from .packed_weight import COLUMNS_PER_WORD, ROWS_PER_TILE, PackedWeight
from .row_errors import RowErrors, relative_error, sqnr_db
from .safetensors_stream import file_sha256, tensor_bytes

ProgressCallback = Callable[[str, int, int], None]

_WEIGHTS_AT_ONCE = 1 << 23
_BYTES_AT_ONCE = 1 << 24


@dataclass
class _Verification:
    problems: list[dict[str, str]] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, where: str, problem: str) -> None:
        self.problems.append({"where": where, "problem": problem})


def verify_checkpoint(
    directory: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Reads a packed checkpoint from end to end and lists what is wrong with it.

    Checked: SHA-256 of each shard by checksums.sha256; dtypes and shapes by config.json; outlier columns in range and
    ascending; scales finite, not negative, largest plane first; zeros in padding rows and columns; tied modules. With
    the original also: that nothing is missing, that kept tensors are equal, and the error of every packed weight.

    Args:
        against: directory of the original checkpoint.
        progress: called with a name, the modules done and the modules there are.

    Returns:
        passed, problems (where, problem), modules, checksums (per file "match", "mismatch" or "not listed"),
        relative_error (Frobenius, all packed weights) and errors (per module), both None without the original.

    Raises:
        CheckpointError: the directory cannot be read as a packed checkpoint at all.
    """
    found = _Verification()
    with read_packed_checkpoint(directory) as checkpoint:
        _check_hashes(checkpoint, found)
        _check_ties(checkpoint, found)
        original = None if against is None else CheckpointDirectory(against)
        squared_error = squared_weight = 0.0
        threads = torch.get_num_threads()
        # Pieces that fit a cache are too small to share among threads.
        torch.set_num_threads(1)
        try:
            for number, module in enumerate(checkpoint.modules.values()):
                if progress is not None:
                    progress(module.name, number, len(checkpoint.modules))
                errors = _check_module(checkpoint, module, original, found)
                if errors is not None:
                    squared_error += errors.squared_error
                    squared_weight += errors.squared_weight
            if original is not None:
                _check_kept_tensors(checkpoint, original, found)
            if progress is not None:
                progress("", len(checkpoint.modules), len(checkpoint.modules))
        finally:
            torch.set_num_threads(threads)
            if original is not None:
                original.close()
        return {
            "path": str(checkpoint.path),
            "against": None if against is None else str(against),
            "passed": not found.problems,
            "problems": found.problems,
            "modules": len(checkpoint.modules),
            "kept_tensors": len(checkpoint.kept_tensors),
            "checksums": found.checksums,
            "relative_error": None if against is None else relative_error(squared_error, squared_weight),
            "errors": None if against is None else found.errors,
        }


def _check_hashes(checkpoint: PackedCheckpointReader, found: _Verification) -> None:
    path = checkpoint.path / CHECKSUM_FILE
    listed: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            if name:
                listed[name] = digest
    for shard in checkpoint.files.shard_bytes():
        if shard not in listed:
            found.checksums[shard] = "not listed"
            # Transformers' save_pretrained writes neither file: there is nothing to compare with.
            if path.is_file() or (checkpoint.path / REPORT_FILE).is_file():
                found.add(shard, f"not listed in {CHECKSUM_FILE}")
    for name, digest in listed.items():
        if name in checkpoint.files.shard_bytes() or is_plain_file_name(name.removesuffix(".index.json")):
            file = checkpoint.path / name
            matches = file.is_file() and file_sha256(file) == digest
            found.checksums[name] = "match" if matches else "mismatch"
            if not matches:
                found.add(name, "SHA-256 differs" if file.is_file() else f"listed in {CHECKSUM_FILE}, but missing")


def _check_ties(checkpoint: PackedCheckpointReader, found: _Verification) -> None:
    for head, owner in checkpoint.tied_modules.items():
        if owner not in checkpoint.modules:
            found.add(head, f"tied to {owner}, which is not a packed module")
        if head in checkpoint.modules or f"{head}.weight" in checkpoint.files:
            found.add(head, f"tied to {owner}, but has a weight of its own")
    for name in checkpoint.kept_tensors:
        module, _, part = name.rpartition(".")
        if part == "weight" and module in checkpoint.modules:
            found.add(name, "both packed and stored as it was")


def _check_module(
    checkpoint: PackedCheckpointReader,
    module: StoredModule,
    original: CheckpointDirectory | None,
    found: _Verification,
) -> RowErrors | None:
    problems_before = len(found.problems)
    name = f"{module.name}.weight"
    errors: RowErrors | None = None
    if original is not None:
        shape = (module.layout.out_features, module.layout.in_features)
        if name not in original:
            found.add(name, "not in the original")
        elif original.entry(name).shape != shape:
            found.add(name, f"{list(shape)}, in the original {list(original.entry(name).shape)}")
        else:
            errors = RowErrors(module.layout.out_features)
    for first, packed in _row_blocks(checkpoint, module):
        if problem := _problem(packed, first):
            found.add(module.name, problem)
            break
        if errors is not None and original is not None:
            errors.add(first, original.reader(name).read_rows(name, first, packed.out_features), packed)
    if errors is None or len(found.problems) > problems_before:
        return None
    found.errors.append(
        {
            "name": module.name,
            "relative_error": relative_error(errors.squared_error, errors.squared_weight),
            "sqnr_db": sqnr_db(errors.squared_error, errors.squared_weight),
        }
    )
    return errors


def _row_blocks(checkpoint: PackedCheckpointReader, module: StoredModule) -> Iterator[tuple[int, PackedWeight]]:
    layout = module.layout
    step = max(1, _WEIGHTS_AT_ONCE // (ROWS_PER_TILE * layout.in_features)) * ROWS_PER_TILE
    for first in range(0, layout.out_features, step):
        yield first, checkpoint.packed_rows(module.name, first, min(step, layout.out_features - first))


def _problem(packed: PackedWeight, first_row: int) -> str | None:
    """What breaks the rules of the format in some rows; None when nothing does."""
    where = f"rows {first_row} to {first_row + packed.out_features - 1}"
    try:
        packed.validate()
    except ValueError as error:
        return f"{where}: {error} (rows counted from {first_row})"
    padded_rows = -packed.out_features % ROWS_PER_TILE
    if padded_rows:
        for part, tensor in packed.tensors().items():
            if part != "column_scales" and (tensor[-1][..., -padded_rows:] != 0).any():
                return f"{where}: {part}: expected zeros in the {padded_rows} padding rows"
    used = packed.in_features % COLUMNS_PER_WORD
    if used and (packed.signs[:, :, -1].bitwise_right_shift(used) & ((1 << (COLUMNS_PER_WORD - used)) - 1)).any():
        return f"{where}: signs: expected zeros in the padding columns"
    return None


def _check_kept_tensors(
    checkpoint: PackedCheckpointReader, original: CheckpointDirectory, found: _Verification
) -> None:
    for name in checkpoint.kept_tensors:
        if name not in original:
            found.add(name, "not in the original")
        elif not _equal(checkpoint.files, original, name):
            found.add(name, "differs from the original, although it is not packed")
    kept = set(checkpoint.kept_tensors)
    for name in original.tensor_names:
        module = name.removesuffix(".weight")
        if name not in kept and module not in checkpoint.modules and module not in checkpoint.tied_modules:
            found.add(name, "missing; the original has it")


def _equal(left: CheckpointDirectory, right: CheckpointDirectory, name: str) -> bool:
    one, other = left.entry(name), right.entry(name)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, _BYTES_AT_ONCE):
        pieces = [torch.empty(min(_BYTES_AT_ONCE, one.nbytes - start), dtype=torch.uint8) for _ in range(2)]
        left.reader(name).read_into(one, start, tensor_bytes(pieces[0]))
        right.reader(name).read_into(other, start, tensor_bytes(pieces[1]))
        if not torch.equal(*pieces):
            return False
    return True
