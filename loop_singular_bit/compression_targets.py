"""Targets of bits or bytes to layouts: which linear gets how many planes and outliers, so that the total is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from . import ops
from .checkpoint_directory import CheckpointDirectory
from .compression_plan import CompressionPlan, PackedModule
from .packed_weight import PackedLayout
from .quantization.allocation import Candidate, allocate, candidate_layouts
from .quantization.presets import Preset
from .quantization.quantize_weight import quantize_weight
from .row_errors import RowErrors

Layouts = dict[str, tuple[int, int]]
"""Planes and outliers per row by name of linear."""

_SAMPLED_ROWS = 256


def linears_of(plan: CompressionPlan) -> list[PackedModule]:
    """What a target chooses layouts for: the packed modules but embeddings and output heads."""
    return [module for module in plan.packed_modules if not module.is_embedding_or_head]


def choose_layouts(
    candidates: Mapping[str, Sequence[Candidate]],
    make_plan: Callable[[Layouts], CompressionPlan],
    *,
    target_bits: float | None = None,
    target_storage_gb: float | None = None,
) -> Layouts:
    """Layouts with the least loss within a target.

    Args:
        candidates: by name of linear; linears without candidates keep the preset's layout, and count.
        make_plan: the plan of a checkpoint with given layouts; those not given are the preset's.
        target_bits: stored bits per weight of all linears; None means as many as the preset takes.
        target_storage_gb: bytes of the packed shards in 10^9, everything in them counted.

    Raises:
        ValueError: the target is less than the smallest layouts take; says what can be reached. Or both are given.
    """
    if target_bits is not None and target_storage_gb is not None:
        raise ValueError("target_bits and target_storage_gb: expected one of them, got both")
    if not candidates:
        return {}
    linears = linears_of(make_plan({}))
    weights = sum(module.layout.out_features * module.layout.in_features for module in linears)
    if target_storage_gb is None:
        own_bits = sum(8 * module.nbytes for module in linears)
        return _allocate(candidates, linears, own_bits if target_bits is None else target_bits * weights)
    smallest, largest = (make_plan(_extreme(candidates, choose)) for choose in (min, max))
    target = int(target_storage_gb * 1e9)
    if target < smallest.output_bytes:
        of_linears = sum(module.nbytes for module in linears_of(smallest))
        raise ValueError(
            f"target_storage_gb: {target_storage_gb:g} GB cannot be met: {smallest.output_bytes / 1e9:.6g} GB is the "
            f"least, with linears at {8 * of_linears / weights:.3f} bits per weight and "
            f"{(smallest.output_bytes - of_linears) / 1e9:.6g} GB of embeddings, heads and what is kept; "
            f"{largest.output_bytes / 1e9:.6g} GB is the most that is of use"
        )
    # Headers of shards are longer for larger offsets: by bytes, which the second trial knows.
    available = target
    while True:
        plan = make_plan(_extreme(candidates, min))
        others = plan.output_bytes - sum(module.nbytes for module in linears_of(plan))
        layouts = _allocate(candidates, linears, 8 * max(available - others, 0))
        excess = make_plan(layouts).output_bytes - target
        if excess <= 0:
            return layouts
        available -= excess


def check_target(
    make_plan: Callable[[Layouts], CompressionPlan],
    *,
    target_bits: float | None = None,
    target_storage_gb: float | None = None,
) -> None:
    """Refuses a target that no layouts meet, before anything is measured.

    Raises:
        ValueError: see `choose_layouts`.
    """
    plan = make_plan({})
    candidates = {
        module.name: [
            Candidate(layout.planes, layout.outliers, 8 * layout.nbytes, layout.out_features * layout.in_features, 0.0)
            for layout in _layouts_of(module, plan)
        ]
        for module in linears_of(plan)
    }
    choose_layouts(candidates, make_plan, target_bits=target_bits, target_storage_gb=target_storage_gb)


def measure_weight_candidates(source: CheckpointDirectory, plan: CompressionPlan) -> dict[str, list[Candidate]]:
    """What the layouts of each linear cost without a text to judge by: errors of weights, nothing else.

    The loss is the relative squared error times the square root of the number of weights. It knows nothing of what a
    linear is for. Measured on the bundled model it chooses uniform planes where these fill the target, and between
    two such sizes it is far better than the smaller of them (0.51 nats of KL divergence at 1.84 bits, where 1 plane has
    0.98); weighting by the number of weights, or by the squared error itself, was worse than uniform.

    Errors are those of 256 rows of each linear, evenly spread, so that it takes seconds and little memory.
    """
    candidates: dict[str, list[Candidate]] = {}
    for module in linears_of(plan):
        rows = module.layout.out_features
        count = min(rows, _SAMPLED_ROWS)
        chosen = (torch.arange(count, dtype=torch.int64) * rows // count).tolist()
        weight = source.reader(module.source.name).read_selected_rows(module.source.name, chosen)
        if not torch.isfinite(weight).all():
            continue  # The compression will name file, row and column.
        scales = ops.fit_column_scales(weight) if module.layout.column_scales else False
        candidates[module.name] = [
            _weight_candidate(weight, scales, plan.preset, layout) for layout in _layouts_of(module, plan)
        ]
    return candidates


def _layouts_of(module: PackedModule, plan: CompressionPlan) -> list[PackedLayout]:
    """What a linear may be packed as."""
    fraction = plan.preset.outlier_fraction if plan.outlier_fraction is None else plan.outlier_fraction
    return [
        replace(module.layout, planes=planes, outliers=outliers)
        for planes, outliers in candidate_layouts(module.layout.in_features, fraction)
    ]


def _weight_candidate(
    weight: torch.Tensor, column_scales: torch.Tensor | bool, preset: Preset, layout: PackedLayout
) -> Candidate:
    packed = quantize_weight(
        weight,
        preset,
        planes=layout.planes,
        outlier_fraction=layout.outliers / layout.in_features,
        column_scales=column_scales,
    )
    errors = RowErrors(len(weight))
    errors.add(0, weight, packed)
    relative = errors.squared_error / errors.squared_weight if errors.squared_weight > 0 else 0.0
    weights = layout.out_features * layout.in_features
    return Candidate(layout.planes, layout.outliers, 8 * layout.nbytes, weights, relative * weights**0.5)


def _allocate(
    candidates: Mapping[str, Sequence[Candidate]], linears: Sequence[PackedModule], budget_bits: float
) -> Layouts:
    fixed = [module for module in linears if module.name not in candidates]
    weights = sum(some[0].weights for some in candidates.values())
    return allocate(candidates, (budget_bits - sum(8 * module.nbytes for module in fixed)) / max(weights, 1))


def _extreme(candidates: Mapping[str, Sequence[Candidate]], choose: Callable[..., Candidate]) -> Layouts:
    chosen = {name: choose(some, key=lambda one: one.bits) for name, some in candidates.items()}
    return {name: (one.planes, one.outliers) for name, one in chosen.items()}
