"""Packed models by name: directories, the Hugging Face cache, the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError

QUANT_METHOD = "loop_singular_bit"
_CACHE_PREFIX = "models--"


def resolve_model(path_or_name: str | os.PathLike[str]) -> Path:
    """The directory of a packed model: a path, else `organization/name` in the Hugging Face cache, else from the Hub.

    Raises:
        CheckpointError: there is none of that name; says where it was looked for.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = _checked_name(path_or_name)
    complete = [snapshot for snapshot in _cached_snapshots(name) if _is_complete(snapshot)]
    return complete[0] if complete else _from_hub(name, lambda hub: hub.snapshot_download(name))


def is_packed(path_or_name: str | os.PathLike[str]) -> bool:
    """Whether a directory or a name is that of a packed checkpoint; of a name on the Hub only config.json is fetched.

    Raises:
        CheckpointError: there is no such model.
    """
    path = Path(path_or_name).expanduser()
    if not path.is_dir():
        name = _checked_name(path_or_name)
        cached = _cached_snapshots(name)
        path = cached[0] if cached else _from_hub(name, lambda hub: hub.hf_hub_download(name, "config.json")).parent
    return _quantization(path) is not None


def list_models(directories: Iterable[str | os.PathLike[str]] = (".",)) -> list[dict[str, Any]]:
    """Packed models in these directories (themselves and one level below) and in the Hugging Face cache.

    Returns:
        One dictionary per model: name, path, preset, model_type, bytes on disk; sorted by name.
    """
    candidates: list[tuple[str, Path]] = []
    for directory in map(Path, directories):
        if directory.is_dir():
            inside = sorted(path for path in directory.iterdir() if path.is_dir())
            candidates += [(str(path), path) for path in (directory, *inside)]
    cache = _cache_directory()
    if cache.is_dir():
        for entry in sorted(cache.glob(_CACHE_PREFIX + "*")):
            name = entry.name.removeprefix(_CACHE_PREFIX).replace("--", "/", 1)
            candidates += [(name, snapshot) for snapshot in _cached_snapshots(name)[:1] if _is_complete(snapshot)]
    models = [_describe(name, path) for name, path in candidates]
    return sorted((model for model in models if model is not None), key=lambda model: model["name"])


def weight_files(directory: Path) -> list[Path]:
    """The shards of a packed checkpoint, largest first."""
    return sorted(directory.glob("*.safetensors"), key=lambda path: -path.stat().st_size)


def _describe(name: str, path: Path) -> dict[str, Any] | None:
    config = _quantization(path)
    if config is None:
        return None
    return {
        "name": name,
        "path": str(path),
        "preset": config["quantization_config"].get("preset"),
        "model_type": config.get("model_type"),
        "bytes": sum(file.stat().st_size for file in weight_files(path)),
    }


def _quantization(path: Path) -> dict[str, Any] | None:
    """config.json, if it is that of a packed checkpoint."""
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return config if config["quantization_config"]["quant_method"] == QUANT_METHOD else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a model, or not ours: a list names what can be used


def _checked_name(path_or_name: str | os.PathLike[str]) -> str:
    name = os.fspath(path_or_name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such directory, and not a name of the form organization/name")
    return name


def _cache_directory() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "hub"


def _cached_snapshots(name: str) -> list[Path]:
    """Snapshots that have a configuration: the one `main` points to first."""
    entry = _cache_directory() / (_CACHE_PREFIX + name.replace("/", "--"))
    snapshots = sorted(path.parent for path in entry.glob("snapshots/*/config.json"))
    main = entry / "refs" / "main"
    wanted = main.read_text().strip() if main.is_file() else ""
    return sorted(snapshots, key=lambda path: path.name != wanted)


def _is_complete(snapshot: Path) -> bool:
    """Whether all weights are there: a download that was interrupted, or of single files, leaves less."""
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return (snapshot / "model.safetensors").is_file()
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((snapshot / name).is_file() for name in names)


def _from_hub(name: str, fetch: Callable[[Any], str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such directory; to look on the Hugging Face Hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(fetch(huggingface_hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name}: no such directory, and not to be had from the Hub: {error}") from error
