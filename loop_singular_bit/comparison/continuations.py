"""Greedy continuations of one model against those of another: how far the texts that they write agree.

BLEU by sacrebleu (Post, WMT 2018), ROUGE by rouge-score (Lin, ACL workshop 2004); the extra `benchmarks` installs both.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loop_singular_bit.window_bootstrap import RESAMPLES, WindowBootstrap

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
_MODULES = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts, all of one length.

    Attributes:
        ids: int64 [prompts, tokens].
        new_tokens: how far models continue them.
    """

    ids: torch.Tensor
    new_tokens: int


@torch.inference_mode()
def continue_greedily(model: nn.Module, tokenizer: Any, prompts: Prompts) -> list[str]:
    """What a Transformers model writes after each prompt when it always takes the likeliest token."""
    device = next(model.parameters()).device
    ids = prompts.ids.to(device)
    ends = getattr(tokenizer, "eos_token_id", None)
    generate: Any = model.generate
    written = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompts.new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0 if ends is None else ends,
    )
    texts: list[str] = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def bleu(continuations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU, 0 to 100, its 95 % interval from resampled continuations, and the signature of how it was counted.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    metric = _import("bleu").BLEU()
    score = metric.corpus_score(list(continuations), [list(references)], n_bootstrap=RESAMPLES)
    described = json.loads(score.format(width=6, is_json=True, signature=str(metric.get_signature())))
    # Left out by sacrebleu when every resample scores 0.
    mean, half_width = described.get("confidence_mean", score.score), described.get("confidence_var", 0.0)
    return {
        "bleu": score.score,
        "bleu_interval": (mean - half_width, mean + half_width),
        "bleu_signature": described["signature"],
    }


def rouge(continuations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Mean F-measures, 0 to 1, of one-word, two-word and longest common sequences, with 95 % intervals.

    Raises:
        ImportError: rouge-score is not installed.
    """
    scorer = _import("rouge").RougeScorer(list(ROUGE_TYPES), use_stemmer=False)
    scores = [scorer.score(reference, text) for reference, text in zip(references, continuations, strict=True)]
    bootstrap = WindowBootstrap([1] * len(scores))
    figures: dict[str, Any] = {}
    for kind in ROUGE_TYPES:
        estimate = bootstrap.mean(torch.tensor([score[kind].fmeasure for score in scores], dtype=torch.float64))
        figures[kind] = estimate.value
        figures[f"{kind}_interval"] = estimate.interval
    return figures


def check_installed(metrics: Sequence[str]) -> None:
    """Before hours of work: whether what the metrics need can be imported.

    Raises:
        ImportError: it cannot; the message says what to install.
    """
    for metric in metrics:
        if metric in _MODULES:
            _import(metric)


def _import(metric: str) -> Any:
    try:
        return importlib.import_module(_MODULES[metric])
    except ImportError as error:
        raise ImportError(
            f"the metric {metric!r} needs {_MODULES[metric].partition('.')[0]}; install it with: "
            "pip install 'loop-singular-bit[benchmarks]'"
        ) from error
