"""Text that a model writes by itself, to train its compressed copy on: as much as one wants, of all that it knows."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from loop_singular_bit.quantization.tuning_steps import (
    Workers,
    calculation_dtype,
    load_checkpoint,
    save_checkpoint,
)

_WINDOWS_AT_ONCE = 64
# The longer a text, the more of each token's time goes into reading what came before.
_LONGEST_TEXT = 128


def sample_windows(
    model: nn.Module,
    count: int,
    window: int,
    first_tokens: torch.Tensor,
    workers: Workers,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Windows of texts drawn from a model's own predictions, each after a first token (Liu and others 2023, LLM-QAT).

    A text has 128 tokens or, in shorter windows, as many as these; a window is filled with one after another.

    Args:
        model: takes `input_ids` and `past_key_values`, returns an object with `logits` and `past_key_values`.
        count: how many windows.
        window: tokens of each.
        first_tokens: int64 [any], used in turn.
        seed: the same seed gives the same tokens, for any number of threads.
        checkpoint: file that is written after each batch of windows, and continued if it is of the same work,
            also for another count. It stays.
        progress: called after each batch of windows with the tokens there are and those there will be.

    Returns:
        int64 [count, window].
    """
    length = min(window, _LONGEST_TEXT)
    texts = -(-window // length)
    writer = copy.deepcopy(model).to(calculation_dtype()).eval()

    def sample(first: int) -> torch.Tensor:
        rows = torch.arange(first * texts, (first + _WINDOWS_AT_ONCE) * texts)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        tokens = [first_tokens[rows % len(first_tokens)][:, None]]
        past = None
        with torch.inference_mode():
            for _ in range(length - 1):
                output = writer(input_ids=tokens[-1], past_key_values=past, use_cache=True)
                past = output.past_key_values
                probabilities = output.logits[:, -1].float().softmax(-1)
                tokens.append(torch.multinomial(probabilities, 1, generator=generator))
        return torch.cat(tokens, 1).reshape(_WINDOWS_AT_ONCE, -1)[:, :window]

    digest = hashlib.sha256(repr((window, length, seed, calculation_dtype())).encode())
    digest.update(first_tokens.contiguous().numpy().tobytes())
    identity = digest.hexdigest()
    stored = load_checkpoint(checkpoint, identity)
    batches: list[torch.Tensor] = [] if stored is None else stored["batches"]
    for batch in workers.map(sample, range(len(batches) * _WINDOWS_AT_ONCE, count, _WINDOWS_AT_ONCE)):
        # Out of inference mode, so that a copy may be trained on it.
        batches.append(batch.clone())
        if checkpoint is not None:
            save_checkpoint(checkpoint, {"identity": identity, "batches": batches})
        if progress is not None:
            progress(min(sum(map(len, batches)), count) * window, count * window)
    return torch.cat(batches)[:count]
