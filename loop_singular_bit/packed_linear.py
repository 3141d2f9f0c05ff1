"""Drop-in modules for nn.Linear and nn.Embedding with a packed weight; buffers have the names of the packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import ops
from .packed_weight import TENSOR_NAMES, PackedLayout, PackedWeight

if TYPE_CHECKING:
    from .linear_groups import GroupCall
    from .quantization.presets import Preset


class _PackedModule(nn.Module):
    """Holds the packed tensors as buffers that keep their dtypes through `.to(dtype)`, `.half()` and the like."""

    signs: torch.Tensor
    scales: torch.Tensor
    outlier_columns: torch.Tensor
    outlier_deltas: torch.Tensor
    outlier_scales: torch.Tensor
    column_scales: torch.Tensor | None
    means: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # A tuple, so that the owner of a tied weight is not registered here as a child: its buffers have one owner.
        self._owner: tuple[_PackedModule, ...] = ()

    @property
    def weight_owner(self) -> _PackedModule | None:
        """The module whose packed tensors this one uses (see `tied_to`); None when it has its own."""
        return self._owner[0] if self._owner else None

    def _layout_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no dense weight; packed_weight.dequantize() makes one. If the model reads "
                "this attribute, leave the module dense with skip_modules"
            )
        return super().__getattr__(name)

    @property
    def packed_weight(self) -> PackedWeight:
        """The packed tensors that this module uses (not copies)."""
        buffers = zip(TENSOR_NAMES, self._packed_buffers(), strict=True)
        tensors = {name: buffer for name, buffer in buffers if buffer is not None}
        return PackedWeight.from_tensors(tensors, *self._layout_shape())

    def _register_packed(self, packed_weight: PackedWeight) -> None:
        for name in TENSOR_NAMES:
            self.register_buffer(name, getattr(packed_weight, name))

    def _register_empty(self, layout: PackedLayout, device: torch.device | str | None) -> None:
        tensors = layout.tensors()
        for name in TENSOR_NAMES:
            buffer = None
            if name in tensors:
                dtype, shape = tensors[name]
                buffer = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, buffer)

    def _packed_buffers(self) -> ops.PackedTensors:
        if self._owner:
            return self._owner[0]._packed_buffers()
        # As attributes of a module they would take 15 microseconds.
        buffers: Any = self._buffers
        return (
            buffers["signs"],
            buffers["scales"],
            buffers["outlier_columns"],
            buffers["outlier_deltas"],
            buffers["outlier_scales"],
            buffers["column_scales"],
            buffers["means"],
        )

    def _weight_repr(self) -> str:
        layout = self.packed_weight.layout
        tied = ", tied=True" if self._owner else ""
        return f"planes={layout.planes}, outliers={layout.outliers}, bits_per_weight={layout.bits_per_weight:.2f}{tied}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name in TENSOR_NAMES if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class PackedLinear(_PackedModule):
    """`nn.Linear` with a packed weight: input [..., in_features] to [..., out_features].

    Made by `from_linear`, `from_packed_weight`, `empty` or `tied_to`. The packed tensors are buffers named `signs`,
    `scales`, ...; `bias` is a Parameter or None. Gradients reach the input and the bias, so that adapters train on top.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
        activation_precision: "int8", "int16" or "exact"; see `ops.packed_linear`.
    """

    bias: nn.Parameter | None
    _group_call: GroupCall | None = None  # while a parent's forward runs that calls this linear among others

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, activation_precision: str
    ) -> None:
        super().__init__()
        if activation_precision not in ops.ACTIVATION_PRECISIONS:
            raise ValueError(
                f"activation_precision: expected one of {', '.join(ops.ACTIVATION_PRECISIONS)}, "
                f"got {activation_precision!r}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation_precision = activation_precision
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, preset: str | Preset = "b2", *, activation_precision: str = "int8"
    ) -> PackedLinear:
        """Packs the weight of a linear; the bias is kept as it is (the same Parameter).

        Raises:
            ValueError, TypeError: see `quantize_weight`.
        """
        from .quantization.quantize_weight import quantize_weight

        return cls.from_packed_weight(
            quantize_weight(linear.weight, preset), linear.bias, activation_precision=activation_precision
        )

    @classmethod
    def from_packed_weight(
        cls,
        packed_weight: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        activation_precision: str = "int8",
    ) -> PackedLinear:
        """A module that holds the tensors of `packed_weight` (not copies) and a bias [out_features].

        Raises:
            ValueError: the bias has the wrong shape.
        """
        if bias is not None:
            if tuple(bias.shape) != (packed_weight.out_features,):
                raise ValueError(f"bias: expected shape [{packed_weight.out_features}], got {list(bias.shape)}")
            if not isinstance(bias, nn.Parameter):
                bias = nn.Parameter(bias)
        module = cls(packed_weight.in_features, packed_weight.out_features, bias, activation_precision)
        module._register_packed(packed_weight)
        return module

    @classmethod
    def empty(
        cls,
        layout: PackedLayout,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation_precision: str = "int8",
    ) -> PackedLinear:
        """A module with uninitialised tensors of a layout, to be loaded into; `device="meta"` allocates nothing.

        `dtype` is the bias's; the packed tensors have the dtypes of the format.
        """
        parameter = nn.Parameter(torch.empty(layout.out_features, device=device, dtype=dtype)) if bias else None
        module = cls(layout.in_features, layout.out_features, parameter, activation_precision)
        module._register_empty(layout, device)
        return module

    @classmethod
    def tied_to(
        cls,
        owner: PackedEmbedding | PackedLinear,
        bias: nn.Parameter | None = None,
        *,
        activation_precision: str = "int8",
    ) -> PackedLinear:
        """A linear, mostly an output head, that multiplies with the owner's weight: it has no packed tensors itself.

        State dicts hold the tensors once, under the owner's name.
        """
        out_features, in_features = owner._layout_shape()
        module = cls(in_features, out_features, bias, activation_precision)
        module._owner = (owner,)
        return module

    @property
    def qweight(self) -> torch.Tensor:
        """The signs, under the name by which PEFT asks a quantized layer for its device."""
        return self._packed_buffers()[0]

    def _layout_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _bias_for(self, input: torch.Tensor) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._parameters["bias"]
        return bias if bias is None or bias.dtype == input.dtype else bias.to(input.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        call = self._group_call
        if call is not None and (output := call.output_of(self, input)) is not None:
            return output
        return ops.packed_linear(
            input,
            *self._packed_buffers(),
            self._bias_for(input),
            self.out_features,
            activation_precision=self.activation_precision,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._weight_repr()}"
        )


class PackedEmbedding(_PackedModule):
    """`nn.Embedding` with a packed weight: indices [...] to [..., embedding_dim].

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as in `nn.Embedding`; padding_idx matters in training only.
        dtype: of the output: float32, bfloat16 or float16; follows `.to(dtype)` as a weight would.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, preset: str | Preset = "b2") -> PackedEmbedding:
        """Packs the weight of an embedding at `preset.embedding_planes`; the output keeps the dtype of the weight.

        Raises:
            ValueError: `max_norm` is set (it rewrites the weight in every call), or see `quantize_weight`.
        """
        from .quantization.presets import find_preset
        from .quantization.quantize_weight import quantize_embedding_weight

        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected max_norm=None, got {embedding.max_norm}: it rewrites the weight")
        packed_weight = quantize_embedding_weight(embedding.weight, find_preset(preset))
        return cls.from_packed_weight(packed_weight, embedding.padding_idx, dtype=embedding.weight.dtype)

    @classmethod
    def from_packed_weight(
        cls, packed_weight: PackedWeight, padding_idx: int | None = None, *, dtype: torch.dtype = torch.float32
    ) -> PackedEmbedding:
        """A module that holds the tensors of `packed_weight` (not copies): one row per embedding."""
        module = cls(packed_weight.out_features, packed_weight.in_features, padding_idx, dtype)
        module._register_packed(packed_weight)
        return module

    @classmethod
    def empty(
        cls,
        layout: PackedLayout,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedEmbedding:
        """A module with uninitialised tensors of a layout, to be loaded into; `dtype` is the output's."""
        module = cls(layout.out_features, layout.in_features, padding_idx, dtype or torch.get_default_dtype())
        module._register_empty(layout, device)
        return module

    @classmethod
    def tied_to(
        cls, owner: PackedEmbedding | PackedLinear, padding_idx: int | None = None, *, dtype: torch.dtype
    ) -> PackedEmbedding:
        """An embedding that looks up rows of the owner's weight: it has no packed tensors itself."""
        module = cls(*owner._layout_shape(), padding_idx, dtype)
        module._owner = (owner,)
        return module

    def _layout_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return ops.packed_embedding(
            input, *self._packed_buffers(), self.num_embeddings, self.embedding_dim, dtype=self.dtype
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._packed_buffers()[0].device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._weight_repr()}"
