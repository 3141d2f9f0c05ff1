"""Tuning packed weights by KL to the original: scales and outliers, which change no bit, or signs as well.

Errors of single layers are not what counts: what a model says is. Scales alone are a thousandth of the parameters and
win back a third of the KL divergence at one bit. Gains of norms need no tuning: column scales do the same for each
linear.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.quantization.block_tuning import BlockTuning
from loop_singular_bit.quantization.sampled_windows import sample_windows
from loop_singular_bit.quantization.tunable_linear import TunableLinear, changed_signs
from loop_singular_bit.quantization.tuning_steps import (
    Rates,
    TuningSteps,
    Workers,
    calculation_dtype,
    chosen_windows,
    load_checkpoint,
    save_checkpoint,
    single_threaded_workers,
)

_POSITIONS_AT_ONCE = 128
# What the original says is kept from one epoch to the next if it fits.
_EXPECTED_BYTES = 2 << 30


@dataclass(frozen=True)
class TuningOptions:
    """How to tune.

    Args:
        signs: also tune signs, by a latent weight for each (straight-through estimator; 12 bytes more per weight).
        steps: of the optimizer.
        batch: windows per step.
        learning_rate: of scales and outliers, relative to their size.
        sign_learning_rate: of the latent weights, relative to the scales of their row.
        sampled_windows: so many windows are sampled from the original itself and trained on beside the text's. Signs
            learn a text by heart; what the model says by itself is like everything that it was trained on.
        held_out_share: one of so many of the text's windows is held out and decides whether the result is kept.
        layer_steps: if not 0, decoder layers are first tuned one by one to put out what the original's do, so many
            steps each.
        memory_gb: what training may take beside the original, in 10^9 bytes. If dense weights, gradients, latent
            weights and moments of the whole model take more, it is tuned layer by layer (`steps` each, unless
            layer_steps says otherwise), and after that scales by KL if at least those fit.
        checkpoint_steps: steps between two checkpoints.
        seed: of the order of the windows, and of what is sampled.
    """

    signs: bool = False
    steps: int = 60
    batch: int = 4
    learning_rate: float = 4e-3
    sign_learning_rate: float = 4e-2
    sampled_windows: int = 0
    held_out_share: int = 8
    layer_steps: int = 0
    memory_gb: float = 12.0
    checkpoint_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.held_out_share < 2:
            raise ValueError(f"held_out_share: expected at least 2, got {self.held_out_share}")
        for name in ("sampled_windows", "layer_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class TuningProgress:
    """Handed to the callback after every step; kl_divergence is that of the step's windows, in nats per token.

    Before the first step, while text is sampled, step is 0 and kl_divergence None.
    """

    step: int
    steps: int
    description: str
    kl_divergence: float | None
    seconds: float
    eta_seconds: float | None


@dataclass(frozen=True)
class TuningResult:
    """Attributes:
    packed_weights: tuned, or as they were if `kept` is false.
    kl_before, kl_after: on the held-out windows, in nats per token; after with everything rounded to the format.
    kept: whether kl_after is lower.
    changed_signs: share of the signs that changed.
    """

    packed_weights: dict[str, PackedWeight]
    kl_before: float
    kl_after: float
    kept: bool
    changed_signs: float


ProgressCallback = Callable[[TuningProgress], None]


def tune(
    model: nn.Module,
    packed_weights: Mapping[str, PackedWeight],
    windows: torch.Tensor,
    options: TuningOptions | None = None,
    *,
    checkpoint: Path | None = None,
    sampled: Path | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> TuningResult:
    """Trains packed weights to make the model say what the original says.

    Minimizes KL(original || packed) at every token (Hinton, Vinyals and Dean 2015), with bfloat16 products where the
    processor has them. The original is not changed; beside it there are a dense weight and a gradient of each linear,
    signs, a byte for each, and the parameters with their moments.

    Windows are worked on in parallel, one thread each, and summed in their order: the number of threads changes
    nothing. Processors with and without bfloat16 give different bytes.

    Args:
        model: the original; takes `input_ids` [batch, window] and returns an object with `logits`.
        packed_weights: by name of linear of the model; the other modules are those of the original.
        windows: int64 [windows, window], see `calibration_windows`; at least two.
        checkpoint: file that is written every few steps, and continued if it is of the same work. Removed at the end.
        sampled: file that keeps what was sampled, for another run as well. It stays.
        threads: None for as many as torch uses.
        progress: called after each step.

    Raises:
        ValueError: too few windows, a name that is no linear of the model, or a packed weight with means.
    """
    options = options or TuningOptions()
    if len(windows) < 2:
        raise ValueError(f"windows: expected at least 2, one of them held out, got {len(windows)}")
    held_out = torch.arange(len(windows)) % options.held_out_share == options.held_out_share - 1
    if not held_out.any():
        held_out[-1] = True
    for name, packed in packed_weights.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name}: expected an nn.Linear of the model, got {type(linear).__name__}")
        if packed.means is not None:
            raise ValueError(f"{name}: weights with means are not tuned")
    with single_threaded_workers(threads) as workers, _frozen(model):
        before = _mean_divergence(model, packed_weights, windows[held_out], workers)
        run = _Run(model, dict(packed_weights), windows, held_out, options, workers, checkpoint, progress)
        if options.sampled_windows:
            run.add_sampled(sampled)
        tuned = run.tune()
        after = _mean_divergence(model, tuned, windows[held_out], workers)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    kept = after < before
    changed = sum(changed_signs(packed_weights[name], tuned[name]) for name in tuned)
    total = sum(packed.planes * packed.out_features * packed.in_features for packed in packed_weights.values())
    return TuningResult(tuned if kept else dict(packed_weights), before, after, kept, changed / total if kept else 0.0)


def training_bytes(packed_weights: Iterable[PackedWeight], signs: bool) -> int:
    """What training all of them at once takes, beside the original and activations."""
    dense = calculation_dtype().itemsize
    total = 0
    for packed in packed_weights:
        # The dense weight, two windows' gradients and their sum; latent weight, its change, gradient and momentum.
        each = 3 * dense + 4 + packed.planes + (16 if signs else 0)
        total += each * packed.out_features * packed.in_features
    return total


class _Run:
    """One call of `tune`: its stages, and where they are stored."""

    def __init__(
        self,
        model: nn.Module,
        packed_weights: dict[str, PackedWeight],
        windows: torch.Tensor,
        held_out: torch.Tensor,
        options: TuningOptions,
        workers: Workers,
        checkpoint: Path | None,
        progress: ProgressCallback | None,
    ) -> None:
        self._model = model
        self._packed = packed_weights
        self._windows = windows
        self._trained = (~held_out).nonzero()[:, 0].tolist()
        self._options = options
        self._workers = workers
        self._checkpoint = checkpoint
        self._progress = progress
        self._identity = _identity(packed_weights, windows, options)

    def add_sampled(self, path: Path | None) -> None:
        """Text by the model itself to train on."""
        options, start = self._options, time.perf_counter()

        def report(done: int, total: int) -> None:
            if self._progress is not None:
                seconds = time.perf_counter() - start
                description = f"sampling text, {done} of {total} tokens"
                self._progress(TuningProgress(0, options.steps, description, None, seconds, None))

        first_tokens = self._windows[:, 0]
        length = self._windows.shape[1]
        sampled = sample_windows(
            self._model,
            options.sampled_windows,
            length,
            first_tokens,
            self._workers,
            seed=options.seed,
            checkpoint=path,
            progress=report,
        )
        self._trained += range(len(self._windows), len(self._windows) + len(sampled))
        self._windows = torch.cat([self._windows, sampled])

    def tune(self) -> dict[str, PackedWeight]:
        options, budget = self._options, self._options.memory_gb * 1e9
        all_fits = training_bytes(self._packed.values(), options.signs) <= budget
        if all_fits and options.layer_steps == 0:
            self._total = options.steps
            return self._tune_model(self._packed, options.signs, 0)
        rates = Rates(options.learning_rate, options.sign_learning_rate, options.layer_steps or options.steps)
        blocks = BlockTuning(
            self._model,
            self._packed,
            self._windows,
            self._trained,
            signs=options.signs,
            rates=rates,
            batch=options.batch,
            seed=options.seed,
            workers=self._workers,
        )
        fits = training_bytes(self._packed.values(), False) <= budget
        self._total = blocks.total_steps + (options.steps if fits else 0)
        clock = _Clock()

        def report(step: int, description: str) -> None:
            self._report(clock, step, description, None)

        packed = self._packed
        blocks_checkpoint = None
        if self._checkpoint is not None:
            blocks_checkpoint = self._checkpoint.with_name(self._checkpoint.name + ".blocks")
        packed = blocks.run(blocks_checkpoint, options.checkpoint_steps, self._identity, report)
        if fits:
            packed = self._tune_model(packed, options.signs and all_fits, blocks.total_steps)
        if blocks_checkpoint is not None:
            blocks_checkpoint.unlink(missing_ok=True)
        return packed

    def _tune_model(self, packed_weights: dict[str, PackedWeight], signs: bool, before: int) -> dict[str, PackedWeight]:
        """All weights at once, by KL; `before` steps were taken by another stage."""
        options, dtype = self._options, calculation_dtype()
        student = _copy_with_tensors_shared(self._model)
        tunables: dict[str, TunableLinear] = {}
        for name, packed in packed_weights.items():
            tunables[name] = TunableLinear(packed, self._model.get_submodule(name), signs)  # type: ignore[arg-type]
            _replace(student, name, tunables[name])
        steps = TuningSteps(tunables, Rates(options.learning_rate, options.sign_learning_rate, options.steps), dtype)
        first = 0
        stored = load_checkpoint(self._checkpoint, self._identity)
        if stored is not None:
            steps.load_state(stored["state"])
            first = int(stored["step"])

        known: dict[int, torch.Tensor] = {}

        def loss_of(window: int) -> torch.Tensor:
            ids = self._windows[window : window + 1]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                expected = known.get(window)
                if expected is None:
                    with torch.no_grad():
                        expected = _logits(self._model, ids)
                    if (len(known) + 1) * expected.nbytes <= _EXPECTED_BYTES:
                        known[window] = expected
                given = _logits(student, ids)
            loss: torch.Tensor = _MeanDivergence.apply(given, expected)
            return loss

        clock = _Clock()
        for step in range(first, options.steps):
            chosen = chosen_windows(step, len(self._trained), options.batch, options.seed)
            loss = steps.take(step, [self._trained[window] for window in chosen], loss_of, self._workers)
            if self._checkpoint is not None and (step + 1) % options.checkpoint_steps == 0:
                content = {"identity": self._identity, "step": step + 1, "state": steps.state()}
                save_checkpoint(self._checkpoint, content)
            self._report(clock, before + step + 1, f"KL {loss:.4f}", loss)
        return {name: tunable.packed() for name, tunable in tunables.items()}

    def _report(self, clock: _Clock, step: int, description: str, divergence: float | None) -> None:
        if self._progress is not None:
            seconds, eta = clock.read(step, self._total)
            self._progress(TuningProgress(step, self._total, description, divergence, seconds, eta))


class _Clock:
    """Seconds since it was made, and how many more it will take."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: int | None = None

    def read(self, step: int, total: int) -> tuple[float, float]:
        if self._first is None:
            self._first = step - 1
        seconds = time.perf_counter() - self._start
        return seconds, seconds / (step - self._first) * (total - step)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients by the model's own parameters."""
    was_training, required = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter, requires in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(requires)


def _copy_with_tensors_shared(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _MeanDivergence(torch.autograd.Function):
    """Mean over positions of KL(expected || given), of logits [positions, vocabulary], some positions at a time.

    The gradient by `given` is known with the value: nothing else is kept.
    """

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        total = 0.0
        gradient = torch.empty_like(given)
        for first in range(0, len(given), _POSITIONS_AT_ONCE):
            some = slice(first, first + _POSITIONS_AT_ONCE)
            wanted = torch.log_softmax(expected[some].float(), -1)
            found = torch.log_softmax(given[some].float(), -1)
            probabilities = wanted.exp()
            # Per position first: a float32 sum over millions of terms would be wrong by more than what is measured.
            total += float((probabilities * (wanted - found)).sum(-1).double().sum())
            gradient[some] = (found.exp() - probabilities) / len(given)
        ctx.save_for_backward(gradient)
        return torch.tensor(total / len(given))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[positions, vocabulary] of one window."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


class _DenseOnCall(nn.Module):
    """A packed weight that is dense only while it is used."""

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._packed = packed
        self._bias = bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self._packed.dequantize().to(input.dtype), self._bias)


def _mean_divergence(
    model: nn.Module, packed_weights: Mapping[str, PackedWeight], windows: torch.Tensor, workers: Workers
) -> float:
    """Mean over the windows' tokens of KL(original || packed) in the model's precision, in nats."""
    student = _copy_with_tensors_shared(model)
    for name, packed in packed_weights.items():
        _replace(student, name, _DenseOnCall(packed, model.get_submodule(name).bias))  # type: ignore[arg-type]

    def divergence(window: int) -> float:
        with torch.no_grad():
            ids = windows[window : window + 1]
            value: torch.Tensor = _MeanDivergence.apply(_logits(student, ids), _logits(model, ids))
            return value.item()

    return sum(workers.map(divergence, range(len(windows)))) / len(windows)


def _identity(packed_weights: Mapping[str, PackedWeight], windows: torch.Tensor, options: TuningOptions) -> str:
    """Of everything that the result depends on but the model."""
    digest = hashlib.sha256(repr((asdict(options), tuple(windows.shape), calculation_dtype())).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    for name, packed in packed_weights.items():
        digest.update(name.encode())
        for tensor in packed.tensors().values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
