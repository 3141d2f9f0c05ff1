"""Mixed layouts: planes and outliers of each linear for a total number of bits, by measured sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
        raise ValueError(
            f"target_bits: {target_bits:g} bits per weight cannot be met, "
            f"the smallest layouts need {smallest / weights:.3f}"
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
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Candidate]]:
    """Packs every linear in every way and estimates what each does to the model's loss.

    The loss of a candidate is its squared output error, tr(E H E'), times how much the model minds an error there: the
    mean squared gradient of -log p by the linear's outputs, p being what the model itself predicts, on a few windows
    (the diagonal of the Fisher information, one number for each linear).

    Args:
        model: the original; takes `input_ids` and returns an object with `logits`.
        weights: by name of linear.
        statistics: of their inputs.
        windows: int64 [windows, window], a few.
        outlier_fraction: outliers over weights in a row; with the most planes also twice and four times as many.
        rounds: of refinement; one is enough to compare.
        enlargement: count bits as if matrices had so many times the rows and columns.
        progress: called after each linear with how many are done and how many there are.
    """
    with _one_thread():
        sensitivities = _output_sensitivities(model, list(weights), windows)
    candidates: dict[str, list[Candidate]] = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        hessian = statistics[name].hessian
        exact = weight.detach().float()
        with _one_thread():
            signal = float(((exact @ hessian) * exact).sum(dtype=torch.float64))
        candidates[name] = []
        for count in planes:
            multiples = _OUTLIER_MULTIPLES_AT_MOST_PLANES if count == max(planes) else (1,)
            for outliers in sorted({outlier_count(columns, min(1.0, m * outlier_fraction)) for m in multiples}):
                calibrated = quantize_weight_calibrated(exact, hessian, planes=count, outliers=outliers, rounds=rounds)
                layout = PackedLayout(rows * enlargement, columns * enlargement, count, outliers * enlargement)
                loss = sensitivities[name] * signal * calibrated.losses[-1]
                candidates[name].append(
                    Candidate(count, outliers, 8 * layout.nbytes // enlargement**2, rows * columns, loss)
                )
        if progress is not None:
            progress(len(candidates), len(weights))
    return candidates


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
    """Mean over tokens and outputs of the squared gradient of -log p at tokens drawn from the model itself."""
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)

    def hook_of(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            def measure(gradient: torch.Tensor) -> None:
                sums[name] += float(gradient.square().sum(dtype=torch.float64))
                counts[name] += gradient.numel()

            output.register_hook(measure)

        return hook

    required = [parameter.requires_grad for parameter in model.parameters()]
    was_training = model.training
    model.eval().requires_grad_(False)
    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        for window in windows:
            # Gradients start at the embedded tokens: parameters need none.
            inputs = embeddings(window[None]).detach().requires_grad_(True)
            logits = model(inputs_embeds=inputs, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            (-logits.log_softmax(-1).gather(-1, drawn).sum()).backward()
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
        while len(hull) >= 2 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], candidate):
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
