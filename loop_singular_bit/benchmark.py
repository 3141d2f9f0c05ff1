"""Compression methods side by side: ours and published ones, on one model and text, at the bits they really store."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import __version__, ops
from .comparison.continuations import Prompts, bleu, check_installed, continue_greedily, rouge
from .comparison.linears import linears_of
from .comparison.methods import CalibrationInputs, Variant, find_variants
from .comparison.report import save_comparison
from .comparison.written_text import write_text
from .language_model_evaluation import NOT_EVALUATED, evaluate_language_model
from .machine import processor_name
from .quantization.calibration import calibration_windows
from .quantization.weight_errors import WeightErrors

METRICS = ("perplexity", "kl_divergence", "top1_agreement", "bleu", "rouge", "relative_error")
_TEXT_METRICS = METRICS[:3]
_WRITTEN_METRICS = ("bleu", "rouge")
_MAX_REMEMBERED_BYTES = 2 << 30
_EVALUATION_SEED, _CALIBRATION_SEED = 1, 2


@dataclass(frozen=True)
class BenchmarkProgress:
    """Handed to the callback before each step: what begins, and how many of the variants are done."""

    description: str
    done: int
    total: int


ProgressCallback = Callable[[BenchmarkProgress], None]


@dataclass(frozen=True)
class CompressionBenchmark:
    """Compares compression methods on a model.

    Args:
        window: tokens of an evaluation window.
        max_tokens: of evaluation text, in equal shares from the beginnings of the texts; None for all.
        calibration_window, calibration_windows: tokens of a calibration window, and windows at most.
        continuations: texts that are compared for BLEU and ROUGE.
        prompt_tokens, new_tokens: of each continuation.
    """

    window: int = 512
    max_tokens: int | None = 20_440
    calibration_window: int = 512
    calibration_windows: int = 64
    continuations: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64

    def run_comprehensive_test(
        self,
        model_path: str | os.PathLike[str],
        compression_methods: Sequence[str] | None = None,
        quality_metrics: Sequence[str] | None = None,
        *,
        texts: str | Sequence[str] | None = None,
        calibration_texts: str | Sequence[str] | None = None,
        output_directory: str | os.PathLike[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> dict[str, Any]:
        """Compresses a model with every method and measures what each does to it.

        Each method takes the linears of the decoder layers from the saved weights in float32, puts its round trip in
        their place, and everything is computed in float32: the figures are those of the weights, not of a kernel's
        arithmetic (`smoothquant` and `llm_int8` round activations too, as that is their point). Embeddings, output head
        and norms stay. Two runs give the same figures. Memory: the model twice in float32, and up to 2 GB of logits.

        Args:
            model_path: a causal language model that Transformers loads: a directory or a Hub name.
            compression_methods: names of `METHODS`, or of single variants such as "gptq-3bit-g64"; None for all.
            quality_metrics: names of `METRICS`; None for all.
            texts: to evaluate on; the model should not have been trained on them. None: the model writes one itself,
                which measures how far a method changes the model, not how it does on real text.
            calibration_texts: for the methods that use one; None: the model writes one.
            output_directory: where method_comparison.json, .md and .png are written; None writes nothing.
            progress: called before each step.

        Returns:
            rows: per variant its method, name, description, data, bits_per_weight (all that it stores for the linears,
            over their weights), bits_per_weight_at_4096 (the same format for a 4096 x 4096 matrix), and the figures of
            the metrics: those of `LanguageModelEvaluation`; `bleu`, `rouge1`, `rouge2`, `rougeL` (greedy continuations
            against the original's) with intervals; `relative_error` of the weights, of weight-only methods.
            skipped: name and reason of variants that cannot compress this model.
            And original, protocol, versions, machine.

        Raises:
            ValueError: unknown methods or metrics (the valid ones are named), too little text, a model that is packed
                already, or methods none of which can compress it.
            ImportError: Transformers or what a metric needs is not installed.
        """
        variants = find_variants(compression_methods)
        metrics = _find_metrics(quality_metrics)
        check_installed(metrics)
        tell = progress or (lambda _: None)
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers import __version__ as transformers

        tell(BenchmarkProgress("loading", 0, len(variants)))
        original = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        linears = linears_of(original)
        if not linears:
            raise ValueError(f"model_path: expected an unquantized model, {model_path} has no linears to compress")
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        window = min(self.window, getattr(original.config, "max_position_embeddings", self.window))
        calibration_window = min(self.calibration_window, window)
        tell(BenchmarkProgress("texts", 0, len(variants)))
        evaluated = _texts(texts) or [
            write_text(original, tokenizer, window, -(-(self.max_tokens or 20_440) // window), _EVALUATION_SEED)
        ]
        inputs = CalibrationInputs(original, torch.empty(0, calibration_window, dtype=torch.int64))
        if any(variant.data != "none" for variant in variants):
            calibrating = _texts(calibration_texts) or [
                write_text(original, tokenizer, calibration_window, self.calibration_windows, _CALIBRATION_SEED)
            ]
            inputs.windows = calibration_windows(
                tokenizer, calibrating, window=calibration_window, max_windows=self.calibration_windows
            )
        tell(BenchmarkProgress("original", 0, len(variants)))
        prompts = Prompts(
            calibration_windows(
                tokenizer, evaluated, window=min(self.prompt_tokens, window), max_windows=self.continuations
            ),
            self.new_tokens,
        )
        reference = _Reference(original, tokenizer, evaluated, prompts, metrics, window, self.max_tokens)
        rows, skipped = [], []
        for done, variant in enumerate(variants):
            tell(BenchmarkProgress(variant.name, done, len(variants)))
            try:
                rows.append(_measure(variant, inputs, reference))
            except ValueError as error:
                skipped.append({"name": variant.name, "reason": str(error)})
        if not rows:
            raise ValueError("; ".join(f"{entry['name']}: {entry['reason']}" for entry in skipped))
        tell(BenchmarkProgress("done", len(variants), len(variants)))
        results = {
            "model": str(model_path),
            "metrics": list(metrics),
            "original": reference.figures,
            "rows": rows,
            "skipped": skipped,
            "protocol": {
                "window": window,
                "texts": "given" if texts else "written by the original, seed 1",
                "calibration_texts": "given" if calibration_texts else "written by the original, seed 2",
                "calibration_windows": list(inputs.windows.shape),
                "continuations": len(prompts.ids),
                "prompt_tokens": prompts.ids.shape[1],
                "new_tokens": self.new_tokens,
                "linears": len(linears),
                "weights": sum(linear.weight.numel() for linear in linears.values()),
            },
            "versions": {"loop_singular_bit": __version__, "torch": torch.__version__, "transformers": transformers},
            "machine": {"processor": processor_name(), "isa": ops.isa(), "threads": torch.get_num_threads()},
            "date": time.strftime("%Y-%m-%d"),
        }
        if output_directory is not None:
            save_comparison(results, output_directory)
        return results


class _Reference:
    """What compressed models are compared with: the original's logits and continuations, each computed once."""

    def __init__(
        self,
        original: nn.Module,
        tokenizer: Any,
        texts: list[str],
        prompts: Prompts,
        metrics: Sequence[str],
        window: int,
        max_tokens: int | None,
    ) -> None:
        self._original = _RememberedLogits(original)
        self._linears = linears_of(original)
        self._tokenizer = tokenizer
        self._texts = texts
        self._prompts = prompts
        self._metrics = metrics
        self._window = window
        self._max_tokens = max_tokens
        self._continuations: list[str] = []
        self.figures: dict[str, Any] = {}
        if self.measures(_TEXT_METRICS):
            figures = evaluate_language_model(
                original, tokenizer, texts, window=window, max_tokens=max_tokens
            ).to_dict()
            del figures["per_text"]
            self.figures = {name: value for name, value in figures.items() if value != NOT_EVALUATED}
        if self.measures(_WRITTEN_METRICS):
            self._continuations = continue_greedily(original, tokenizer, prompts)
            self.figures["continuation"] = self._continuations[0]

    def measures(self, metrics: Sequence[str]) -> bool:
        return any(metric in self._metrics for metric in metrics)

    def compare(self, model: nn.Module) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.measures(_TEXT_METRICS):
            evaluation = evaluate_language_model(
                model,
                self._tokenizer,
                self._texts,
                original=self._original,
                window=self._window,
                max_tokens=self._max_tokens,
            )
            wanted = tuple(metric for metric in _TEXT_METRICS if metric in self._metrics)
            figures |= {name: value for name, value in evaluation.to_dict().items() if name.startswith(wanted)}
        if self.measures(_WRITTEN_METRICS):
            written = continue_greedily(model, self._tokenizer, self._prompts)
            if "bleu" in self._metrics:
                figures |= bleu(written, self._continuations)
            if "rouge" in self._metrics:
                figures |= rouge(written, self._continuations)
            figures["continuation"] = written[0]
        if "relative_error" in self._metrics:
            figures["relative_error"] = self._relative_error(model)
        return figures

    def _relative_error(self, model: nn.Module) -> float | str:
        errors = WeightErrors()
        for name, linear in self._linears.items():
            changed = model.get_submodule(name)
            if not isinstance(changed, nn.Linear):
                return NOT_EVALUATED
            errors.add(linear.weight, changed.weight)
        return errors.relative_error


class _RememberedLogits(nn.Module):
    """The original, which every method is compared with on the same windows: 2 GB of logits are computed once only."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = [original]  # in a list: its parameters are not this module's
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}
        self._nbytes = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        key = tuple(input_ids[0].tolist())
        logits = self._logits.get(key)
        if logits is None:
            logits = self._original[0](input_ids=input_ids, use_cache=use_cache).logits
            assert logits is not None
            if self._nbytes + logits.nbytes <= _MAX_REMEMBERED_BYTES:
                self._logits[key] = logits
                self._nbytes += logits.nbytes
        return SimpleNamespace(logits=logits)


def _measure(variant: Variant, inputs: CalibrationInputs, reference: _Reference) -> dict[str, Any]:
    model = copy.deepcopy(inputs.original)
    size = variant.apply(model, inputs)
    return {
        "method": variant.method,
        "name": variant.name,
        "curve": variant.curve,
        "description": variant.description,
        "data": variant.data,
        "bits_per_weight": size.bits_per_weight,
        "bits_per_weight_at_4096": size.bits_per_weight_at_4096,
        **reference.compare(model),
    }


def _find_metrics(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return METRICS
    if isinstance(names, str):
        raise TypeError(f"quality_metrics: expected a sequence of names, got the string {names!r}")
    if not names or (unknown := [name for name in names if name not in METRICS]):
        wrong = repr(unknown[0]) if names else "none"
        raise ValueError(f"quality_metrics: expected some of {', '.join(METRICS)}; got {wrong}")
    return tuple(name for name in METRICS if name in names)


def _texts(texts: str | Sequence[str] | None) -> list[str]:
    if texts is None:
        return []
    return [texts] if isinstance(texts, str) else list(texts)
