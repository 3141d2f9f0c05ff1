"""Loads models and tokenizers for the command line, packed ones and ordinary ones alike."""

from __future__ import annotations

import resource
import sys
from typing import Any


def load_language_model(
    directory: str, dtype: str, activation_precision: str | None = None, show_progress: bool = True
) -> Any:
    """A causal language model from a directory or a Hub name.

    Raises:
        ImportError: Transformers is not installed.
        CheckpointError: there is no such model, or it does not load.
    """
    transformers = _transformers()
    if not show_progress:
        transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        raise _checkpoint_error(directory, error) from error
    if activation_precision is not None:
        from .packed_linear import PackedLinear

        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.activation_precision = activation_precision
    return model


def load_tokenizer(directory: str) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        ImportError: Transformers is not installed.
        CheckpointError: there is none.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise _checkpoint_error(directory, error) from error


def peak_resident_mb() -> float:
    """The most memory this process ever held, in units of 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "this command needs Transformers; install it with: pip install 'loop-singular-bit[transformers]'"
        ) from error
    return transformers


def _checkpoint_error(directory: str, error: Exception) -> Exception:
    from .errors import CheckpointError

    return CheckpointError(f"{directory}: {error}")
