"""The operators of `torch.ops.loop_singular_bit`: loads _C, wraps, gives fakes and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.exists():
    raise ImportError(
        f"loop_singular_bit: the compiled operators are missing ({_LIBRARY}). In a clone of the repository type "
        "'make build', or 'pip install --no-build-isolation -e .' in an environment that has torch."
    )
try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    raise ImportError(
        f"loop_singular_bit: {_LIBRARY} does not load into torch {torch.__version__}: {error}. It was probably built "
        "for another version of torch; build it again: 'pip install --no-build-isolation --force-reinstall -e .'"
    ) from error

PackedTensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]
"""signs, scales, outlier_columns, outlier_deltas, outlier_scales, column_scales, means."""

_ops = torch.ops.loop_singular_bit

_packed_linear = _ops.packed_linear.default
_packed_linear_group = _ops.packed_linear_group.default

ACTIVATION_PRECISIONS = ("int8", "int16", "exact")

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS_PER_TILE = 32
_COLUMNS_PER_WORD = 32
# Rows of a weight that the gradient dequantizes at once: 2048 x 14336 in bfloat16 are 59 MB.
_BACKWARD_ROWS = 2048
# As packed_linear_group takes them: packed tensors and bias.
_TENSORS_PER_WEIGHT = 8


def fit_column_scales(weight: torch.Tensor, column_importance: torch.Tensor | None = None) -> torch.Tensor:
    """Column scales g^(3/4) of the rank-1 fit |weight[n, k]| ~ r[n] g[k] by alternating least squares.

    The row-by-column scales of ARB-LLM (Li et al. 2024, arXiv 2410.03129), fitted before signs are chosen. The exponent
    is measured: at 2, 3 and 4 planes it lowers the weight error a little against the full g.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16.
        column_importance: float32 [in_features], >= 0; None weighs all columns alike.

    Returns:
        float16 [in_features], mean 1, at least 0.05.

    Raises:
        ValueError: NaN or infinity in the weight.
        RuntimeError: wrong shape or dtype.
    """
    return _ops.fit_column_scales(weight, column_importance)


def quantize(
    weight: torch.Tensor,
    planes: int,
    outliers: int,
    column_scales: torch.Tensor | None = None,
    column_importance: torch.Tensor | None = None,
    means: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fits sign planes, row scales and outliers to a weight by alternating least squares, row by row.

    Binary codes by alternating minimisation (Xu et al. 2018, arXiv 1802.00150); outliers are the weights that the
    planes leave the largest error at. Rows do not depend on each other: blocks of a multiple of 32 rows give the bytes
    of the whole weight. The bytes do not depend on the number of threads or the instruction set.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16.
        planes: 1 to 8.
        outliers: per row, 0 to in_features.
        column_scales: float16 [in_features], > 0, divided out first; None means 1.
        column_importance: float32 [in_features], >= 0: weight of each column's squared error; None means 1.
        means: fit one mean per row as well.

    Returns:
        signs, scales, outlier_columns, outlier_deltas, outlier_scales, means; the last is [0, 32] unless `means`.

    Raises:
        ValueError: NaN or infinity in the weight, naming row and column.
        RuntimeError: wrong shape, dtype or range.
    """
    return _ops.quantize(weight, planes, outliers, column_scales, column_importance, means)


def dequantize(
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The dense weight [out_features, in_features] of packed tensors, in float32, bfloat16 or float16.

    Computed in float32 and rounded once. Outlier columns that are out of range are skipped.

    Raises:
        RuntimeError: wrong shape or dtype.
    """
    return _ops.dequantize(
        signs,
        scales,
        outlier_columns,
        outlier_deltas,
        outlier_scales,
        column_scales,
        means,
        out_features,
        in_features,
        dtype=dtype,
    )


def packed_embedding(
    indices: torch.Tensor,
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of a packed weight [num_embeddings, embedding_dim]: indices [...] to [..., embedding_dim].

    Args:
        indices: int64 or int32, any shape, each 0 to num_embeddings - 1.
        dtype: of the result: float32, bfloat16 or float16.

    Raises:
        IndexError: an index is out of range.
        RuntimeError: wrong shape or dtype.
    """
    return _ops.packed_embedding(
        indices,
        signs,
        scales,
        outlier_columns,
        outlier_deltas,
        outlier_scales,
        column_scales,
        means,
        num_embeddings,
        embedding_dim,
        dtype=dtype,
    )


def packed_linear(
    input: torch.Tensor,
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    *,
    activation_precision: str = "int8",
) -> torch.Tensor:
    """`torch.nn.functional.linear` with a packed weight: input [..., in_features] to [..., out_features].

    Differentiable with respect to the input and the bias; the packed tensors are constants.

    Args:
        input: float32, bfloat16 or float16; any leading dimensions, any strides, zero tokens too.
        bias: [out_features] in the dtype of the input.
        activation_precision: what the kernel multiplies signs with. "int8": 8 bits per activation (for few tokens and
            a sign) with one scale per token, whose 16 largest activations stay exact where they stand out; "int16": 16
            bits; "exact": float32. With 4096 Gaussian activations per token the output is off by 0.4 % (few tokens)
            to 0.9 % (many), 0.003 % to 0.02 %, and 0.0001 % of its norm; massive activations do not raise that.

    Returns:
        A contiguous tensor in the dtype of the input.

    Raises:
        ValueError: an unknown activation_precision.
        RuntimeError: wrong shape or dtype.
    """
    arguments = (
        input,
        signs,
        scales,
        outlier_columns,
        outlier_deltas,
        outlier_scales,
        column_scales,
        means,
        bias,
        out_features,
    )
    if _takes_the_dispatcher():
        return _packed_linear(*arguments, activation_precision=activation_precision)
    with torch._C._AutoDispatchBelowAutograd():
        return _packed_linear(*arguments, activation_precision=activation_precision)


def packed_linear_group(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    out_features: Sequence[int],
    *,
    activation_precision: str = "int8",
) -> list[torch.Tensor]:
    """One input times several packed weights in one call: what as many calls of `packed_linear` give, bit for bit.

    For weights that stand side by side, such as those of queries, keys and values: threads are woken once, and weights
    with equal column scales share the prepared activations. Differentiable as `packed_linear` is.

    Args:
        input: as for `packed_linear`.
        weights: the tensors of all weights, as `group_tensors` gives them.
        out_features: of each weight.
        activation_precision: see `packed_linear`.

    Returns:
        One output per weight, contiguous, in the dtype of the input.

    Raises:
        ValueError: no weights, a wrong number of tensors, or an unknown activation_precision.
        RuntimeError: wrong shape or dtype; the message says of which weight.
    """
    if _takes_the_dispatcher():
        return _packed_linear_group(input, weights, out_features, activation_precision=activation_precision)
    with torch._C._AutoDispatchBelowAutograd():
        return _packed_linear_group(input, weights, out_features, activation_precision=activation_precision)


def group_tensors(
    weights: Sequence[PackedTensors], biases: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """The packed tensors and biases of several weights as `packed_linear_group` takes them.

    Eight of each weight: those of `PackedTensors` and the bias, with an empty one for what there is not.

    Args:
        weights: of each weight what `PackedWeight.op_tensors()` gives.
        biases: one entry for each weight, None for those without; None for no biases at all.

    Raises:
        ValueError: another number of biases than of weights.
    """
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases: expected one for each of {len(weights)} weights, got {len(biases)}")
    tensors = [
        tensor for i, packed in enumerate(weights) for tensor in (*packed, None if biases is None else biases[i])
    ]
    return [torch.empty(0) if tensor is None else tensor for tensor in tensors]


def copy_to_huge_pages(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous copies of CPU tensors, one behind the other in memory that is backed by pages of 2 MiB.

    Every copy is a tensor with a storage of its own, which can be saved, pickled and shared like any other; the memory
    is freed with the last of them. Where the kernel has no huge pages (`/sys/kernel/mm/transparent_hugepage/enabled`
    says `never`) it is ordinary memory. For whole models see `huge_pages.move_to_huge_pages`.

    Raises:
        ValueError: an empty list.
        RuntimeError: there is no memory for them.
    """
    if len(tensors) == 0:
        raise ValueError("tensors: expected at least one, got an empty list")
    return _ops.copy_to_huge_pages(tensors)


def _takes_the_dispatcher() -> bool:
    """Gradients are registered from Python, which costs every call 15 µs, those without a gradient too.

    Inference mode skips them by itself.
    """
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled()


def isa() -> str:
    """Name of the instruction set whose kernels run; LOOP_SINGULAR_BIT_ISA in the environment chooses another."""
    return _ops.isa()


def supported_isas() -> list[str]:
    """Names of the instruction sets that this machine can run, best first."""
    return list(_ops.supported_isas())


def set_isa(name: str) -> None:
    """Makes the kernels of one instruction set the active ones, for the whole process.

    Raises:
        ValueError: unknown or unsupported here; the message lists the choices.
    """
    _ops.set_isa(name)


def _row_tiles(out_features: int) -> int:
    return (out_features + _ROWS_PER_TILE - 1) // _ROWS_PER_TILE


def _check_packed(signs: torch.Tensor, outlier_columns: torch.Tensor, out_features: int, in_features: int) -> None:
    torch._check(signs.dim() == 4, lambda: f"signs: expected 4 dimensions, got shape {list(signs.shape)}")
    torch._check(
        outlier_columns.dim() == 3,
        lambda: f"outlier_columns: expected 3 dimensions, got shape {list(outlier_columns.shape)}",
    )
    words = (in_features + _COLUMNS_PER_WORD - 1) // _COLUMNS_PER_WORD
    torch._check(
        signs.shape[0] == _row_tiles(out_features),
        lambda: f"signs: expected {_row_tiles(out_features)} row tiles, got shape {list(signs.shape)}",
    )
    torch._check(signs.shape[2] == words, lambda: f"signs: expected {words} words, got shape {list(signs.shape)}")


def _check_weight(weight: torch.Tensor) -> None:
    torch._check(weight.dim() == 2, lambda: f"weight: expected 2 dimensions, got shape {list(weight.shape)}")
    torch._check(weight.dtype in _FLOAT_DTYPES, lambda: f"weight: expected a float dtype, got {weight.dtype}")


def _check_linear_input(input: torch.Tensor, activation_precision: str) -> None:
    torch._check(input.dim() >= 1, lambda: "input: expected at least 1 dimension, got a scalar")
    torch._check(input.dtype in _FLOAT_DTYPES, lambda: f"input: expected a float dtype, got {input.dtype}")
    torch._check(
        activation_precision in ACTIVATION_PRECISIONS,
        lambda: f"activation_precision: expected one of {ACTIVATION_PRECISIONS}, got {activation_precision!r}",
    )


@torch.library.register_fake("loop_singular_bit::fit_column_scales")
def _(weight: torch.Tensor, column_importance: torch.Tensor | None = None) -> torch.Tensor:
    _check_weight(weight)
    return weight.new_empty((weight.shape[1],), dtype=torch.float16)


@torch.library.register_fake("loop_singular_bit::quantize")
def _(
    weight: torch.Tensor,
    planes: int,
    outliers: int,
    column_scales: torch.Tensor | None = None,
    column_importance: torch.Tensor | None = None,
    means: bool = False,
) -> tuple[torch.Tensor, ...]:
    _check_weight(weight)
    tiles = _row_tiles(weight.shape[0])
    words = (weight.shape[1] + _COLUMNS_PER_WORD - 1) // _COLUMNS_PER_WORD
    rows = _ROWS_PER_TILE
    return (
        weight.new_empty((tiles, planes, words, rows), dtype=torch.int32),
        weight.new_empty((tiles, planes, rows), dtype=torch.float16),
        weight.new_empty((tiles, outliers, rows), dtype=torch.uint16),
        weight.new_empty((tiles, outliers, rows), dtype=torch.int8),
        weight.new_empty((tiles, rows), dtype=torch.float16),
        weight.new_empty((tiles if means else 0, rows), dtype=torch.float16),
    )


@torch.library.register_fake("loop_singular_bit::dequantize")
def _(
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_packed(signs, outlier_columns, out_features, in_features)
    return signs.new_empty((out_features, in_features), dtype=dtype)


@torch.library.register_fake("loop_singular_bit::packed_embedding")
def _(
    indices: torch.Tensor,
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_packed(signs, outlier_columns, num_embeddings, embedding_dim)
    return signs.new_empty((*indices.shape, embedding_dim), dtype=dtype)


@torch.library.register_fake("loop_singular_bit::packed_linear")
def _(
    input: torch.Tensor,
    signs: torch.Tensor,
    scales: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_deltas: torch.Tensor,
    outlier_scales: torch.Tensor,
    column_scales: torch.Tensor | None,
    means: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    *,
    activation_precision: str = "int8",
) -> torch.Tensor:
    _check_linear_input(input, activation_precision)
    _check_packed(signs, outlier_columns, out_features, input.shape[-1])
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("loop_singular_bit::packed_linear_group")
def _(
    input: torch.Tensor,
    weights: list[torch.Tensor],
    out_features: list[int],
    *,
    activation_precision: str = "int8",
) -> list[torch.Tensor]:
    _check_linear_input(input, activation_precision)
    torch._check(
        len(weights) == len(out_features) * _TENSORS_PER_WEIGHT,
        lambda: f"weights: expected {_TENSORS_PER_WEIGHT} tensors for each of {out_features}, got {len(weights)}",
    )
    for i, rows in enumerate(out_features):
        signs, _, outlier_columns, *_ = weights[i * _TENSORS_PER_WEIGHT : (i + 1) * _TENSORS_PER_WEIGHT]
        _check_packed(signs, outlier_columns, rows, input.shape[-1])
    return [input.new_empty((*input.shape[:-1], rows)) for rows in out_features]


@torch.library.register_fake("loop_singular_bit::copy_to_huge_pages")
def _(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _packed_linear_setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    input, *packed, bias, out_features = inputs
    ctx.save_for_backward(*packed)
    ctx.in_features = input.shape[-1]
    ctx.out_features = out_features
    ctx.bias_dtype = None if bias is None else bias.dtype


def _packed_linear_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _grad_input(grad_output, ctx.saved_tensors, ctx.out_features, ctx.in_features)
    if ctx.needs_input_grad[8]:
        grad_bias = _grad_bias(grad_output, ctx.bias_dtype)
    return grad_input, None, None, None, None, None, None, None, grad_bias, None


def _grad_bias(grad_output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return grad_output.reshape(-1, grad_output.shape[-1]).float().sum(dim=0).to(dtype)


def _grad_input(grad_output: torch.Tensor, packed: PackedTensors, out_features: int, in_features: int) -> torch.Tensor:
    """grad_output times the weight, a block of rows at a time: a large weight is never dense as a whole."""
    signs, scales, outlier_columns, outlier_deltas, outlier_scales, column_scales, means = packed
    grad_input: torch.Tensor | None = None
    for first in range(0, out_features, _BACKWARD_ROWS):
        rows = min(_BACKWARD_ROWS, out_features - first)
        tiles = slice(first // _ROWS_PER_TILE, _row_tiles(first + rows))
        block = dequantize(
            signs[tiles],
            scales[tiles],
            outlier_columns[tiles],
            outlier_deltas[tiles],
            outlier_scales[tiles],
            column_scales,
            None if means is None else means[tiles],
            rows,
            in_features,
            dtype=grad_output.dtype,
        )
        part = (grad_output[..., first : first + rows] @ block).float()
        grad_input = part if grad_input is None else grad_input + part
    assert grad_input is not None
    return grad_input.to(grad_output.dtype)


torch.library.register_autograd(
    "loop_singular_bit::packed_linear", _packed_linear_backward, setup_context=_packed_linear_setup_context
)


def _packed_linear_group_setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    input, weights, out_features = inputs
    ctx.save_for_backward(*weights)
    ctx.in_features = input.shape[-1]
    ctx.out_features = out_features
    ctx.set_materialize_grads(False)


def _packed_linear_group_backward(ctx: Any, grad_outputs: list[torch.Tensor | None]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # once: with activation checkpointing every access computes them anew
    grad_input: torch.Tensor | None = None
    grad_weights: list[torch.Tensor | None] = [None] * len(tensors)
    for i, grad_output in enumerate(grad_outputs):
        if grad_output is None:
            continue
        first, last = i * _TENSORS_PER_WEIGHT, (i + 1) * _TENSORS_PER_WEIGHT - 1
        *packed, column_scales, means, bias = tensors[first : last + 1]
        if ctx.needs_input_grad[0]:
            absent: Any = (None if tensor.numel() == 0 else tensor for tensor in (column_scales, means))
            part = _grad_input(grad_output, (*packed, *absent), ctx.out_features[i], ctx.in_features)
            grad_input = part if grad_input is None else grad_input + part
        if ctx.needs_input_grad[1][last] and bias.numel() > 0:
            grad_weights[last] = _grad_bias(grad_output, bias.dtype)
    return grad_input, grad_weights, None


torch.library.register_autograd(
    "loop_singular_bit::packed_linear_group",
    _packed_linear_group_backward,
    setup_context=_packed_linear_group_setup_context,
)


CalibratedTensors = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]
"""signs, scales, outlier_columns, outlier_deltas, outlier_scales, column_scales, losses, damping."""


def quantize_calibrated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    planes: int,
    outliers: int,
    column_scales: torch.Tensor | None = None,
    rounds: int = 5,
    damping: float = 0.01,
) -> CalibratedTensors:
    """Fits sign planes, scales and outliers to what a weight does to its inputs: the least tr(E H E').

    E is the error of the weight, H the second moment of its inputs. An alternating fit that weighs columns by the
    pivots of H starts it; a sweep makes every column good for the errors of those before it (GPTQ, Frantar et al. 2022,
    arXiv 2210.17323); then each round solves for the column scales and the row scales by least squares and improves
    single signs and outlier deltas by coordinate descent. Steps that would raise the loss are not taken. The bytes do
    not depend on the number of threads or the instruction set.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16.
        hessian: float32 [in_features, in_features], symmetric: the mean of x x' over the inputs x.
        planes: 1 to 4.
        outliers: per row, 0 to in_features.
        column_scales: float16 [in_features], > 0, to start from; None for a weight without them.
        rounds: of refinement, at least 0.
        damping: share of the mean of the hessian's diagonal that is added to the diagonal; ten times as much, again
            and again, while the matrix is not positive definite.

    Returns:
        signs, scales, outlier_columns, outlier_deltas, outlier_scales, column_scales ([0] when none were given), and
        losses: float64 [rounds + 2], tr(E H E') / tr(W H W') with the damped H, after the sweep, after each round and
            at the end, where scales are fitted once more.
        damping: float64 scalar, the one that was used.

    Raises:
        ValueError: NaN or infinity, an option out of range, or a hessian that no damping makes positive definite.
        RuntimeError: wrong shape or dtype.
    """
    return _ops.quantize_calibrated(weight, hessian, planes, outliers, column_scales, rounds, damping)


@torch.library.register_fake("loop_singular_bit::quantize_calibrated")
def _(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    planes: int,
    outliers: int,
    column_scales: torch.Tensor | None = None,
    rounds: int = 5,
    damping: float = 0.01,
) -> tuple[torch.Tensor, ...]:
    _check_weight(weight)
    columns = weight.shape[1]
    torch._check(
        tuple(hessian.shape) == (columns, columns),
        lambda: f"hessian: expected shape [{columns}, {columns}], got {list(hessian.shape)}",
    )
    tiles = _row_tiles(weight.shape[0])
    words = (columns + _COLUMNS_PER_WORD - 1) // _COLUMNS_PER_WORD
    rows = _ROWS_PER_TILE
    return (
        weight.new_empty((tiles, planes, words, rows), dtype=torch.int32),
        weight.new_empty((tiles, planes, rows), dtype=torch.float16),
        weight.new_empty((tiles, outliers, rows), dtype=torch.uint16),
        weight.new_empty((tiles, outliers, rows), dtype=torch.int8),
        weight.new_empty((tiles, rows), dtype=torch.float16),
        weight.new_empty((0 if column_scales is None else columns,), dtype=torch.float16),
        weight.new_empty((rounds + 2,), dtype=torch.float64),
        weight.new_empty((), dtype=torch.float64),
    )
