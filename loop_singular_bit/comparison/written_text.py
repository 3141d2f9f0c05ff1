"""Text that a model writes itself, for when there is none: it shows how far a compressed model departs from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BATCH = 32


@torch.inference_mode()
def write_text(model: nn.Module, tokenizer: Any, window: int, windows: int, seed: int) -> str:
    """Paragraphs of up to `window` tokens, sampled at temperature 1 from a beginning-of-sequence token or, without one,
    from random tokens; the same for the same seed.
    """
    language_model: Any = model
    beginning = getattr(tokenizer, "bos_token_id", None)
    vocabulary = language_model.get_input_embeddings().num_embeddings
    paragraphs: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(paragraphs) < windows:
            count = min(_BATCH, windows - len(paragraphs))
            if beginning is None:
                ids = torch.randint(vocabulary, (count, 1))
            else:
                ids = torch.full((count, 1), beginning)
            written = language_model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_length=window,
                max_length=window,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
            paragraphs += tokenizer.batch_decode(written, skip_special_tokens=True)
    return "\n\n".join(paragraphs)
