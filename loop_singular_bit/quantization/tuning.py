"""Tuning packed weights by KL to the original: scales and outliers, which change no bit, or signs as well.

Errors of single layers are not what counts: what a model says is. Scales alone are a thousandth of the parameters and
win back a third of the KL divergence at one bit. Gains of norms need no tuning: column scales do the same for each
linear.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loop_singular_bit.packed_weight import PackedWeight
from loop_singular_bit.reference import pack_signs, unpack_signs

_MULTIPLE_SUM = 126
_LARGEST_DELTA = 127
_LARGEST_FLOAT16 = 65504.0
_SMALLEST_FLOAT16 = 2.0**-24


@dataclass(frozen=True)
class TuningOptions:
    """How to tune.

    Args:
        signs: also tune signs, by a latent weight for each (straight-through estimator; 8 bytes more per weight).
        steps: of the optimizer.
        batch: windows per step.
        learning_rate: of scales and outliers, relative to their size.
        sign_learning_rate: of the latent weights, relative to the scales of their row.
        held_out_share: one of so many windows is held out and decides whether the result is kept.
        checkpoint_steps: steps between two checkpoints.
        seed: of the order of the windows.
    """

    signs: bool = False
    steps: int = 60
    batch: int = 4
    learning_rate: float = 4e-3
    sign_learning_rate: float = 3e-2
    held_out_share: int = 8
    checkpoint_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.held_out_share < 2:
            raise ValueError(f"held_out_share: expected at least 2, got {self.held_out_share}")


@dataclass(frozen=True)
class TuningProgress:
    """Handed to the callback after every step; kl_divergence is that of the step's windows, in nats per token."""

    step: int
    steps: int
    kl_divergence: float
    seconds: float
    eta_seconds: float


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


def tune(
    model: nn.Module,
    packed_weights: Mapping[str, PackedWeight],
    windows: torch.Tensor,
    options: TuningOptions | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[TuningProgress], None] | None = None,
) -> TuningResult:
    """Trains packed weights to make the model say what the original says.

    Minimizes KL(original || packed) at every token by AdamW. The original is not changed; beside it there are the
    signs, a byte for each, the parameters with two moments each, and one dense weight at a time. Runs with the same
    number of threads on the same kind of machine give the same bytes.

    Args:
        model: the original; takes `input_ids` [batch, window] and returns an object with `logits`.
        packed_weights: by name of linear of the model; the other modules are those of the original.
        windows: int64 [windows, window], see `calibration_windows`; at least two.
        checkpoint: file that is written every few steps, and continued if it is of the same work. Removed at the end.
        progress: called after each step.

    Raises:
        ValueError: too few windows, a name that is no linear of the model, or a packed weight with means.
    """
    options = options or TuningOptions()
    held_out = torch.arange(len(windows)) % options.held_out_share == options.held_out_share - 1
    if len(windows) < 2:
        raise ValueError(f"windows: expected at least 2, one of them held out, got {len(windows)}")
    if not held_out.any():
        held_out[-1] = True
    student = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    student.eval()
    tunables: dict[str, _TunableLinear] = {}
    for name, packed in packed_weights.items():
        linear = student.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name}: expected an nn.Linear of the model, got {type(linear).__name__}")
        if packed.means is not None:
            raise ValueError(f"{name}: weights with means are not tuned")
        tunables[name] = _TunableLinear(packed, linear, options.signs)
        parent, _, child = name.rpartition(".")
        setattr(student.get_submodule(parent), child, tunables[name])

    was_training, required = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        before = _kl_divergence(model, student, windows[held_out])
        _train(model, student, tunables, windows[~held_out], options, checkpoint, progress)
        tuned = {name: tunable.packed() for name, tunable in tunables.items()}
        for name, tunable in tunables.items():
            tunable.load(tuned[name])
        after = _kl_divergence(model, student, windows[held_out])
    finally:
        model.train(was_training)
        for parameter, requires in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(requires)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    kept = after < before
    changed = sum(_changed_signs(packed_weights[name], tuned[name]) for name in tuned)
    total = sum(packed.planes * packed.out_features * packed.in_features for packed in packed_weights.values())
    return TuningResult(tuned if kept else dict(packed_weights), before, after, kept, changed / total if kept else 0.0)


class _TunableLinear(nn.Module):
    """A linear whose weight is made anew in every call, from signs and from what is tuned relative to its start."""

    def __init__(self, packed: PackedWeight, linear: nn.Linear, signs: bool) -> None:
        super().__init__()
        self.bias = linear.bias
        self.rows, self.columns, self.planes = packed.out_features, packed.in_features, packed.planes
        self.has_column_scales = packed.column_scales is not None
        self.outlier_columns = _by_row(packed.outlier_columns.to(torch.int64), self.rows)
        self.stored_columns = packed.outlier_columns
        self.load(packed)
        self.scale_change = nn.Parameter(torch.zeros(self.planes, self.rows))
        self.column_change = nn.Parameter(torch.zeros(self.columns)) if self.has_column_scales else None
        self.outlier_change = nn.Parameter(torch.zeros_like(self.outlier_values))
        self.latent_change: nn.Parameter | None = None
        if signs:
            self.latent = self._latent(linear.weight.detach().float())
            self.latent_change = nn.Parameter(torch.zeros(self.rows, self.columns))

    def load(self, packed: PackedWeight) -> None:
        """Starts from a packed weight; what was tuned before is forgotten."""
        self.signs = unpack_signs(packed.signs, self.rows, self.columns)
        self.scales = _by_row(packed.scales.float(), self.rows).T.contiguous()  # [planes, rows]
        self.unit = self.scales.sum(0).clamp_min(_SMALLEST_FLOAT16)
        scales = packed.column_scales
        self.column_scales = torch.ones(self.columns) if scales is None else scales.float()
        steps = packed.outlier_scales.reshape(-1)[: self.rows, None].float()
        self.outlier_values = _by_row(packed.outlier_deltas.float(), self.rows) * steps
        # Padding slots repeat a column and stay 0.
        self.is_outlier = torch.ones_like(self.outlier_values, dtype=torch.bool)
        self.is_outlier[:, 1:] = self.outlier_columns[:, 1:] != self.outlier_columns[:, :-1]
        for name in ("scale_change", "column_change", "outlier_change", "latent_change"):
            if isinstance(parameter := getattr(self, name, None), nn.Parameter):
                parameter.data.zero_()
        if getattr(self, "latent_change", None) is not None:
            self.latent_change = None

    def scale_parameters(self) -> list[nn.Parameter]:
        return [
            parameter
            for parameter in (self.scale_change, self.column_change, self.outlier_change)
            if parameter is not None
        ]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = _TunedProduct.apply(
            input, self.scale_change, self.column_change, self.outlier_change, self.latent_change, self
        )
        return output if self.bias is None else output + self.bias

    def tuned_scales(self) -> torch.Tensor:
        return self.scales * (1 + self.scale_change.detach()).clamp_min(0.01)

    def tuned_columns(self) -> torch.Tensor:
        if self.column_change is None:
            return self.column_scales
        return self.column_scales * (1 + self.column_change.detach()).clamp_min(0.01)

    def tuned_outliers(self) -> torch.Tensor:
        return self.outlier_values + self.outlier_change.detach() * self.unit[:, None] * self.is_outlier

    def tuned_signs(self) -> torch.Tensor:
        if self.latent_change is None:
            return self.signs
        return self._nearest_signs(self.latent + self.latent_change.detach() * self.unit[:, None])

    def rows_over_column_scales(self, signs: torch.Tensor) -> torch.Tensor:
        """weight / column_scales."""
        values = torch.zeros(self.rows, self.columns)
        for sign, scale in zip(signs, self.tuned_scales(), strict=True):
            values += torch.where(sign, scale[:, None], -scale[:, None])
        return values.scatter_add_(1, self.outlier_columns, self.tuned_outliers())

    def packed(self) -> PackedWeight:
        """What was tuned, rounded to the format."""
        columns = self.tuned_columns().clamp(_SMALLEST_FLOAT16, _LARGEST_FLOAT16).half()
        scales = _snapped(self.tuned_scales(), self.scales)
        outliers = self.tuned_outliers()
        steps = (outliers.abs().amax(1) / _LARGEST_DELTA).half() if outliers.shape[1] else torch.zeros(self.rows).half()
        exact = steps.float()[:, None]
        deltas = torch.where(exact > 0, outliers / exact, 0.0).round().clamp(-_LARGEST_DELTA, _LARGEST_DELTA)
        return PackedWeight(
            pack_signs(self.tuned_signs()),
            _tiled(scales.T),
            self.stored_columns,
            _tiled(deltas.to(torch.int8)),
            _tiled(steps[:, None])[:, 0].contiguous(),
            out_features=self.rows,
            in_features=self.columns,
            column_scales=columns if self.has_column_scales else None,
        )

    def _levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [2^planes, rows] and their signs [2^planes, planes]."""
        patterns = torch.tensor(
            [[number >> plane & 1 for plane in range(self.planes)] for number in range(2**self.planes)]
        )
        return (2.0 * patterns - 1) @ self.tuned_scales(), patterns.bool()

    def _nearest_signs(self, values: torch.Tensor) -> torch.Tensor:
        levels, patterns = self._levels()
        best = (values - levels[0][:, None]).abs()
        number = torch.zeros(values.shape, dtype=torch.int64)
        for index in range(1, len(levels)):
            distance = (values - levels[index][:, None]).abs()
            number[distance < best] = index
            best = torch.minimum(best, distance)
        return patterns[number].permute(2, 0, 1)

    def _latent(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense weight where its nearest level is the present one, else a little inside of that level's cell."""
        present = torch.zeros(self.rows, self.columns)
        for sign, scale in zip(self.signs, self.scales, strict=True):
            present += torch.where(sign, scale[:, None], -scale[:, None])
        exact = weight / self.column_scales
        levels, _ = torch.sort(self._levels()[0], dim=0)
        margin = 0.02 * self.unit[:, None]
        low = torch.full_like(present, -math.inf)
        high = torch.full_like(present, math.inf)
        for below, above in itertools.pairwise(levels):
            middle = ((below + above) / 2)[:, None]
            low = torch.where(present > middle, torch.maximum(low, middle + margin), low)
            high = torch.where(present <= middle, torch.minimum(high, middle - margin), high)
        return torch.maximum(torch.minimum(exact, high), low)


class _TunedProduct(torch.autograd.Function):
    """input W'; W is made in forward and again in backward, so that no dense weight outlives a call."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        scale_change: torch.Tensor,
        column_change: torch.Tensor | None,
        outlier_change: torch.Tensor,
        latent_change: torch.Tensor | None,
        linear: _TunableLinear,
    ) -> torch.Tensor:
        ctx.save_for_backward(input)
        ctx.linear = linear
        weight = linear.rows_over_column_scales(linear.tuned_signs()) * linear.tuned_columns()
        return input @ weight.to(input.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        linear: _TunableLinear = ctx.linear
        signs = linear.tuned_signs()
        values = linear.rows_over_column_scales(signs)
        columns = linear.tuned_columns()
        grad_input = grad_output @ (values * columns).to(grad_output.dtype)
        grad_weight = grad_output.reshape(-1, linear.rows).T @ input.reshape(-1, linear.columns)
        grad_weight = grad_weight.float()
        grad_columns = None if linear.column_change is None else (grad_weight * values).sum(0) * linear.column_scales
        grad_values = grad_weight * columns
        grad_scales = torch.stack([torch.where(sign, grad_values, -grad_values).sum(1) for sign in signs])
        grad_outliers = grad_values.gather(1, linear.outlier_columns) * linear.unit[:, None] * linear.is_outlier
        grad_latent: torch.Tensor | None = None
        if linear.latent_change is not None:
            latent = linear.latent + linear.latent_change.detach() * linear.unit[:, None]
            # Far outside the levels a latent weight could not come back.
            inside = latent.abs() < 1.5 * linear.unit[:, None]
            grad_latent = grad_values * inside * linear.unit[:, None]
        return grad_input, grad_scales * linear.scales, grad_columns, grad_outliers, grad_latent, None


def _train(
    model: nn.Module,
    student: nn.Module,
    tunables: Mapping[str, _TunableLinear],
    windows: torch.Tensor,
    options: TuningOptions,
    checkpoint: Path | None,
    progress: Callable[[TuningProgress], None] | None,
) -> None:
    scales = [parameter for tunable in tunables.values() for parameter in tunable.scale_parameters()]
    latents = [tunable.latent_change for tunable in tunables.values() if tunable.latent_change is not None]
    groups = [{"params": scales, "lr": options.learning_rate}, {"params": latents, "lr": options.sign_learning_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = scales + latents
    identity = {**asdict(options), "windows": int(windows.sum()), "parameters": [p.numel() for p in parameters]}
    first = _restore(checkpoint, identity, parameters, optimizer)
    start = time.perf_counter()
    for step in range(first, options.steps):
        batch = windows[_chosen_windows(step, len(windows), options)]
        warm_up = min(1.0, (step + 1) / 10)
        cosine = max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm_up * cosine
        optimizer.zero_grad()
        with torch.no_grad():
            expected = torch.log_softmax(model(input_ids=batch, use_cache=False).logits.float(), -1)
        given = torch.log_softmax(student(input_ids=batch, use_cache=False).logits.float(), -1)
        loss = (expected.exp() * (expected - given)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        if checkpoint is not None and (step + 1) % options.checkpoint_steps == 0:
            _save(checkpoint, identity, step + 1, parameters, optimizer)
        if progress is not None:
            seconds = time.perf_counter() - start
            eta = seconds / (step + 1 - first) * (options.steps - step - 1)
            progress(TuningProgress(step + 1, options.steps, loss.item(), seconds, eta))


def _chosen_windows(step: int, count: int, options: TuningOptions) -> torch.Tensor:
    """Windows of one step: every epoch goes through all of them in an order of its own."""
    positions = torch.arange(step * options.batch, (step + 1) * options.batch)
    chosen = []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(options.seed + position // count)
        chosen.append(torch.randperm(count, generator=generator)[position % count])
    return torch.stack(chosen)


def _save(
    checkpoint: Path, identity: Any, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    values = [parameter.detach() for parameter in parameters]
    torch.save({"identity": identity, "step": step, "values": values, "optimizer": optimizer.state_dict()}, partial)
    partial.replace(checkpoint)


def _restore(
    checkpoint: Path | None, identity: Any, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Steps that an interrupted run of the same work has done."""
    if checkpoint is None or not checkpoint.is_file():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    if saved["identity"] != identity:
        return 0
    for parameter, value in zip(parameters, saved["values"], strict=True):
        parameter.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


@torch.no_grad()
def _kl_divergence(model: nn.Module, student: nn.Module, windows: torch.Tensor) -> float:
    """Mean over the tokens of KL(original || student), in nats."""
    total = 0.0
    for window in windows:
        expected = torch.log_softmax(model(input_ids=window[None], use_cache=False).logits.float(), -1)
        given = torch.log_softmax(student(input_ids=window[None], use_cache=False).logits.float(), -1)
        # Per token first: a float32 sum over millions of terms would be wrong by more than what is measured.
        total += float((expected.exp() * (expected - given)).sum(-1).double().mean())
    return total / len(windows)


def _snapped(scales: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """float16 scales [planes, rows]: whole multiples, that add up to 126, of a unit for each row.

    Rows whose planes would change their order keep the scales from before.
    """
    planes = len(scales)
    if planes == 1:
        return scales.half()
    total = scales.sum(0)
    exact = _MULTIPLE_SUM * scales / total.clamp_min(_SMALLEST_FLOAT16)
    multiples = exact.round()
    multiples[0] = _MULTIPLE_SUM - multiples[1:].sum(0)
    unit = (scales * multiples).sum(0) / multiples.square().sum(0)
    snapped = (multiples * unit).clamp_max(_LARGEST_FLOAT16).half()
    ordered = (multiples[:-1] >= multiples[1:]).all(0) & (total > 0)
    return torch.where(ordered, snapped, before.half())


def _by_row(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[row_tiles, X, 32] -> [rows, X]."""
    return tensor.transpose(1, 2).reshape(-1, tensor.shape[1])[:rows].contiguous()


def _tiled(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, X] -> [row_tiles, X, 32], zeros in padded rows."""
    rows, width = tensor.shape
    padded = torch.zeros(-(-rows // 32) * 32, width, dtype=tensor.dtype)
    padded[:rows] = tensor
    return padded.reshape(-1, 32, width).transpose(1, 2).contiguous()


def _changed_signs(before: PackedWeight, after: PackedWeight) -> int:
    rows, columns = before.out_features, before.in_features
    return int((unpack_signs(before.signs, rows, columns) != unpack_signs(after.signs, rows, columns)).sum())
