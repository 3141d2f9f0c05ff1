"""PackedLinear and PackedEmbedding as modules: buffers, state dicts, dtypes, tying, compile and export."""

from __future__ import annotations

import copy

import pytest
import torch
from random_packed_weights import random_packed_weight, reference_dequantize
from torch import nn
from torch.nn import functional

from loop_singular_bit import quantize_weight
from loop_singular_bit.packed_linear import PackedEmbedding, PackedLinear
from loop_singular_bit.packed_weight import TENSOR_NAMES, PackedLayout


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = PackedEmbedding.from_packed_weight(random_packed_weight(50, 64, planes=6))
        self.layer = PackedLinear.from_packed_weight(random_packed_weight(64, 64, seed=1), torch.ones(64))
        self.head = PackedLinear.tied_to(self.embed)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(functional.gelu(self.layer(self.embed(indices))))


def test_from_linear_packs_the_weight_and_keeps_the_bias() -> None:
    linear = nn.Linear(70, 40)
    packed = PackedLinear.from_linear(linear, preset="b4", activation_precision="exact")
    assert (packed.in_features, packed.out_features, packed.activation_precision) == (70, 40, "exact")
    assert packed.bias is linear.bias
    expected = quantize_weight(linear.weight, "b4")
    for name, tensor in expected.tensors().items():
        assert torch.equal(packed.get_buffer(name).view(torch.uint8), tensor.view(torch.uint8)), name
    assert list(packed.state_dict()) == ["bias", *expected.tensors()]
    input = torch.randn(2, 3, 70)
    torch.testing.assert_close(packed(input), functional.linear(input, expected.dequantize(), linear.bias))
    assert torch.nn.functional.cosine_similarity(packed(input), linear(input), dim=-1).min() > 0.98


def test_from_linear_without_bias() -> None:
    packed = PackedLinear.from_linear(nn.Linear(70, 40, bias=False))
    assert packed.bias is None and "bias" not in packed.state_dict()
    assert packed(torch.randn(3, 70)).shape == (3, 40)


def test_from_embedding_uses_the_planes_for_embeddings() -> None:
    embedding = nn.Embedding(50, 64, padding_idx=3)
    packed = PackedEmbedding.from_embedding(embedding, preset="b2")
    assert (packed.num_embeddings, packed.embedding_dim, packed.padding_idx) == (50, 64, 3)
    assert packed.packed_weight.planes == 6
    indices = torch.randint(0, 50, (4, 5))
    assert torch.equal(packed(indices), packed.packed_weight.dequantize()[indices])
    assert torch.equal(packed(torch.tensor([3])), torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"max_norm=None, got 1\.0"):
        PackedEmbedding.from_embedding(nn.Embedding(50, 64, max_norm=1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_never_touch_the_packed_tensors(dtype: torch.dtype) -> None:
    model = TiedModel()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    assert model.layer.bias is not None and model.layer.bias.dtype == dtype
    assert model.embed.dtype == dtype
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), name
    if dtype != torch.float64:
        assert model(torch.tensor([[1, 2]])).dtype == dtype
    for cast in ("half", "float", "bfloat16", "double"):
        getattr(model, cast)()
        assert {buffer.dtype for buffer in model.buffers()} == {torch.int32, torch.float16, torch.uint16, torch.int8}


def test_moves_to_another_device_and_becomes_empty_there() -> None:
    model = TiedModel().to("meta")
    assert {tensor.device.type for tensor in (*model.buffers(), *model.parameters())} == {"meta"}
    assert model(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 50)
    model.to_empty(device="cpu")
    model.load_state_dict(TiedModel().state_dict())
    indices = torch.randint(0, 50, (2, 3))
    assert torch.equal(model(indices), TiedModel()(indices))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_through_a_meta_module(assign: bool) -> None:
    packed_weight = random_packed_weight(40, 70, planes=3, means=True)
    source = PackedLinear.from_packed_weight(packed_weight, torch.randn(40))
    target = PackedLinear.empty(packed_weight.layout, bias=True, device="meta", dtype=torch.float32)
    assert all(tensor.is_meta for tensor in target.state_dict().values())
    if not assign:
        target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict(), assign=assign)
    for name, tensor in source.state_dict().items():
        loaded = target.state_dict()[name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    input = torch.randn(3, 70)
    assert torch.equal(target(input), source(input))


def test_empty_has_the_buffers_of_the_layout() -> None:
    layout = PackedLayout(33, 65, planes=3, outliers=2, column_scales=False, means=True)
    for module in (PackedLinear.empty(layout), PackedEmbedding.empty(layout, padding_idx=1, dtype=torch.bfloat16)):
        buffers = {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in module.named_buffers()}
        assert buffers == layout.tensors()
        assert module.packed_weight.layout == layout
    assert not list(PackedLinear.empty(layout).parameters())
    bias = PackedLinear.empty(layout, bias=True, dtype=torch.bfloat16).bias
    assert bias is not None and bias.shape == (33,) and bias.dtype == torch.bfloat16
    assert PackedEmbedding.empty(layout).dtype == torch.get_default_dtype()


def test_loading_other_shapes_fails() -> None:
    state = PackedLinear.from_packed_weight(random_packed_weight(40, 70, planes=3)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for signs.*\[2, 3, 3, 32\].*\[2, 2, 3, 32\]"):
        PackedLinear.from_packed_weight(random_packed_weight(40, 70, planes=2)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*column_scales"):
        module = PackedLinear.from_packed_weight(random_packed_weight(40, 70, planes=3))
        module.load_state_dict({name: tensor for name, tensor in state.items() if name != "column_scales"})


def test_a_tied_head_owns_nothing_and_follows_its_embedding() -> None:
    model = TiedModel()
    assert [name for name in model.state_dict() if not name.startswith("layer")] == [
        f"embed.{name}" for name in TENSOR_NAMES[:6]
    ]
    assert model.head.weight_owner is model.embed and model.embed.weight_owner is None
    assert not list(model.head.parameters()) and not list(model.head.buffers())
    input = torch.randn(3, 64)
    dense = reference_dequantize(model.embed.packed_weight, torch.float32)
    model.head.activation_precision = "exact"
    torch.testing.assert_close(model.head(input), input @ dense.T, rtol=1e-4, atol=1e-5)
    replaced = random_packed_weight(50, 64, planes=6, seed=9)
    model.embed.load_state_dict(PackedEmbedding.from_packed_weight(replaced).state_dict(), assign=True)
    torch.testing.assert_close(
        model.head(input), input @ reference_dequantize(replaced, torch.float32).T, rtol=1e-4, atol=1e-5
    )


def test_an_embedding_may_be_tied_to_a_linear() -> None:
    linear = PackedLinear.from_packed_weight(random_packed_weight(50, 64))
    embedding = PackedEmbedding.tied_to(linear, padding_idx=2, dtype=torch.bfloat16)
    assert not embedding.state_dict() and (embedding.num_embeddings, embedding.embedding_dim) == (50, 64)
    assert torch.equal(embedding(torch.tensor([7])), linear.packed_weight.dequantize(torch.bfloat16)[[7]])
    assert embedding.to(torch.float32)(torch.tensor([7])).dtype == torch.float32


def test_a_deep_copy_is_tied_to_its_own_embedding() -> None:
    model = TiedModel()
    copied = copy.deepcopy(model)
    assert copied.head.weight_owner is copied.embed is not model.embed
    indices = torch.randint(0, 50, (2, 3))
    assert torch.equal(copied(indices), model(indices))


def test_bias_of_another_dtype_than_the_input() -> None:
    module = PackedLinear.from_packed_weight(random_packed_weight(40, 70), torch.full((40,), 0.5))
    input = torch.randn(3, 70)
    assert module(input.bfloat16()).dtype == torch.bfloat16
    without = PackedLinear.from_packed_weight(random_packed_weight(40, 70))
    torch.testing.assert_close(module(input), without(input) + 0.5)


def test_gradients_reach_input_and_bias() -> None:
    module = PackedLinear.from_packed_weight(random_packed_weight(40, 70), torch.zeros(40))
    input = torch.randn(3, 70, requires_grad=True)
    module(input).sum().backward()
    assert input.grad is not None and module.bias is not None and module.bias.grad is not None
    torch.testing.assert_close(module.bias.grad, torch.full((40,), 3.0))
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_what_a_user_sees_when_printing() -> None:
    model = TiedModel()
    assert repr(model.layer) == (
        "PackedLinear(in_features=64, out_features=64, bias=True, planes=2, outliers=3, bits_per_weight=4.12)"
    )
    assert repr(model.head).endswith("bits_per_weight=11.68, tied=True)")
    assert repr(model.embed) == "PackedEmbedding(50, 64, planes=6, outliers=3, bits_per_weight=11.68)"


def test_refuses_a_wrong_bias_and_an_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"bias: expected shape \[40\], got \[41\]"):
        PackedLinear.from_packed_weight(random_packed_weight(40, 70), torch.zeros(41))
    with pytest.raises(ValueError, match="expected one of int8, int16, exact, got 'int4'"):
        PackedLinear.from_packed_weight(random_packed_weight(40, 70), activation_precision="int4")


@pytest.mark.parametrize("precision", ["int8", "int16", "exact"])
def test_activation_precision_is_used(precision: str) -> None:
    packed_weight = random_packed_weight(40, 700)
    module = PackedLinear.from_packed_weight(packed_weight, activation_precision=precision)
    input = torch.randn(64, 700)
    error = (module(input) - input @ reference_dequantize(packed_weight, torch.float32).T).abs().max().item()
    low, high = {"int8": (1e-3, 1e-1), "int16": (1e-5, 1e-3), "exact": (0, 1e-5)}[precision]
    assert low <= error <= high


def test_modules_compile_into_one_graph_and_export() -> None:
    torch._dynamo.reset()
    model = TiedModel()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 3), (4, 5)]:
        indices = torch.randint(0, 50, shape)
        torch.testing.assert_close(compiled(indices), model(indices))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randint(0, 50, (3, 5)),), dynamic_shapes=({0: batch},))
    assert {name for name in program.state_dict if name.endswith("signs")} == {"embed.signs", "layer.signs"}
    indices = torch.randint(0, 50, (7, 5))
    assert torch.equal(program.module()(indices), model(indices))
