"""packed_linear_group gives what packed_linear gives, bit for bit; models whose linears run in groups do too."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import io
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_packed_weights import random_packed_weight
from tiny_models import random_tokens, tiny_encoder, tiny_language_model
from torch import nn

from loop_singular_bit import QuantizationConfig, linear_groups, ops, quantize_model
from loop_singular_bit.linear_groups import group_linears, ungroup_linears
from loop_singular_bit.packed_linear import PackedLinear
from loop_singular_bit.packed_weight import PackedWeight

# ---- the operator ---------------------------------------------------------------------------------------------------


def of_equal_scales(weights: list[PackedWeight]) -> list[PackedWeight]:
    """Weights with the column scales of the first, each in memory of its own."""
    scales = weights[0].column_scales
    assert scales is not None
    return [
        PackedWeight.from_tensors(
            {**weight.tensors(), "column_scales": scales.clone()}, weight.out_features, weight.in_features
        )
        for weight in weights
    ]


def several_weights(in_features: int = 203) -> list[PackedWeight]:
    """Different in everything but in_features."""
    return [
        random_packed_weight(77, in_features, planes=2, seed=1),
        random_packed_weight(1, in_features, planes=1, outliers=0, column_scales=False, seed=2),
        random_packed_weight(160, in_features, planes=4, outliers=9, means=True, seed=3),
        random_packed_weight(40, in_features, planes=7, seed=4),
    ]


def group(input: torch.Tensor, weights: list[PackedWeight], biases: list[Any], precision: str) -> list[torch.Tensor]:
    tensors = ops.group_tensors([weight.op_tensors() for weight in weights], biases)
    rows = [weight.out_features for weight in weights]
    return ops.packed_linear_group(input, tensors, rows, activation_precision=precision)


def alone(input: torch.Tensor, weights: list[PackedWeight], biases: list[Any], precision: str) -> list[torch.Tensor]:
    return [
        ops.packed_linear(input, *weight.op_tensors(), bias, weight.out_features, activation_precision=precision)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def assert_same_bits(
    input: torch.Tensor, weights: list[PackedWeight], precision: str, biases: list[Any] | None = None
) -> None:
    biases = biases or [torch.randn(weights[0].out_features).to(input.dtype), *[None] * (len(weights) - 1)]
    together = group(input, weights, biases, precision)
    assert len(together) == len(weights)
    for output, expected in zip(together, alone(input, weights, biases, precision), strict=True):
        assert output.is_contiguous() and output.dtype == input.dtype
        assert torch.equal(output, expected)


@pytest.mark.parametrize("precision", ops.ACTIVATION_PRECISIONS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 8, 33, 130])
def test_group_gives_the_bits_of_single_calls(tokens: int, precision: str, isa: str) -> None:
    weights = several_weights()
    one_plane = random_packed_weight(50, 203, planes=1, seed=5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        input = torch.randn(tokens, 203).to(dtype)
        assert_same_bits(input, weights, precision)
        assert_same_bits(input, of_equal_scales([weights[0], one_plane, *weights[2:]]), precision)
    assert_same_bits(torch.randn(tokens, 203), [weights[0], weights[3], weights[0]], precision)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 3, 20, 200])
def test_group_gives_the_same_bits_on_any_number_of_threads(tokens: int, threads: int) -> None:
    weights = [
        random_packed_weight(640, 512, planes=2, seed=1),
        random_packed_weight(96, 512, planes=4, outliers=40, seed=2),
        random_packed_weight(33, 512, planes=1, seed=3),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for same in (weights, of_equal_scales(weights)):
            for precision in ops.ACTIVATION_PRECISIONS:
                assert_same_bits(torch.randn(tokens, 512), same, precision)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(203,), (2, 3, 203), (2, 0, 203), (1, 1, 203)])
def test_group_takes_any_shape_and_strides(shape: tuple[int, ...]) -> None:
    weights = several_weights()
    input = torch.randn(*shape[:-1], 406)[..., ::2]
    assert [output.shape for output in group(input, weights, [None] * 4, "int8")] == [
        (*shape[:-1], weight.out_features) for weight in weights
    ]
    assert_same_bits(input, weights, "int8", [None] * 4)


@pytest.mark.parametrize("with_bias", ["all", "some", "none"])
@pytest.mark.parametrize("trains", [True, False])
def test_group_passes_opcheck(with_bias: str, trains: bool) -> None:
    weights = several_weights(70)
    biases = [
        torch.randn(weight.out_features, requires_grad=trains)
        if with_bias == "all" or (with_bias == "some" and i)
        else None
        for i, weight in enumerate(weights)
    ]
    tensors = ops.group_tensors([weight.op_tensors() for weight in weights], biases)
    rows = [weight.out_features for weight in weights]
    for input in (torch.randn(5, 70, requires_grad=trains), torch.randn(70, 3).T, torch.randn(0, 70)):
        torch.library.opcheck(
            torch.ops.loop_singular_bit.packed_linear_group.default,
            (input, tensors, rows),
            {"activation_precision": "exact"},
        )


def test_gradients_of_a_group_are_those_of_single_calls() -> None:
    weights = several_weights(70)
    gradients = []
    for function in (group, alone):
        torch.manual_seed(0)
        input = torch.randn(2, 5, 70, requires_grad=True)
        biases = [torch.randn(77, requires_grad=True), None, torch.randn(160, requires_grad=True), None]
        outputs = function(input, weights, biases, "exact")
        # One output is left out, and its bias with it.
        (outputs[0].sum() + outputs[1].square().sum() + outputs[3].sin().sum()).backward()
        assert biases[2] is not None and biases[0] is not None
        assert biases[2].grad is None or not biases[2].grad.any()
        gradients.append((input.grad, biases[0].grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_group_compiles_exports_and_runs_on_meta() -> None:
    torch._dynamo.reset()
    weights = several_weights(64)

    class Model(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.cat(group(input.sin(), weights, [None] * 4, "int8"), dim=-1)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 9):
        input = torch.randn(tokens, 64)
        assert torch.equal(compiled(input), model(input))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 64),), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(input), model(input))
    on_meta = [weight.to("meta") for weight in weights]
    outputs = ops.packed_linear_group(
        torch.empty(2, 64, device="meta"),
        [tensor.to("meta") for tensor in ops.group_tensors([weight.op_tensors() for weight in on_meta])],
        [weight.out_features for weight in weights],
    )
    assert [tuple(output.shape) for output in outputs] == [(2, 77), (2, 1), (2, 160), (2, 40)]


def test_errors_say_which_weight_is_wrong() -> None:
    weights = [random_packed_weight(40, 70), random_packed_weight(40, 130)]
    input = torch.randn(3, 70)
    with pytest.raises(RuntimeError, match=r"signs: expected shape \[2, 2, 3, 32\], got.*weight 1 of 2"):
        group(input, weights, [None, None], "int8")
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[40\], got \[41\].*weight 0 of 1"):
        group(input, weights[:1], [torch.zeros(41)], "int8")
    with pytest.raises(ValueError, match="expected at least one weight"):
        ops.packed_linear_group(input, [], [])
    with pytest.raises(ValueError, match="expected 2 x 8 tensors for as many out_features, got 8"):
        ops.packed_linear_group(input, ops.group_tensors([weights[0].op_tensors()]), [40, 40])
    with pytest.raises(ValueError, match="expected one for each of 2 weights, got 1"):
        ops.group_tensors([weight.op_tensors() for weight in weights], [None])
    with pytest.raises(ValueError, match="expected 'int8', 'int16' or 'exact', got 'int4'"):
        group(input, weights[:1], [None], "int4")


# ---- groups in models -----------------------------------------------------------------------------------------------


@pytest.fixture
def all_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups of any size, and threads, without which linears run alone."""
    monkeypatch.setattr(linear_groups, "_LEAST_WEIGHTS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of weights of every call of the operator for groups."""
    sizes: list[int] = []
    function = ops.packed_linear_group

    def watched(input: torch.Tensor, weights: Any, out_features: Any, **options: Any) -> list[torch.Tensor]:
        sizes.append(len(out_features))
        return function(input, weights, out_features, **options)

    monkeypatch.setattr(ops, "packed_linear_group", watched)
    return sizes


def packed(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_model(model, QuantizationConfig(preset="b2"))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens()).logits


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_run_in_groups_and_give_the_same_bits(architecture: str, all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_language_model(architecture, tied=True))
    names = set(model.state_dict())
    grouped = logits(model)
    assert calls == [3, 2, 3, 2]
    with torch.inference_mode():
        assert torch.equal(model(random_tokens()).logits, grouped)
    assert len(calls) == 8
    ungroup_linears(model)
    assert torch.equal(logits(model), grouped)
    assert len(calls) == 8
    assert set(model.state_dict()) == names
    assert group_linears(model) == group_linears(model) != []


def test_an_encoder_runs_in_groups(all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_encoder())
    with torch.no_grad():
        grouped = model(random_tokens()).last_hidden_state
        assert calls == [3, 3]
        ungroup_linears(model)
        assert torch.equal(model(random_tokens()).last_hidden_state, grouped)


def test_small_groups_and_single_threads_run_alone(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny_language_model("llama", tied=True))
    assert group_linears(model) == [] and "forward" not in model.model.layers[0].mlp.__dict__
    monkeypatch.setattr(linear_groups, "_LEAST_WEIGHTS", 0)
    assert group_linears(model) == [
        f"model.layers.{layer}.{block}" for layer in (0, 1) for block in ("self_attn", "mlp")
    ]
    assert torch.get_num_threads() == 1
    logits(model)
    assert calls == []


def test_gradients_pass_through_groups(all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_language_model("qwen2", tied=True)).train()
    bias = model.model.layers[0].self_attn.q_proj.bias
    gradients = []
    for change in (group_linears, ungroup_linears):
        change(model)
        model.zero_grad()
        model(random_tokens()).logits.sum().backward()
        gradients.append(bias.grad.clone())
    assert calls == [3, 2, 3, 2]
    torch.testing.assert_close(gradients[0], gradients[1])
    group_linears(model)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(random_tokens(), use_cache=False).logits.sum().backward()
    torch.testing.assert_close(bias.grad, gradients[1])


@pytest.mark.parametrize("obstacle", ["hook", "pre-hook", "subclass", "forward", "precision", "dense"])
def test_an_obstacle_makes_linears_run_alone(obstacle: str, all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_language_model("llama", tied=True))
    del model.model.layers[1:]
    attention = model.model.layers[0].self_attn
    if obstacle == "hook":
        attention.k_proj.register_forward_hook(lambda module, args, output: output * 2)
    elif obstacle == "pre-hook":
        attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif obstacle == "subclass":
        attention.k_proj.__class__ = type("Doubled", (PackedLinear,), {})
    elif obstacle == "forward":
        attention.k_proj.forward = lambda input: PackedLinear.forward(attention.k_proj, input) * 2
    elif obstacle == "precision":
        attention.k_proj.activation_precision = "exact"
    else:
        attention.k_proj = nn.Linear(64, 32)
    result = logits(model)
    assert calls == [2]
    ungroup_linears(model)
    assert torch.equal(logits(model), result)


def test_linears_that_are_called_on_their_own_run_alone(all_groups: None, calls: list[int]) -> None:
    attention = packed(tiny_language_model("llama", tied=True)).model.layers[0].self_attn
    with torch.inference_mode():
        input = torch.randn(2, 64)
        attention.q_proj(input)
        input.mul_(3)  # tensors of inference mode do not tell that they have changed
        key = attention.k_proj(input)
        assert torch.equal(key, attention.k_proj.packed_weight.linear(input))
    assert calls == []


def test_a_hook_that_writes_into_the_input_counts(all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_language_model("llama", tied=True))

    def double(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].mul_(2)

    model.model.layers[0].mlp.register_forward_pre_hook(double)
    with torch.inference_mode():
        grouped = model(random_tokens()).logits
        assert calls == [3, 2, 3, 2]
        ungroup_linears(model)
        assert torch.equal(model(random_tokens()).logits, grouped)


def test_a_failing_forward_leaves_nothing_behind(all_groups: None) -> None:
    model = packed(tiny_language_model("llama", tied=True))
    mlp = model.model.layers[0].mlp
    mlp.act_fn = None
    with torch.no_grad(), pytest.raises(TypeError):
        mlp(torch.randn(2, 64))
    assert mlp.gate_proj._group_call is None and mlp.up_proj._group_call is None


def test_threads_share_a_model(all_groups: None) -> None:
    model = packed(tiny_language_model("llama", tied=True))
    inputs = [torch.randint(0, 1000, (1, 4 + i)) for i in range(4)]
    with torch.no_grad():
        expected = [model(input).logits for input in inputs]
    failures: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(inputs[i]).logits, expected[i]):
                    failures.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_copies_and_pickles_group_their_own_linears(all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_language_model("llama", tied=True))
    expected = logits(model)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    size = len(file.getvalue())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for parameter in model.parameters():
        parameter.data.zero_()
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.weight_owner is None:
            module.signs = torch.zeros_like(module.signs)
    for other in (copied, loaded):
        calls.clear()
        assert torch.equal(logits(other), expected)
        assert calls == [3, 2, 3, 2]
    ungroup_linears(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert size < 1.1 * len(file.getvalue())


def test_new_tensors_are_seen(all_groups: None, calls: list[int]) -> None:
    model = packed(tiny_language_model("qwen2", tied=True))
    logits(model)
    projection = model.model.layers[0].self_attn.v_proj
    projection.signs = ~projection.signs
    projection.bias = nn.Parameter(torch.ones_like(projection.bias))
    changed = logits(model)
    assert calls == [3, 2, 3, 2] * 2
    ungroup_linears(model)
    assert torch.equal(logits(model), changed)


def test_groups_compile_and_export(all_groups: None, calls: list[int]) -> None:
    torch._dynamo.reset()
    model = packed(tiny_language_model("llama", tied=True))
    del model.model.layers[1:]
    expected = logits(model)
    assert calls == [3, 2]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        expected = mlp(input := torch.randn(3, 64))
        program = torch.export.export(mlp, (input,))
        torch.testing.assert_close(program.module()(input), expected)
    assert calls == [3, 2, 2]


def test_saved_models_load_into_groups(all_groups: None, calls: list[int], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = packed(tiny_language_model("mistral", tied=True))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    calls.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert calls == [3, 2, 3, 2]


def test_adapters_on_one_linear_end_the_group(all_groups: None, calls: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = packed(tiny_language_model("llama", tied=True))
    expected = logits(model)
    calls.clear()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    with torch.no_grad():
        assert torch.equal(adapted(random_tokens()).logits, expected)
    assert calls == [2, 2]


CLASSES = [
    pytest.param(package, name, siblings, id=name)
    for package, parents in linear_groups._PARENTS.items()
    for name, siblings in parents.items()
]


@pytest.mark.parametrize(("package", "name", "siblings"), CLASSES)
def test_known_classes_call_their_linears_with_their_unchanged_input(
    package: str, name: str, siblings: tuple[str, ...]
) -> None:
    try:
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    except ImportError as error:
        pytest.skip(f"this version of Transformers, or an extra that it needs: {error}")
    forward = getattr(module, name).forward
    function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    assert isinstance(function, ast.FunctionDef)
    input = function.args.args[1].arg
    written = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert input not in written
    called = {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and [argument.id for argument in node.args if isinstance(argument, ast.Name)] == [input]
    }
    assert called >= set(siblings)
