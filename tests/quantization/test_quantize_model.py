"""quantize_model: what is replaced and what is not in models of every kind, tied weights, errors, memory."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from loop_singular_bit import PackedEmbedding, PackedLinear, QuantizationConfig, quantize_model, quantize_weight
from loop_singular_bit.quantization.presets import PRESETS, UncalibratedWarning
from loop_singular_bit.quantization.quantize_model import QuantizationReport, matches_any, quantize_linear
from loop_singular_bit.quantization.quantize_weight import quantize_embedding_weight

VOCABULARY = 1100
B4 = QuantizationConfig(preset="b4")


@pytest.fixture(autouse=True)
def no_unexpected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncalibratedWarning)
        yield


class LanguageModel(nn.Module):
    """The parts of a language model in plain PyTorch."""

    def __init__(self, *, tied: bool = False, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.lm_head = nn.Linear(64, VOCABULARY, bias=False)
        self.embed_tokens = nn.Embedding(VOCABULARY, 64, padding_idx=0)
        self.positions = nn.Embedding(128, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"up_proj": nn.Linear(64, 96), "down_proj": nn.Linear(96, 64, bias=False), "gate": nn.Linear(64, 4)}
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(64)
        if not head_first:
            self.lm_head = nn.Linear(64, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(indices) + self.positions(torch.arange(indices.shape[-1]))
        for layer in self.layers:
            hidden = hidden + layer["down_proj"](functional.gelu(layer["up_proj"](hidden)))
        return self.lm_head(self.norm(hidden))


def names(report: QuantizationReport) -> list[str]:
    return [module.name for module in report.replaced]


def test_a_plain_model_is_packed_in_place() -> None:
    model = LanguageModel()
    indices = torch.randint(0, VOCABULARY, (3, 20))
    before = model(indices)
    weights = {name: module.weight.clone() for name, module in model.named_modules() if hasattr(module, "weight")}
    report = quantize_model(model, B4)
    assert names(report) == [
        "embed_tokens",
        *(f"layers.{layer}.{name}" for layer in range(2) for name in ("up_proj", "down_proj")),
        "lm_head",
    ]
    assert dict(report.skipped) == {
        "positions": "small: 128 embeddings, packing starts at 1024",
        "layers.0.gate": "tiny: 4 x 64, packing needs at least 32 features on both sides",
        "layers.1.gate": "tiny: 4 x 64, packing needs at least 32 features on both sides",
    }
    after = model(indices)
    assert functional.cosine_similarity(after, before, dim=-1).min() > 0.97
    for record in report.replaced:
        module = model.get_submodule(record.name)
        special = record.name in ("embed_tokens", "lm_head")
        expected = (quantize_embedding_weight if special else quantize_weight)(weights[record.name], "b4")
        assert isinstance(module, (PackedLinear, PackedEmbedding))
        assert torch.equal(module.packed_weight.signs, expected.signs)
        error = expected.dequantize() - weights[record.name]
        assert record.kind == ("embedding" if record.name == "embed_tokens" else "linear")
        assert record.relative_error == pytest.approx((error.norm() / weights[record.name].norm()).item(), rel=1e-4)
        assert record.sqnr_db == pytest.approx(-20 * torch.tensor(record.relative_error).log10().item(), rel=1e-4)
        assert record.bits_per_weight == expected.bits_per_weight
        assert (record.planes, record.outliers) == (8 if special else 4, 1)
        assert record.original_nbytes == weights[record.name].nbytes and record.packed_nbytes == expected.nbytes
    assert report.packed_nbytes == sum(buffer.nbytes for buffer in model.buffers())
    assert report.original_nbytes == sum(record.original_nbytes for record in report.replaced)
    count = sum(record.out_features * record.in_features for record in report.replaced)
    assert report.bits_per_weight == pytest.approx(8 * report.packed_nbytes / count)
    assert model.embed_tokens.padding_idx == 0


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_weight_is_packed_once_and_stays_tied(head_first: bool) -> None:
    model = LanguageModel(tied=True, head_first=head_first)
    report = quantize_model(model, QuantizationConfig(preset="b4", activation_precision="exact"))
    assert {"embed_tokens", "lm_head"} < set(names(report))
    owner, tied = ("lm_head", "embed_tokens") if head_first else ("embed_tokens", "lm_head")
    record = next(record for record in report.replaced if record.name == tied)
    assert record.tied_to == owner and record.packed_nbytes == record.original_nbytes == 0
    assert model.get_submodule(tied).weight_owner is model.get_submodule(owner)
    assert not any(name.startswith(f"{tied}.") for name in model.state_dict())
    assert model.embed_tokens.packed_weight.planes == PRESETS["b4"].embedding_planes
    hidden = torch.randn(2, 64)
    dense = model.embed_tokens.packed_weight.dequantize()
    torch.testing.assert_close(model.lm_head(hidden), hidden @ dense.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embed_tokens(torch.tensor([5])), dense[[5]])
    count = sum(record.out_features * record.in_features for record in report.replaced if record.tied_to is None)
    assert report.bits_per_weight == pytest.approx(8 * report.packed_nbytes / count)


def test_embeddings_and_heads_stay_when_asked() -> None:
    for tied in (False, True):
        model = LanguageModel(tied=tied)
        report = quantize_model(model, QuantizationConfig(preset="b4", quantize_embeddings=False))
        assert names(report) == [f"layers.{layer}.{name}" for layer in range(2) for name in ("up_proj", "down_proj")]
        assert "quantize_embeddings is off" in dict(report.skipped)["embed_tokens"]
        assert "quantize_embeddings is off" in dict(report.skipped)["lm_head"]
        assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_a_head_whose_embedding_stays_dense_stays_dense_too() -> None:
    model = LanguageModel(tied=True)
    report = quantize_model(model, QuantizationConfig(preset="b4", skip_modules=["embed_tokens"]))
    assert dict(report.skipped)["lm_head"] == "shares its weight with embed_tokens, which stays as it is"
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        (["lm_head"], {"lm_head"}),
        (["down_proj"], {"layers.0.down_proj", "layers.1.down_proj"}),
        (["layers.1"], {"layers.1.up_proj", "layers.1.down_proj", "layers.1.gate"}),
        ([r"layers\.\d+\.up.*", "lm_head"], {"layers.0.up_proj", "layers.1.up_proj", "lm_head"}),
        (["up", "layers.1.u", "head"], set()),
    ],
)
def test_skip_modules(patterns: list[str], skipped: set[str]) -> None:
    report = quantize_model(LanguageModel(), QuantizationConfig(preset="b4", skip_modules=patterns))
    assert {name for name, reason in report.skipped if reason == "named in skip_modules"} == skipped
    assert not skipped & set(names(report))


def test_matches_any_treats_dots_as_boundaries() -> None:
    assert matches_any("a.b.c", ["b.c"]) and matches_any("a.b.c", ["a"]) and matches_any("a.b.c", ["a.b.c"])
    assert matches_any("a.b.c", [r"a\..*"]) and not matches_any("a.b.c", ["b"]) and not matches_any("a.bb.c", ["b.c"])


def test_outlier_fraction_and_activation_precision_reach_the_modules() -> None:
    model = nn.Sequential(nn.Linear(100, 64))
    quantize_model(model, QuantizationConfig(preset="b4", outlier_fraction=0.05, activation_precision="int16"))
    assert isinstance(model[0], PackedLinear)
    assert model[0].packed_weight.outliers == 5 and model[0].activation_precision == "int16"


def test_a_module_that_several_parents_hold_is_packed_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.again = self.first
            self.inner = nn.Sequential(self.first, nn.ReLU())

    model = Shared()
    report = quantize_model(model, B4)
    assert names(report) == ["first"]
    assert isinstance(model.first, PackedLinear)
    assert model.first is model.again is model.inner[0]


def test_two_linears_that_share_a_weight() -> None:
    model = nn.ModuleDict({"one": nn.Linear(64, 48), "two": nn.Linear(64, 48)})
    model["two"].weight = model["one"].weight
    bias = model["two"].bias
    report = quantize_model(model, B4)
    assert [(record.name, record.tied_to, record.planes) for record in report.replaced] == [
        ("one", None, 4),
        ("two", "one", 4),
    ]
    assert model["two"].bias is bias
    input = torch.randn(3, 64)
    torch.testing.assert_close(model["two"](input) - bias, model["one"](input) - model["one"].bias)


def test_what_is_not_a_linear_is_named_with_a_reason() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 96))

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 96))
            self.bias = nn.Parameter(torch.zeros(96))

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict(
        {
            "experts": Experts(),
            "c_attn": Conv1D(),
            "scaled": Scaled(64, 64),
            "image": nn.Conv2d(3, 64, 3),
            "attention": nn.MultiheadAttention(64, 4),
            "wide": nn.Linear(65537, 32, device="meta"),
            "clipped": nn.Embedding(2000, 64, max_norm=1.0),
            "plain": nn.Linear(64, 64),
        }
    )
    report = quantize_model(model, B4)
    assert names(report) == ["plain"]
    reasons = dict(report.skipped)
    assert "fused 3-D weight (4 x 64 x 96)" in reasons["experts.gate_up_proj"]
    assert "Conv1D (64 x 96) is not supported: its weight is the transpose" in reasons["c_attn"]
    assert reasons["scaled"] == "Scaled is a subclass of nn.Linear, whose forward may be another"
    assert "Conv2d (64 x 3 x 3 x 3)" in reasons["image.weight"]
    assert "MultiheadAttention (192 x 64)" in reasons["attention.in_proj_weight"]
    assert "subclass of nn.Linear" in reasons["attention.out_proj"]
    assert "at most 65536" in reasons["wide"]
    assert "max_norm" in reasons["clipped"]
    assert set(reasons) == {
        "experts.gate_up_proj",
        "c_attn",
        "scaled",
        "image.weight",
        "attention.in_proj_weight",
        "attention.out_proj",
        "wide",
        "clipped",
    }


def test_parametrized_linears_are_left_alone() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    report = quantize_model(model, B4)
    assert names(report) == ["1"]
    assert model(torch.randn(2, 64)).shape == (2, 64)


@pytest.mark.parametrize("training", [False, True])
def test_the_transformer_layers_of_torch_run(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).train(training)
    input, padding = torch.randn(2, 7, 64), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    report = quantize_model(model, B4)
    assert names(report) == [f"layers.{number}.linear{part}" for number in range(2) for part in (1, 2)]
    with torch.no_grad():
        assert model(input).shape == (2, 7, 64)
        assert model(input, src_key_padding_mask=padding).shape == (2, 7, 64)
    assert model.layers[0].linear1.training == training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_of_every_dtype_keep_it(dtype: torch.dtype) -> None:
    model = LanguageModel(tied=True).to(dtype)
    quantize_model(model, B4)
    assert model.embed_tokens(torch.tensor([1])).dtype == dtype
    assert model(torch.randint(0, VOCABULARY, (2, 5))).dtype == dtype


def test_dense_weights_are_freed_one_by_one() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []

    def count_alive(*_: object) -> None:
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))

    class Watched(nn.Sequential):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if isinstance(value, PackedLinear):
                count_alive()

    model.__class__ = Watched
    quantize_model(model, B4)
    count_alive()
    # The layer just replaced is held by the function that replaces it.
    assert alive == [4, 3, 2, 1, 0]


def test_a_bare_linear_has_a_function_of_its_own() -> None:
    linear = nn.Linear(64, 48)
    with pytest.raises(ValueError, match="a bare Linear, which cannot be swapped in place; use quantize_linear"):
        quantize_model(linear, B4)
    packed = quantize_linear(linear, QuantizationConfig(preset="b4", activation_precision="exact"))
    input = torch.randn(3, 64)
    assert functional.cosine_similarity(packed(input), linear(input), dim=-1).min() > 0.98
    assert packed.bias is linear.bias and packed.activation_precision == "exact"


def test_fails_when_nothing_was_replaced_and_says_why() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match="nothing to quantize in Sequential: 0: tiny: 8 x 8"):
        quantize_model(model, B4)
    with pytest.raises(ValueError, match="nothing to quantize in Sequential: it has no linear layers"):
        quantize_model(nn.Sequential(nn.ReLU()), B4)
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, B4)
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_model(model, B4)


def test_names_the_module_whose_weight_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^1: .*row 3.*column 5"):
        quantize_model(model, B4)


def test_presets_without_calibration_speak_up() -> None:
    with pytest.warns(UncalibratedWarning, match="'b2'") as caught:
        quantize_model(nn.Sequential(nn.Linear(64, 64)))
    assert caught[0].filename == __file__
    with pytest.warns(UncalibratedWarning, match="'b3'") as caught:
        quantize_linear(nn.Linear(64, 64), QuantizationConfig(preset="b3"))
    assert caught[0].filename == __file__
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="force=True"):
        quantize_model(model, QuantizationConfig(preset="b1"))
    assert type(model[0]) is nn.Linear
    with pytest.warns(UncalibratedWarning):
        quantize_model(model, QuantizationConfig(preset="b1", force=True))
    assert model[0].packed_weight.planes == 1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"preset": "b5"}, ValueError, "expected one of b1, b2, b3, b4, historic, got 'b5'"),
        ({"outlier_fraction": 2.0}, ValueError, "outlier_fraction: expected 0 to 1, got 2.0"),
        ({"skip_modules": "lm_head"}, TypeError, "expected a sequence of names, got the string 'lm_head'"),
        ({"skip_modules": ["("]}, ValueError, r"'\(' is not a regular expression"),
        ({"activation_precision": "int4"}, ValueError, "expected one of int8, int16, exact, got 'int4'"),
    ],
)
def test_configuration_refuses(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizationConfig(**fields)


def test_the_report_can_be_read() -> None:
    text = str(quantize_model(LanguageModel(tied=True), B4))
    assert text.startswith("6 modules packed with preset b4: ")
    assert "  layers.0.up_proj: linear 96 x 64, " in text
    assert "  lm_head: tied to embed_tokens" in text
    assert "  positions: small: 128 embeddings" in text


def test_a_hugging_face_head_is_found_by_the_model_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(64, 64)
            self.vocabulary_out = nn.Linear(64, VOCABULARY)

        def get_output_embeddings(self) -> nn.Module:
            return self.vocabulary_out

    model = Model()
    quantize_model(model, B4)
    assert (model.body.packed_weight.planes, model.vocabulary_out.packed_weight.planes) == (4, 8)


def test_modules_that_a_hugging_face_model_wants_in_float32_stay_dense() -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules = ("wo",)

        def __init__(self) -> None:
            super().__init__()
            self.wi, self.wo, self.wow = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    report = quantize_model(Model(), B4)
    assert names(report) == ["wi", "wow"]
    assert report.skipped == [("wo", "the model wants it in float32 (_keep_in_fp32_modules)")]


def test_reading_the_dense_weight_of_a_packed_module_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, B4)
    assert not hasattr(model[0], "weight")
    with pytest.raises(AttributeError, match=r"PackedLinear has no dense weight; .* skip_modules"):
        _ = model[0].weight
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        _ = model[0].wieght
