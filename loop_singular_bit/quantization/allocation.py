"""Mixed layouts: planes and outliers of each linear for a total number of bits, by measured sensitivity."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from loop_singular_bit.packed_weight import PackedLayout
from loop_singular_bit.quantization.calibration import StatisticsStore
from loop_singular_bit.quantization.presets import outlier_count
from loop_singular_bit.quantization.quantize_calibrated import quantize_weight_calibrated

CANDIDATE_PLANES = (1, 2, 3, 4)
# Beyond the most planes, more outliers are what is left to buy.
_OUTLIER_MULTIPLES_AT_MOST_PLANES = (1, 2, 4)
_DEFAULT_OUTLIER_FRACTION = 1 / 128
_BISECTIONS = 60
_STRAIGHT = 1e-9
# Rows do not depend on each other: enough of them to compare layouts by, and few enough to cost less than packing once.
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Candidate:
    """One way to pack one linear.

    Attributes:
        bits: stored.
        weights: of the linear.
        loss: what it costs, in any unit that adds up over linears.
    """

    planes: int
    outliers: int
    bits: int
    weights: int
    loss: float


def candidate_layouts(columns: int, outlier_fraction: float) -> list[tuple[int, int]]:
    """(planes, outliers per row) that a linear may get: 1 to 4 planes, with 4 also two and four times the outliers."""
    return [
        (planes, outliers) for planes in CANDIDATE_PLANES for outliers in _outliers(columns, planes, outlier_fraction)
    ]


def _outliers(columns: int, planes: int, fraction: float, most_planes: int = max(CANDIDATE_PLANES)) -> list[int]:
    multiples = _OUTLIER_MULTIPLES_AT_MOST_PLANES if planes == most_planes else (1,)
    return sorted({outlier_count(columns, min(1.0, multiple * fraction)) for multiple in multiples})


def allocate(candidates: Mapping[str, Sequence[Candidate]], target_bits: float) -> dict[str, tuple[int, int]]:
    """Planes and outliers per row of each linear with the least total loss for at most target_bits per weight.

    Every linear's candidates are reduced to the lower convex hull of loss against bits; on hulls the best choice for
    one price of a bit is found linear by linear, and the price is bisected (Shoham and Gersho 1988). What the last
    price leaves over is spent on the steps that win most per bit.

    Raises:
        ValueError: no candidates, or target_bits is less than the smallest ones need.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one linear")
    hulls = {name: _lower_hull(some) for name, some in candidates.items()}
    weights = sum(hull[0].weights for hull in hulls.values())
    budget = target_bits * weights
    smallest = sum(hull[0].bits for hull in hulls.values())
    if smallest > budget:
        largest = sum(max(one.bits for one in some) for some in candidates.values())
        raise ValueError(
            f"target_bits: {target_bits:.4g} bits per weight cannot be met: the smallest layouts need "
            f"{smallest / weights:.3f}, the largest {largest / weights:.3f}"
        )
    free, dear = 0.0, 1.0
    while _total_bits(hulls, chosen := _choose(hulls, dear)) > budget:
        dear *= 4
    for _ in range(_BISECTIONS):
        price = (free + dear) / 2
        trial = _choose(hulls, price)
        if _total_bits(hulls, trial) > budget:
            free = price
        else:
            dear, chosen = price, trial
    _spend(hulls, chosen, budget)
    return {name: (hulls[name][index].planes, hulls[name][index].outliers) for name, index in chosen.items()}


def measure_candidates(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    statistics: StatisticsStore,
    windows: torch.Tensor,
    *,
    planes: Sequence[int] = CANDIDATE_PLANES,
    outlier_fraction: float = _DEFAULT_OUTLIER_FRACTION,
    rounds: int = 1,
    enlargement: int = 1,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Candidate]]:
    """Packs every linear in every way and estimates what each does to what the model puts out.

    The loss of a candidate is its squared output error, tr(E H E'), times how much the model minds an error there: the
    mean squared gradient, by the linear's outputs, of -log p for a language model, p being what it predicts itself (the
    diagonal of the Fisher information, one number for each linear), and of the last hidden states in a random direction
    for another model (their squared change, to first order), on a few windows.

    Of a linear with more than 256 rows that many are packed, evenly spread, and stand for the others.

    Args:
        model: the original; takes `input_ids`. With `logits` in what it returns it is a language model.
        weights: by name of linear.
        statistics: of their inputs.
        windows: int64 [windows, window], a few.
        outlier_fraction: outliers over weights in a row; with the most planes also twice and four times as many.
        rounds: of refinement; one is enough to compare.
        enlargement: count bits as if matrices had so many times the rows and columns.
        checkpoint: file that is written linear by linear, and continued: it must be of the same work.
        progress: called after each linear with how many are done and how many there are.
    """
    stored = _StoredMeasurements(checkpoint)
    if stored.sensitivities is None:
        with _one_thread():
            stored.set_sensitivities(_output_sensitivities(model, list(weights), windows))
    sensitivities = stored.sensitivities
    assert sensitivities is not None
    for name, weight in weights.items():
        if name not in stored.candidates:
            stored.add(
                name,
                _measure_linear(
                    weight, statistics[name].hessian, sensitivities[name], planes, outlier_fraction, rounds, enlargement
                ),
            )
        if progress is not None:
            progress(len(stored.candidates), len(weights))
    return {name: stored.candidates[name] for name in weights}


def _measure_linear(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sensitivity: float,
    planes: Sequence[int],
    outlier_fraction: float,
    rounds: int,
    enlargement: int,
) -> list[Candidate]:
    rows, columns = weight.shape
    count = min(rows, SAMPLED_ROWS)
    exact = weight.detach()[torch.arange(count) * rows // count].float()
    with _one_thread():
        signal = float(((exact @ hessian) * exact).sum(dtype=torch.float64)) * rows / count
    candidates = []
    for plane_count in planes:
        for outliers in _outliers(columns, plane_count, outlier_fraction, max(planes)):
            calibrated = quantize_weight_calibrated(
                exact, hessian, planes=plane_count, outliers=outliers, rounds=rounds
            )
            layout = PackedLayout(rows * enlargement, columns * enlargement, plane_count, outliers * enlargement)
            loss = sensitivity * signal * calibrated.losses[-1]
            candidates.append(
                Candidate(plane_count, outliers, 8 * layout.nbytes // enlargement**2, rows * columns, loss)
            )
    return candidates


class _StoredMeasurements:
    """Sensitivities, then candidates linear by linear, as lines of JSON; a line that a kill cut off is forgotten."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.sensitivities: dict[str, float] | None = None
        self.candidates: dict[str, list[Candidate]] = {}
        if path is None or not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")[:-1]
        os.truncate(path, sum(len(line) + 1 for line in lines))
        for line in map(json.loads, lines):
            if "sensitivities" in line:
                self.sensitivities = line["sensitivities"]
            else:
                self.candidates[line["name"]] = [Candidate(**fields) for fields in line["candidates"]]

    def set_sensitivities(self, sensitivities: dict[str, float]) -> None:
        self.sensitivities = sensitivities
        self._append({"sensitivities": sensitivities})

    def add(self, name: str, candidates: list[Candidate]) -> None:
        self.candidates[name] = candidates
        self._append({"name": name, "candidates": [asdict(one) for one in candidates]})

    def _append(self, line: dict[str, object]) -> None:
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layouts must not depend on how many threads a sum of floats is split among."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _output_sensitivities(model: nn.Module, names: Sequence[str], windows: torch.Tensor) -> dict[str, float]:
    """Mean over tokens and outputs of the squared gradient of what the model puts out, drawn at random once per token.

    Of a language model -log p at a token drawn from its own prediction; of another the product of the last hidden state
    (and of the pooled one) with a normal vector, the expectation of whose square is that of the Jacobian.
    """
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)

    def hook_of(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            def measure(gradient: torch.Tensor) -> None:
                sums[name] += float(gradient.square().sum(dtype=torch.float64))
                counts[name] += gradient.numel()

            if output.requires_grad:
                output.register_hook(measure)

        return hook

    def start_gradients(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(True)  # parameters need none

    required = [parameter.requires_grad for parameter in model.parameters()]
    was_training = model.training
    model.eval().requires_grad_(False)
    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(start_gradients))
    try:
        for window in windows:
            output = model(input_ids=window[None])
            if getattr(output, "logits", None) is not None:
                logits = output.logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                (-logits.log_softmax(-1).gather(-1, drawn).sum()).backward()
            else:
                outputs = [output[0], getattr(output, "pooler_output", None)]
                products = [
                    (tensor * torch.randn(tensor.shape, generator=generator)).sum()
                    for tensor in outputs
                    if tensor is not None
                ]
                torch.stack(products).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        for parameter, requires in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(requires)
    return {name: sums[name] / max(counts[name], 1) for name in names}


def _lower_hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull of loss against bits, from few bits to many, loss falling."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.bits, one.loss)):
        if hull and candidate.loss >= hull[-1].loss:
            continue
        # On a straight line points stay, whatever the last digit says: they are the smaller steps.
        while len(hull) >= 2 and _gain(hull[-2], hull[-1]) < (1 - _STRAIGHT) * _gain(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    if not hull:
        raise ValueError("candidates: expected at least one for every linear")
    return hull


def _gain(smaller: Candidate, larger: Candidate) -> float:
    """Loss that a bit saves between two candidates."""
    return (smaller.loss - larger.loss) / max(larger.bits - smaller.bits, 1)


def _choose(hulls: Mapping[str, list[Candidate]], price: float) -> dict[str, int]:
    """Index into each linear's hull: as far as every step saves more loss than its bits cost."""
    chosen = {}
    for name, hull in hulls.items():
        index = 0
        while index + 1 < len(hull) and _gain(hull[index], hull[index + 1]) > price:
            index += 1
        chosen[name] = index
    return chosen


def _total_bits(hulls: Mapping[str, list[Candidate]], choice: Mapping[str, int]) -> int:
    return sum(hulls[name][index].bits for name, index in choice.items())


def _spend(hulls: Mapping[str, list[Candidate]], choice: dict[str, int], budget: float) -> None:
    """Takes the next step of a hull while one fits, the most useful first."""
    left = budget - _total_bits(hulls, choice)
    while True:
        steps = [
            (_gain(hull[choice[name]], hull[choice[name] + 1]), name)
            for name, hull in hulls.items()
            if choice[name] + 1 < len(hull) and hull[choice[name] + 1].bits - hull[choice[name]].bits <= left
        ]
        if not steps:
            return
        _, name = max(steps)
        left -= hulls[name][choice[name] + 1].bits - hulls[name][choice[name]].bits
        choice[name] += 1
