"""One weight as packed tensors, and the shapes and sizes they have. Layout: docs/packed_format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from . import ops

FORMAT_VERSION = 1
ROWS_PER_TILE = 32
COLUMNS_PER_WORD = 32
MAX_PLANES = 8
MAX_IN_FEATURES = 65536  # outlier columns are uint16

TENSOR_NAMES = (
    "signs",
    "scales",
    "outlier_columns",
    "outlier_deltas",
    "outlier_scales",
    "column_scales",
    "means",
)


@dataclass(frozen=True)
class PackedLayout:
    """Everything that determines the shapes and bytes of a packed weight; known before a weight is read.

    Args:
        out_features: rows N of the weight.
        in_features: columns K of the weight, at most 65,536.
        planes: sign planes P, 1 to 8.
        outliers: outliers per row O, at most in_features.
        column_scales: whether there is one scale per column.
        means: whether there is one mean per row.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range.
    """

    out_features: int
    in_features: int
    planes: int
    outliers: int
    column_scales: bool = True
    means: bool = False

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features", "planes", "outliers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {value!r}")
        for name in ("column_scales", "means"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {value!r}")
        for name, low, high in (
            ("out_features", 1, 2**40),
            ("in_features", 1, MAX_IN_FEATURES),
            ("planes", 1, MAX_PLANES),
            ("outliers", 0, self.in_features),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")

    @property
    def row_tiles(self) -> int:
        return -(-self.out_features // ROWS_PER_TILE)

    @property
    def words(self) -> int:
        return -(-self.in_features // COLUMNS_PER_WORD)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each tensor, in the order in which they are stored."""
        tiles, rows = self.row_tiles, ROWS_PER_TILE
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "signs": (torch.int32, (tiles, self.planes, self.words, rows)),
            "scales": (torch.float16, (tiles, self.planes, rows)),
            "outlier_columns": (torch.uint16, (tiles, self.outliers, rows)),
            "outlier_deltas": (torch.int8, (tiles, self.outliers, rows)),
            "outlier_scales": (torch.float16, (tiles, rows)),
        }
        if self.column_scales:
            tensors["column_scales"] = (torch.float16, (self.in_features,))
        if self.means:
            tensors["means"] = (torch.float16, (tiles, rows))
        return tensors

    def part_nbytes(self) -> dict[str, int]:
        """Stored bytes of each tensor."""
        return {name: dtype.itemsize * _product(shape) for name, (dtype, shape) in self.tensors().items()}

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors, padding rows and columns included."""
        return sum(self.part_nbytes().values())

    @property
    def bits_per_weight(self) -> float:
        """8 x all stored bytes / (out_features x in_features): nothing is left out."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def to_dict(self) -> dict[str, Any]:
        """As written into `quantization_config.modules` of a packed checkpoint."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "planes": self.planes,
            "outliers": self.outliers,
            "column_scales": self.column_scales,
            "means": self.means,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PackedLayout:
        """Inverse of `to_dict`. The key `kind` of a checkpoint's entry is accepted and left to the caller.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
            TypeError: a value has the wrong type.
        """
        known = {"out_features", "in_features", "planes", "outliers", "column_scales", "means"}
        given = {name: value for name, value in fields.items() if name != "kind"}
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"packed layout: unknown keys {unknown}; expected {sorted(known)}")
        if missing := sorted(known - given.keys()):
            raise ValueError(f"packed layout: missing keys {missing}; got {sorted(given)}")
        return cls(**given)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The packed tensors of one weight, which stands for `dequantize()`, a dense [out_features, in_features].

    Shapes and dtypes are those of `layout.tensors()`; they are checked here, contents by `validate`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor has the wrong shape or is not contiguous.
    """

    signs: torch.Tensor
    scales: torch.Tensor
    outlier_columns: torch.Tensor
    outlier_deltas: torch.Tensor
    outlier_scales: torch.Tensor
    out_features: int
    in_features: int
    column_scales: torch.Tensor | None = None
    means: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_packed_tensors(self.tensors(), self.out_features, self.in_features)

    @property
    def planes(self) -> int:
        return self.signs.shape[1]

    @property
    def outliers(self) -> int:
        """Outliers per row."""
        return self.outlier_columns.shape[1]

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(
            out_features=self.out_features,
            in_features=self.in_features,
            planes=self.planes,
            outliers=self.outliers,
            column_scales=self.column_scales is not None,
            means=self.means is not None,
        )

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        return self.layout.bits_per_weight

    @property
    def device(self) -> torch.device:
        return self.signs.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by name, in the order in which they are stored."""
        return {name: tensor for name in TENSOR_NAMES if (tensor := getattr(self, name)) is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> PackedWeight:
        """Inverse of `tensors()`.

        Raises:
            ValueError: a tensor is missing, unknown, or has the wrong shape.
            TypeError: a tensor has the wrong dtype.
        """
        _check_names(tensors)
        return cls(**tensors, out_features=out_features, in_features=in_features)

    def validate(self) -> None:
        """Checks contents: finite scales of the right sign, largest plane first; outlier columns in range, ascending.

        Raises:
            ValueError: naming the tensor, the row and the value.
        """
        rows = self.out_features
        scales = _rows_first(self.scales, rows)
        _check_finite("scales", scales, "row")
        if (scales < 0).any():
            row, plane = (scales < 0).nonzero()[0].tolist()
            raise ValueError(f"scales: expected >= 0, got {scales[row, plane].item()} at row {row}, plane {plane}")
        growing = scales[:, 1:] > scales[:, :-1]
        if growing.any():
            row, plane = growing.nonzero()[0].tolist()
            raise ValueError(
                f"scales: expected the largest plane first, got {scales[row, plane].item()} then "
                f"{scales[row, plane + 1].item()} at row {row}, plane {plane + 1}"
            )
        _check_finite("outlier_scales", self.outlier_scales.reshape(-1, 1)[:rows], "row")
        if self.means is not None:
            _check_finite("means", self.means.reshape(-1, 1)[:rows], "row")
        if self.column_scales is not None:
            _check_finite("column_scales", self.column_scales.reshape(-1, 1), "column")
            if (self.column_scales <= 0).any():
                column = int((self.column_scales <= 0).nonzero()[0])
                value = self.column_scales[column].item()
                raise ValueError(f"column_scales: expected > 0, got {value} at column {column}")
        columns = _rows_first(self.outlier_columns.to(torch.int32), rows)
        deltas = _rows_first(self.outlier_deltas, rows)
        if (columns >= self.in_features).any():
            row, slot = (columns >= self.in_features).nonzero()[0].tolist()
            raise ValueError(
                f"outlier_columns: expected columns below in_features = {self.in_features}, "
                f"got {columns[row, slot].item()} at row {row}, slot {slot}"
            )
        step = columns[:, 1:] - columns[:, :-1]
        unsorted = (step < 0) | ((step == 0) & (deltas[:, 1:] != 0))
        if unsorted.any():
            row, slot = unsorted.nonzero()[0].tolist()
            raise ValueError(
                f"outlier_columns: expected ascending columns (equal ones only in slots whose delta is 0), got "
                f"{columns[row, slot].item()} then {columns[row, slot + 1].item()} at row {row}, slot {slot + 1}"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight [out_features, in_features] that the packed tensors stand for."""
        from . import ops  # here: files are read and inspected without the compiled operators

        return ops.dequantize(*self.op_tensors(), self.out_features, self.in_features, dtype=dtype)

    def linear(
        self, input: torch.Tensor, bias: torch.Tensor | None = None, activation_precision: str = "int8"
    ) -> torch.Tensor:
        """`input [..., in_features]` times the transposed weight: [..., out_features]; see `ops.packed_linear`."""
        from . import ops

        return ops.packed_linear(
            input, *self.op_tensors(), bias, self.out_features, activation_precision=activation_precision
        )

    def rows(self, first_row: int, count: int) -> PackedWeight:
        """Rows first_row .. first_row + count - 1 as a weight of their own that shares memory with this one.

        Raises:
            ValueError: first_row is not a multiple of 32, or the rows are not all there.
        """
        if first_row % ROWS_PER_TILE or not 0 <= first_row < first_row + count <= self.out_features:
            raise ValueError(
                f"rows: expected a first row that is a multiple of {ROWS_PER_TILE} and rows within "
                f"{self.out_features}, got {count} rows from row {first_row}"
            )
        tiles = slice(first_row // ROWS_PER_TILE, -(-(first_row + count) // ROWS_PER_TILE))
        tensors = {
            name: tensor if name == "column_scales" else tensor[tiles] for name, tensor in self.tensors().items()
        }
        return PackedWeight.from_tensors(tensors, count, self.in_features)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on another device; dtypes are part of the format and never change."""
        return self.from_tensors(
            {name: tensor.to(device) for name, tensor in self.tensors().items()}, self.out_features, self.in_features
        )

    def op_tensors(self) -> ops.PackedTensors:
        """The tensors in the order in which operators take them; None for those that are absent."""
        return (
            self.signs,
            self.scales,
            self.outlier_columns,
            self.outlier_deltas,
            self.outlier_scales,
            self.column_scales,
            self.means,
        )


def check_packed_tensors(tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> PackedLayout:
    """Checks names, dtypes, shapes and contiguity of packed tensors; the layout that they have.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing, unknown, not contiguous or has the wrong shape.
    """
    _check_names(tensors)
    if tensors["signs"].dim() != 4:
        raise ValueError(f"signs: expected shape [row_tiles, planes, words, 32], got {list(tensors['signs'].shape)}")
    if tensors["outlier_columns"].dim() != 3:
        raise ValueError(
            f"outlier_columns: expected shape [row_tiles, outliers, 32], got {list(tensors['outlier_columns'].shape)}"
        )
    layout = PackedLayout(
        out_features=out_features,
        in_features=in_features,
        planes=int(tensors["signs"].shape[1]),
        outliers=int(tensors["outlier_columns"].shape[1]),
        column_scales="column_scales" in tensors,
        means="means" in tensors,
    )
    for name, (dtype, shape) in layout.tensors().items():
        tensor = tensors[name]
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} for a weight [{out_features}, {in_features}] with "
                f"{layout.planes} planes and {layout.outliers} outliers a row, got {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return layout


def _check_names(tensors: Mapping[str, torch.Tensor]) -> None:
    if unknown := sorted(tensors.keys() - set(TENSOR_NAMES)):
        raise ValueError(f"packed tensors: unknown names {unknown}; expected {list(TENSOR_NAMES)}")
    if missing := [name for name in TENSOR_NAMES[:5] if name not in tensors]:
        raise ValueError(f"packed tensors: missing {missing}; got {sorted(tensors)}")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _rows_first(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[row_tiles, X, 32] -> [rows, X], without the padded rows."""
    return tensor.transpose(1, 2).flatten(0, 1)[:rows]


def _check_finite(name: str, values: torch.Tensor, place: str) -> None:
    if not bool(torch.isfinite(values).all()):
        index, second = (~torch.isfinite(values)).nonzero()[0].tolist()
        plane = f", plane {second}" if values.shape[1] > 1 else ""
        raise ValueError(
            f"{name}: expected finite values, got {values[index, second].item()} at {place} {index}{plane}"
        )
