"""Each operator: opcheck, agreement with the reference in every instruction set, gradients, compile, export, errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_packed_weights import random_bytes_packed_weight, random_packed_weight, reference_dequantize
from torch.nn import functional

from loop_singular_bit import ops
from loop_singular_bit.packed_weight import PackedLayout, PackedWeight

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 2, 3, 5, 8, 13, 33, 130, 1000]


def opcheck(name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    torch.library.opcheck(getattr(torch.ops.loop_singular_bit, name).default, args, kwargs)


def strided_versions(rows: int, columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """[rows, columns] with every kind of strides, and other numbers of dimensions."""
    return {
        "contiguous": torch.randn(rows, columns).to(dtype),
        "empty": torch.randn(0, columns).to(dtype),
        "transposed": torch.randn(columns, rows).to(dtype).T,
        "offset": torch.randn(rows + 1, columns).to(dtype)[1:],
        "every second row": torch.randn(2 * rows, columns).to(dtype)[::2],
        "every second column": torch.randn(rows, 2 * columns).to(dtype)[:, ::2],
        "one row expanded": torch.randn(1, columns).to(dtype).expand(rows, -1),
        "one dimension": torch.randn(columns).to(dtype),
        "four dimensions": torch.randn(2, 1, rows, columns).to(dtype),
        "dimensions swapped": torch.randn(rows, 3, columns).to(dtype).transpose(0, 1),
        "slice of columns": torch.randn(2, rows, columns + 5).to(dtype)[..., 3:-2],
    }


STRIDES = list(strided_versions(1, 1, torch.float32))


# ---- packed_linear --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("strides", STRIDES)
def test_packed_linear_passes_opcheck(strides: str, dtype: torch.dtype) -> None:
    packed = random_packed_weight(40, 70, means=True)
    input = strided_versions(3, 70, dtype)[strides].requires_grad_(strides in ("contiguous", "dimensions swapped"))
    bias = torch.randn(40, dtype=dtype) if strides != "offset" else None
    opcheck("packed_linear", (input, *packed.op_tensors(), bias, 40), {"activation_precision": "exact"})


@pytest.mark.parametrize(("rows", "columns", "planes", "outliers"), [(1, 1, 1, 1), (33, 31, 3, 0), (64, 96, 8, 5)])
@pytest.mark.parametrize("precision", ops.ACTIVATION_PRECISIONS)
def test_packed_linear_passes_opcheck_in_odd_shapes(
    rows: int, columns: int, planes: int, outliers: int, precision: str
) -> None:
    packed = random_packed_weight(rows, columns, planes, outliers, column_scales=False)
    input = torch.randn(5, columns, requires_grad=True)
    bias = torch.randn(rows, requires_grad=True)
    opcheck("packed_linear", (input, *packed.op_tensors(), bias, rows), {"activation_precision": precision})


def error_bounds(packed: PackedWeight, input: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest possible |packed_linear - exact product| for each output, and what its root mean square may be.

    With a = input * column_scales and |w|(n, k) = sum of all magnitudes that meet a[k] in row n:

    - Rounding of activations to integers: half a step of max|a| / 127 (int8) or max|a| / 32767 (int16) in each column.
      In the mean, rounding errors are uniform and independent: step / sqrt(12) in each column, added in squares.
    - Prefill takes the planes of a row as integer multiples of one unit: scales, float16 by themselves, may differ from
      that by two roundings of 2^-11.
    - float32 sums of K + P + O + 2 products each, in any order: as many roundings of 2^-24.
    - The result is rounded to the dtype of the input.
    """
    rows = packed.out_features
    x = input.double()
    if packed.column_scales is not None:
        x = x * packed.column_scales.double()
    plain = reference_dequantize(replace(packed, column_scales=None))
    deltas = reference_dequantize(
        replace(packed, scales=torch.zeros_like(packed.scales), column_scales=None, means=None)
    )
    means = 0.0 if packed.means is None else packed.means.double().reshape(-1)[:rows, None].abs()
    plane_sum = packed.scales.double().sum(dim=1).reshape(-1)[:rows, None]
    magnitude = plane_sum + deltas.abs() + means

    largest = x.abs().amax(dim=-1, keepdim=True)
    step = {"int8": largest / 127, "int16": largest / 32767, "exact": largest * 0}[precision]
    terms = packed.in_features + packed.planes + packed.outliers + 2
    roundings = x.abs() @ (magnitude * terms * 2.0**-24 + plane_sum * 2.0**-10).T
    output_rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[input.dtype]
    exact = input.double() @ reference_dequantize(packed).T
    rest = roundings + output_rounding * exact.abs() + (2.0**-24 if input.dtype == torch.float16 else 0)
    bound = step / 2 * magnitude.sum(dim=1) + rest
    mean_square = step.square() / 12 * plain.square().sum(dim=1) + rest.square()
    return bound, mean_square.mean().sqrt()


def assert_within_bounds(packed: PackedWeight, input: torch.Tensor, precision: str) -> None:
    bias = torch.randn(packed.out_features).to(input.dtype)
    output = ops.packed_linear(input, *packed.op_tensors(), bias, packed.out_features, activation_precision=precision)
    assert output.shape == (*input.shape[:-1], packed.out_features)
    assert output.dtype == input.dtype and output.is_contiguous()
    if output.numel() == 0:
        return
    expected = functional.linear(input.double(), reference_dequantize(packed), bias.double())
    bound, root_mean_square = error_bounds(packed, input, precision)
    rounding = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[input.dtype]
    error = (output.double() - expected).abs()
    allowed = bound + rounding * expected.abs() + 1e-6
    assert (error <= allowed).all(), f"largest excess {(error - allowed).max():.3e}"
    if output.numel() >= 1000:
        allowed_mean = 1.5 * (root_mean_square + rounding * expected.square().mean().sqrt())
        assert error.square().mean().sqrt() <= allowed_mean


@pytest.mark.parametrize("precision", ops.ACTIVATION_PRECISIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_packed_linear_agrees_with_the_dequantized_product(
    tokens: int, dtype: torch.dtype, precision: str, isa: str
) -> None:
    packed = random_packed_weight(77, 203, planes=2, outliers=3, means=tokens % 2 == 1)
    assert_within_bounds(packed, torch.randn(tokens, 203).to(dtype), precision)


@pytest.mark.parametrize("precision", ops.ACTIVATION_PRECISIONS)
@pytest.mark.parametrize("planes", range(1, 9))
def test_packed_linear_with_every_number_of_planes(planes: int, precision: str, isa: str) -> None:
    packed = random_packed_weight(64, 160, planes=planes, outliers=4)
    for tokens in (1, 3, 40):
        assert_within_bounds(packed, torch.randn(tokens, 160), precision)


@pytest.mark.parametrize("precision", ops.ACTIVATION_PRECISIONS)
@pytest.mark.parametrize(
    ("rows", "columns", "outliers"),
    [(1, 1, 0), (1, 1, 1), (2, 40, 40), (31, 33, 1), (32, 32, 0), (33, 31, 2), (95, 1, 1), (65, 1025, 9), (128, 64, 1)],
)
def test_packed_linear_in_shapes_that_are_no_multiples(
    rows: int, columns: int, outliers: int, precision: str, isa: str
) -> None:
    packed = random_packed_weight(
        rows, columns, planes=3, outliers=outliers, column_scales=columns % 2 == 1, means=True
    )
    for tokens in (1, 2, 17):
        assert_within_bounds(packed, torch.randn(tokens, columns), precision)


@pytest.mark.parametrize("strides", STRIDES)
def test_packed_linear_takes_any_strides(strides: str, isa: str) -> None:
    packed = random_packed_weight(77, 203)
    for rows in (3, 40):
        input = strided_versions(rows, 203, torch.float32)[strides]
        bias = torch.randn(77)
        arguments = (*packed.op_tensors(), bias, 77)
        for precision in ops.ACTIVATION_PRECISIONS:
            given = ops.packed_linear(input, *arguments, activation_precision=precision)
            expected = ops.packed_linear(input.contiguous(), *arguments, activation_precision=precision)
            assert torch.equal(given, expected)
            assert given.is_contiguous()


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_packed_linear_with_scales_off_the_grid(planes: int, isa: str) -> None:
    packed = random_packed_weight(70, 130, planes=planes, free_scales=True)
    for precision in ops.ACTIVATION_PRECISIONS:
        for tokens in (1, 50):
            assert_within_bounds(packed, torch.randn(tokens, 130), precision)


@pytest.mark.parametrize("precision", ops.ACTIVATION_PRECISIONS)
def test_packed_linear_with_thousands_of_tokens(precision: str) -> None:
    packed = random_packed_weight(96, 256, planes=2, outliers=2)
    assert_within_bounds(packed, torch.randn(2, 2500, 256), precision)


def test_a_few_massive_activations_do_not_spoil_the_others_in_decode(isa: str) -> None:
    packed = random_packed_weight(256, 1024, planes=2, outliers=8, column_scales=False)
    input = torch.randn(1, 1024)
    input[0, ::128] *= 1000
    output = ops.packed_linear(input, *packed.op_tensors(), None, 256)
    expected = input.double() @ reference_dequantize(packed).T
    rest = input.clone()
    rest[0, ::128] = 0
    # 8 bits for the ordinary activations alone: their step is max|rest| / 127, far below max|input| / 127.
    step = rest.abs().max().double() / 127
    error = (output - expected).square().mean().sqrt()
    spread = reference_dequantize(packed).square().sum(dim=1).mean().sqrt()
    assert error <= 1.5 * step / 12**0.5 * spread + expected.abs().max() * 2.0**-20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others_alone(value: float, isa: str) -> None:
    packed = random_packed_weight(40, 70)
    for tokens in (2, 40):
        clean = torch.randn(tokens, 70)
        dirty = clean.clone()
        dirty[1, 69] = value
        for precision in ops.ACTIVATION_PRECISIONS:
            arguments = (*packed.op_tensors(), None, 40)
            output = ops.packed_linear(dirty, *arguments, activation_precision=precision)
            expected = ops.packed_linear(clean, *arguments, activation_precision=precision)
            assert not torch.isfinite(output[1]).any()
            assert torch.equal(output[0], expected[0])


def test_packed_linear_gives_the_same_bits_on_any_number_of_threads(isa: str) -> None:
    packed = random_packed_weight(1024, 512)
    threads = torch.get_num_threads()
    try:
        for tokens in (1, 70):
            input = torch.randn(tokens, 512)
            outputs = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outputs.append(ops.packed_linear(input, *packed.op_tensors(), None, 1024))
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    finally:
        torch.set_num_threads(threads)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (5, 70), (2, 3, 70), (0, 70)])
def test_gradient_is_that_of_the_dequantized_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = random_packed_weight(40, 70, means=True)
    input, dense_input = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    bias, dense_bias = (torch.ones(40, dtype=dtype) for _ in range(2))
    for tensor in (input, dense_input, bias, dense_bias):
        tensor.requires_grad_()
    output = ops.packed_linear(input, *packed.op_tensors(), bias, 40)
    grad = torch.randn(output.shape).to(dtype)
    output.backward(grad)
    functional.linear(dense_input, packed.dequantize(dtype), dense_bias).backward(grad)
    assert input.grad is not None and bias.grad is not None
    assert input.grad.dtype == bias.grad.dtype == dtype
    torch.testing.assert_close(input.grad, dense_input.grad)
    torch.testing.assert_close(bias.grad, dense_bias.grad)


def test_gradient_of_a_weight_of_several_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed_weight(200, 70, means=True)
    blocks = []
    dequantize = ops.dequantize

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        blocks.append(args[7])
        return dequantize(*args, **kwargs)

    monkeypatch.setattr(ops, "_BACKWARD_ROWS", 64)
    monkeypatch.setattr(ops, "dequantize", watched)
    input = torch.randn(5, 70, requires_grad=True)
    grad = torch.randn(5, 200)
    ops.packed_linear(input, *packed.op_tensors(), None, 200).backward(grad)
    assert blocks == [64, 64, 64, 8]
    torch.testing.assert_close(input.grad, grad @ reference_dequantize(packed, torch.float32))


def test_gradient_only_where_it_is_wanted() -> None:
    packed = random_packed_weight(40, 70)
    bias = torch.zeros(40, requires_grad=True)
    ops.packed_linear(torch.randn(5, 70), *packed.op_tensors(), bias, 40).sum().backward()
    assert torch.equal(bias.grad, torch.full((40,), 5.0))
    with torch.no_grad():
        assert not ops.packed_linear(torch.randn(5, 70), *packed.op_tensors(), bias, 40).requires_grad
    with torch.inference_mode():
        ops.packed_linear(torch.randn(5, 70), *packed.op_tensors(), bias, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_adapter_learns_on_top(dtype: torch.dtype) -> None:
    packed = random_packed_weight(48, 64, column_scales=False)
    down = (torch.randn(4, 64) * 0.1).to(dtype).requires_grad_()
    up = torch.zeros(48, 4, dtype=dtype, requires_grad=True)
    first = torch.randn(64, 64).to(dtype).requires_grad_()
    input, target = torch.randn(32, 64).to(dtype), torch.randn(32, 48).to(dtype)
    optimizer = torch.optim.Adam([down, up, first], lr=0.02)
    losses = []
    for _ in range(30):
        hidden = functional.linear(input, first)
        output = ops.packed_linear(hidden, *packed.op_tensors(), None, 48) + functional.linear(
            functional.linear(hidden, down), up
        )
        loss = (output - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


class TwoLinears(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = random_packed_weight(96, 64, seed=1)
        self.second = random_packed_weight(40, 96, planes=3, means=True, seed=2)
        self.embedding = random_packed_weight(50, 64, planes=6, seed=3)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        input = ops.packed_embedding(indices, *self.embedding.op_tensors(), 50, 64)
        hidden = ops.packed_linear(input, *self.first.op_tensors(), None, 96)
        return ops.packed_linear(functional.gelu(hidden), *self.second.op_tensors(), None, 40)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiles_into_one_graph_with_a_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    model = TwoLinears()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(2, 7), (3, 5), (9, 4)]:
        indices = torch.randint(0, 50, shape)
        torch.testing.assert_close(compiled(indices), model(indices), rtol=1e-4, atol=1e-5)


def test_compiles_with_gradients() -> None:
    torch._dynamo.reset()
    packed = random_packed_weight(96, 64)

    def loss(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.packed_linear(input, *packed.op_tensors(), bias, 96).sigmoid().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for tokens in (3, 11):
        values = torch.randn(tokens, 64)
        gradients = []
        for function in (loss, compiled):
            input, bias = values.clone().requires_grad_(), torch.zeros(96, requires_grad=True)
            function(input, bias).backward()
            gradients.append((input.grad, bias.grad))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_exports_with_a_dynamic_batch() -> None:
    model = TwoLinears()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randint(0, 50, (3, 5)),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"loop_singular_bit.packed_linear.default", "loop_singular_bit.packed_embedding.default"} <= targets
    for size in (2, 3, 40):
        indices = torch.randint(0, 50, (size, 5))
        assert torch.equal(program.module()(indices), model(indices))


def test_quantize_and_dequantize_compile_into_one_graph() -> None:
    torch._dynamo.reset()

    def there_and_back(weight: torch.Tensor) -> torch.Tensor:
        scales = ops.fit_column_scales(weight)
        *tensors, _ = ops.quantize(weight, 2, 2, scales)
        return ops.dequantize(*tensors, scales, None, weight.shape[0], weight.shape[1], dtype=weight.dtype)

    weight = torch.randn(40, 70)
    compiled = torch.compile(there_and_back, fullgraph=True)
    assert torch.equal(compiled(weight), there_and_back(weight))


def test_fakes_run_on_the_meta_device() -> None:
    packed = random_packed_weight(40, 70).to("meta")
    assert packed.linear(torch.empty(2, 3, 70, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 40)
    assert packed.dequantize().shape == (40, 70)
    quantized = ops.quantize(torch.empty(33, 70, device="meta"), 3, 2)
    layout = PackedLayout(33, 70, 3, 2, column_scales=False)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in quantized[:5]] == list(layout.tensors().values())
    with pytest.raises(RuntimeError, match="words"):
        packed.linear(torch.empty(2, 33, device="meta"))


# ---- quantize, dequantize, fit_column_scales, packed_embedding ------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "offset", "every second row", "every second column"])
def test_quantize_and_fit_column_scales_pass_opcheck(strides: str, dtype: torch.dtype) -> None:
    weight = strided_versions(34, 70, dtype)[strides]
    opcheck("fit_column_scales", (weight,))
    opcheck("fit_column_scales", (weight, torch.rand(70)))
    opcheck("quantize", (weight, 2, 3))
    opcheck("quantize", (weight, 3, 0, torch.ones(70, dtype=torch.float16), torch.rand(70), True))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 33), (64, 32), (33, 1)])
@pytest.mark.parametrize("planes", [1, 2, 6])
def test_quantize_passes_opcheck_in_odd_shapes(rows: int, columns: int, planes: int) -> None:
    opcheck("quantize", (torch.randn(rows, columns), planes, 1, None, None, planes == 2))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dequantize_and_packed_embedding_pass_opcheck(dtype: torch.dtype) -> None:
    for packed in (random_packed_weight(40, 70, means=True), random_packed_weight(1, 1, 1, 0, column_scales=False)):
        shape = (packed.out_features, packed.in_features)
        opcheck("dequantize", (*packed.op_tensors(), *shape), {"dtype": dtype})
        for indices in (
            torch.randint(0, shape[0], (3, 5)),
            torch.randint(0, shape[0], (5, 3)).T,
            torch.zeros(0, 4, dtype=torch.int64),
            torch.randint(0, shape[0], (7,), dtype=torch.int32)[1:],
            torch.tensor(0),
        ):
            opcheck("packed_embedding", (indices, *packed.op_tensors(), *shape), {"dtype": dtype})


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("planes", range(1, 9))
def test_dequantize_agrees_with_the_reference(planes: int, dtype: torch.dtype, isa: str) -> None:
    for rows, columns, outliers in [(1, 1, 1), (33, 31, 0), (40, 70, 70), (70, 130, 3)]:
        packed = random_packed_weight(rows, columns, planes, outliers, planes % 2 == 1, planes % 3 == 1)
        given = packed.dequantize(dtype)
        expected = reference_dequantize(packed)
        # float32 arithmetic on P + 3 terms, then one rounding to dtype.
        epsilon = torch.finfo(dtype).eps
        terms = packed.scales.double().sum(dim=1).reshape(-1)[:rows, None] * 8 + expected.abs()
        assert given.shape == (rows, columns) and given.is_contiguous()
        assert ((given.double() - expected).abs() <= epsilon * expected.abs() + 2.0**-22 * terms).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_packed_embedding_is_rows_of_dequantize(dtype: torch.dtype, isa: str) -> None:
    packed = random_packed_weight(77, 45, planes=6, means=True)
    dense = packed.dequantize(dtype)
    for indices in (torch.randint(0, 77, (3, 5)), torch.randint(0, 77, (4,), dtype=torch.int32), torch.tensor(76)):
        rows = ops.packed_embedding(indices, *packed.op_tensors(), 77, 45, dtype=dtype)
        assert torch.equal(rows, dense[indices.long()])


def test_every_instruction_set_gives_the_same_bytes() -> None:
    weight = torch.randn(70, 130)
    before, results = ops.isa(), []
    try:
        for name in ops.supported_isas():
            ops.set_isa(name)
            scales = ops.fit_column_scales(weight)
            tensors = ops.quantize(weight, 2, 3, scales, torch.rand(130, generator=torch.Generator().manual_seed(1)))
            dense = ops.dequantize(*tensors[:5], scales, None, 70, 130)
            results.append([tensor.view(torch.uint8) for tensor in (scales, *tensors, dense)])
    finally:
        ops.set_isa(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# ---- errors ---------------------------------------------------------------------------------------------------------


def _linear_arguments(**change: Any) -> dict[str, Any]:
    arguments = {"input": torch.randn(2, 70), **random_packed_weight(40, 70, means=True).tensors()}
    return {**arguments, "bias": torch.zeros(40), "out_features": 40, **change}


BAD_PACKED: list[tuple[dict[str, Any], str]] = [
    (
        {"signs": torch.zeros(2, 2, 3, 31, dtype=torch.int32)},
        r"signs: expected shape .*32\], got \[2, 2, 3, 31\]",
    ),
    (
        {"signs": torch.zeros(1, 2, 3, 32, dtype=torch.int32)},
        r"signs: expected shape \[2, .*, got \[1, 2, 3, 32\]",
    ),
    ({"signs": torch.zeros(2, 2, 32, dtype=torch.int32)}, r"signs: expected 4 dimensions"),
    ({"signs": torch.zeros(2, 9, 3, 32, dtype=torch.int32)}, r"signs: expected 1 to 8 planes, got 9"),
    ({"signs": torch.zeros(2, 2, 3, 32, dtype=torch.int64)}, r"signs: expected dtype Int, got Long"),
    ({"signs": torch.zeros(2, 2, 32, 3, dtype=torch.int32).mT}, r"signs: expected a contiguous tensor"),
    ({"scales": torch.zeros(2, 2, 32)}, r"scales: expected dtype Half, got Float"),
    ({"scales": torch.zeros(2, 3, 32).half()}, r"scales: expected shape \[2, 2, 32\], got \[2, 3, 32\]"),
    ({"outlier_columns": torch.zeros(2, 3, 32, dtype=torch.int16)}, r"outlier_columns: expected dtype UInt16"),
    ({"outlier_columns": torch.zeros(2, 32, dtype=torch.uint16)}, r"outlier_columns: expected 3 dimensions"),
    (
        {"outlier_columns": torch.zeros(2, 71, 32, dtype=torch.uint16)},
        r"at most in_features = 70 outliers .* 71",
    ),
    ({"outlier_deltas": torch.zeros(2, 2, 32, dtype=torch.int8)}, r"outlier_deltas: expected shape \[2, 3, 32\]"),
    ({"outlier_deltas": torch.zeros(2, 3, 32, dtype=torch.uint8)}, r"outlier_deltas: expected dtype Char"),
    ({"outlier_scales": torch.zeros(64).half()}, r"outlier_scales: expected shape \[2, 32\], got \[64\]"),
    ({"column_scales": torch.zeros(71).half()}, r"column_scales: expected shape \[70\], got \[71\]"),
    ({"means": torch.zeros(2, 32).bfloat16()}, r"means: expected dtype Half, got BFloat16"),
]


@pytest.mark.parametrize(("change", "message"), BAD_PACKED)
@pytest.mark.parametrize("operator", ["packed_linear", "dequantize", "packed_embedding"])
def test_operators_refuse_wrong_packed_tensors(operator: str, change: dict[str, Any], message: str) -> None:
    arguments = _linear_arguments(**change)
    input, bias, out_features = (arguments.pop(name) for name in ("input", "bias", "out_features"))
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "packed_linear": lambda: ops.packed_linear(input, **arguments, bias=bias, out_features=out_features),
        "dequantize": lambda: ops.dequantize(**arguments, out_features=out_features, in_features=70),
        "packed_embedding": lambda: ops.packed_embedding(
            torch.zeros(1, dtype=torch.int64), **arguments, num_embeddings=out_features, embedding_dim=70
        ),
    }
    with pytest.raises(RuntimeError, match=message):
        calls[operator]()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 102)}, RuntimeError, r"signs: expected shape \[2, 2, 4, 32\], got \[2, 2, 3, 32\]"),
        ({"input": torch.tensor(1.0)}, RuntimeError, r"input: expected at least 1 dimension"),
        ({"input": torch.randn(2, 70).double()}, RuntimeError, r"input: expected dtype float32.*got Double"),
        ({"input": torch.zeros(2, 70, dtype=torch.int64)}, RuntimeError, r"input: expected dtype float32.*got Long"),
        ({"input": torch.zeros(2, 0)}, RuntimeError, r"in_features: expected 1 to 65536, got 0"),
        ({"bias": torch.zeros(41)}, RuntimeError, r"bias: expected shape \[40\], got \[41\]"),
        ({"bias": torch.zeros(40, 1)}, RuntimeError, r"bias: expected shape \[40\], got \[40, 1\]"),
        ({"bias": torch.zeros(40, dtype=torch.int32)}, RuntimeError, r"bias: expected dtype float32.*got Int"),
        ({"out_features": 0}, RuntimeError, r"out_features: expected at least 1, got 0"),
        ({"out_features": -32}, RuntimeError, r"out_features: expected at least 1, got -32"),
        ({"out_features": 65}, RuntimeError, r"signs: expected shape \[3, 2, 3, 32\], got \[2, 2, 3, 32\]"),
        ({"activation_precision": "int4"}, ValueError, r"expected 'int8', 'int16' or 'exact', got 'int4'"),
    ],
)
def test_packed_linear_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.packed_linear(**_linear_arguments(**change))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.randn(70), 2, 1), RuntimeError, r"weight: expected.*2 dimensions"),
        ((torch.randn(4, 70).double(), 2, 1), RuntimeError, r"weight: expected dtype"),
        ((torch.randn(4, 0), 2, 0), RuntimeError, r"in_features|weight"),
        ((torch.randn(4, 70), 0, 1), RuntimeError, r"planes: expected 1 to 8, got 0"),
        ((torch.randn(4, 70), 9, 1), RuntimeError, r"planes: expected 1 to 8, got 9"),
        ((torch.randn(4, 70), 2, 71), RuntimeError, r"outliers: expected 0 to .*70.*got 71"),
        ((torch.randn(4, 70), 2, -1), RuntimeError, r"outliers: expected 0 to .*got -1"),
        ((torch.randn(4, 70), 2, 1, torch.ones(69).half()), RuntimeError, r"column_scales: expected shape \[70\]"),
        ((torch.randn(4, 70), 2, 1, torch.ones(70)), RuntimeError, r"column_scales: expected dtype float16, got Float"),
        ((torch.randn(4, 70), 2, 1, None, torch.ones(69)), RuntimeError, r"column_importance: expected shape \[70\]"),
    ],
)
def test_quantize_refuses(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises((error, ValueError), match=message):
        ops.quantize(*args)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_quantize_names_the_element_that_is_not_finite(value: float, dtype: torch.dtype, isa: str) -> None:
    weight = torch.randn(70, 90).to(dtype)
    weight[67, 81] = value
    with pytest.raises(ValueError, match=r"row 67.*column 81"):
        ops.quantize(weight, 2, 1)
    with pytest.raises(ValueError):
        ops.fit_column_scales(weight)


@pytest.mark.parametrize("index", [40, -1, 2**40])
def test_packed_embedding_names_the_index_out_of_range(index: int) -> None:
    packed = random_packed_weight(40, 70)
    with pytest.raises(IndexError, match=rf"from 0 to num_embeddings - 1 = 39, got {index}$"):
        ops.packed_embedding(torch.tensor([0, index]), *packed.op_tensors(), 40, 70)


def test_set_isa_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=rf"'avx9' is unknown.*{', '.join(ops.supported_isas())}"):
        ops.set_isa("avx9")
    assert ops.isa() in ops.supported_isas()


@pytest.mark.parametrize("name", [ops.supported_isas()[-1], "avx9"])
def test_the_environment_forces_an_instruction_set(name: str) -> None:
    code = (
        "from loop_singular_bit import ops; import torch\n"
        "try: print(ops.isa())\nexcept RuntimeError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"LOOP_SINGULAR_BIT_ISA": name, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    if name == "avx9":
        assert f"'avx9' is unknown; this machine supports: {', '.join(ops.supported_isas())}" in result.stdout
    else:
        assert result.stdout == f"{name}\n"


# ---- content from elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "planes", "outliers"), [(1, 1, 1, 1), (33, 31, 2, 7), (64, 200, 4, 16), (40, 70, 8, 70)]
)
def test_operators_survive_any_bytes(rows: int, columns: int, planes: int, outliers: int, isa: str) -> None:
    for seed in range(4):
        layout = PackedLayout(rows, columns, planes, outliers, seed % 2 == 0, seed < 2)
        packed = random_bytes_packed_weight(layout, seed)
        packed.outlier_columns.view(torch.int16)[:, 0] = -1  # column 65,535
        assert packed.dequantize().shape == (rows, columns)
        assert packed.dequantize(torch.bfloat16).shape == (rows, columns)
        ops.packed_embedding(torch.arange(rows), *packed.op_tensors(), rows, columns)
        for tokens in (1, 3, 40):
            for precision in ops.ACTIVATION_PRECISIONS:
                input = torch.randn(tokens, columns)
                assert packed.linear(input, activation_precision=precision).shape == (tokens, rows)


def test_outlier_columns_out_of_range_add_nothing(isa: str) -> None:
    packed = random_packed_weight(40, 70, outliers=3, column_scales=False)
    packed = replace(packed, outlier_columns=packed.outlier_columns.clone())
    packed.outlier_columns.view(torch.int16)[:, 1] = 70
    packed.outlier_columns.view(torch.int16)[:, 2] = -1
    torch.testing.assert_close(packed.dequantize(), reference_dequantize(packed, torch.float32))
    for tokens in (1, 40):
        for precision in ops.ACTIVATION_PRECISIONS:
            # A wide product first: what it leaves in buffers that are used again must not come back.
            wide = random_packed_weight(32, 4096)
            wide.linear(torch.full((tokens, 4096), 1e6), activation_precision=precision)
            assert_within_bounds(packed, torch.randn(tokens, 70), precision)


def test_a_missing_or_foreign_library_is_an_import_error_that_says_what_to_type(tmp_path: Path) -> None:
    package = tmp_path / "loop_singular_bit"
    package.mkdir()
    for name in ("__init__.py", "ops.py", "transformers_registration.py"):
        shutil.copy(Path(ops.__file__).parent / name, package / name)
    code = """
from pathlib import Path
for content in (None, b"not a library"):
    if content is not None:
        Path("loop_singular_bit/_C.so").write_bytes(content)
    try:
        import loop_singular_bit.ops
    except ImportError as error:
        print(str(error).replace("\\n", " "))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    missing, foreign = result.stdout.splitlines()
    assert "compiled operators are missing" in missing and "make build" in missing
    assert "does not load into torch" in foreign and "pip install --no-build-isolation" in foreign
