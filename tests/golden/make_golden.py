"""Writes the golden files of packed format version 1: `python tests/golden/make_golden.py`.

They are made from bits and numbers spelled out by hand (worked_example, docs/packed_format.md) or drawn from a seed
(every_tensor), with numpy only, so that they do not depend on any code that is tested against them.

packed_format_v1.txt          one `name values` line per item; tensors as hexadecimal bytes; for GoogleTest
packed_format_v1.json         shapes and expected values
packed_format_v1.safetensors  the tensors of both weights, in the order of a packed checkpoint
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy

FOLDER = Path(__file__).parent


def worked_example() -> dict[str, object]:
    signs = numpy.zeros((1, 2, 2, 32), dtype="<u4")
    signs[0, 0, :, 0] = 0x55555555, 0x00000055
    signs[0, 1, :, 0] = 0x0000FFFF, 0x00000000
    signs[0, 0, :, 1] = 0xF0F0F0F0, 0x000000F0
    signs[0, 1, :, 1] = 0xFFFFFFFF, 0x000000FF
    scales = numpy.zeros((1, 2, 32), dtype="<f2")
    scales[0, :, 0] = 0.5, 0.25
    scales[0, :, 1] = 1.0, 0.5
    columns = numpy.zeros((1, 1, 32), dtype="<u2")
    columns[0, 0, :2] = 3, 39
    deltas = numpy.zeros((1, 1, 32), dtype="i1")
    deltas[0, 0, :2] = -100, 64
    outlier_scales = numpy.zeros((1, 32), dtype="<f2")
    outlier_scales[0, :2] = 0.03125, 0.0625
    column_scales = numpy.ones(40, dtype="<f2")
    column_scales[3], column_scales[39] = 2.0, 0.5
    tensors = {
        "signs": signs.view("<i4"),
        "scales": scales,
        "outlier_columns": columns,
        "outlier_deltas": deltas,
        "outlier_scales": outlier_scales,
        "column_scales": column_scales,
    }
    expected = numpy.empty((2, 40))
    for k in range(40):
        expected[0, k] = (0.5 if k % 2 == 0 else -0.5) + (0.25 if k < 16 else -0.25)
        expected[1, k] = (1.0 if k % 8 >= 4 else -1.0) + 0.5
    expected[0, 3] = (-0.5 + 0.25 - 100 * 0.03125) * 2.0
    expected[1, 3] *= 2.0
    expected[0, 39] *= 0.5
    expected[1, 39] = (1.0 + 0.5 + 64 * 0.0625) * 0.5
    return {"name": "worked_example", "out_features": 2, "in_features": 40, "tensors": tensors, "expected": expected}


def every_tensor() -> dict[str, object]:
    """Two row tiles, three words, padding in both directions, a row with a padding slot, every optional tensor."""
    random = numpy.random.default_rng(1)
    rows, columns, planes, outliers = 33, 70, 3, 3
    bits = random.integers(0, 2, size=(planes, rows, columns), dtype=numpy.int64)
    signs = numpy.zeros((2, planes, 3, 32), dtype="<u4")
    for p, n, k in numpy.argwhere(bits):
        signs[n // 32, p, k // 32, n % 32] |= numpy.uint32(1 << (k % 32))

    def tiled(by_row: numpy.ndarray, dtype: str) -> numpy.ndarray:
        padded = numpy.zeros((64, *by_row.shape[1:]), dtype=dtype)
        padded[:rows] = by_row
        return numpy.ascontiguousarray(numpy.moveaxis(padded.reshape(2, 32, *by_row.shape[1:]), 1, -1))

    unit = random.uniform(1e-4, 1e-3, size=(rows, 1))
    scales = (unit * numpy.array([[72, 36, 18]])).astype("<f2")
    outlier_columns = numpy.sort([random.choice(columns, outliers, replace=False) for _ in range(rows)], axis=1)
    deltas = random.integers(-127, 128, size=(rows, outliers))
    outlier_columns[5, 2], deltas[5, 2] = outlier_columns[5, 1], 0
    outlier_columns[32, 2] = columns - 1
    outlier_scales = random.uniform(1e-3, 1e-2, size=rows).astype("<f2")
    means = random.uniform(-1e-2, 1e-2, size=rows).astype("<f2")
    column_scales = random.uniform(0.5, 2.0, size=columns).astype("<f2")
    tensors = {
        "signs": signs.view("<i4"),
        "scales": tiled(scales, "<f2"),
        "outlier_columns": tiled(outlier_columns, "<u2"),
        "outlier_deltas": tiled(deltas, "i1"),
        "outlier_scales": tiled(outlier_scales, "<f2"),
        "column_scales": column_scales,
        "means": tiled(means, "<f2"),
    }
    expected = numpy.zeros((rows, columns))
    for n in range(rows):
        for k in range(columns):
            expected[n, k] = float(means[n]) + sum(
                float(scales[n, p]) * (1 if bits[p, n, k] else -1) for p in range(planes)
            )
        for slot in range(outliers):
            expected[n, outlier_columns[n, slot]] += float(deltas[n, slot]) * float(outlier_scales[n])
    expected *= column_scales.astype(numpy.float64)
    return {
        "name": "every_tensor",
        "out_features": rows,
        "in_features": columns,
        "tensors": tensors,
        "expected": expected,
    }


def with_product(weight: dict[str, object]) -> dict[str, object]:
    """Adds an input of small integers and the product with it, exact in float64."""
    numbers = [(7 * k) % 17 - 8 for k in range(int(weight["in_features"]))]
    weight["input"] = numpy.array(numbers, dtype=numpy.float64)
    weight["output"] = weight["expected"] @ weight["input"]
    return weight


def write_text(weights: list[dict[str, object]]) -> None:
    lines = [
        "# Packed format version 1. Written by make_golden.py. Each line: a name, then its values.",
        "# Tensors: hexadecimal bytes. expected: the dense weight, row by row. output = expected x input.",
    ]
    for weight in weights:
        tensors = weight["tensors"]
        lines += [
            f"weight {weight['name']}",
            f"out_features {weight['out_features']}",
            f"in_features {weight['in_features']}",
            f"planes {tensors['signs'].shape[1]}",
            f"outliers {tensors['outlier_columns'].shape[1]}",
        ]
        lines += [f"{name} {tensor.tobytes().hex()}" for name, tensor in tensors.items()]
        lines += [
            f"{name} {' '.join(f'{value:.9g}' for value in weight[name].ravel())}"
            for name in ("expected", "input", "output")
        ]
        lines.append("end")
    (FOLDER / "packed_format_v1.txt").write_text("\n".join(lines) + "\n")


def write_json(weights: list[dict[str, object]]) -> None:
    document = {
        weight["name"]: {
            "out_features": weight["out_features"],
            "in_features": weight["in_features"],
            "tensors": {name: list(tensor.shape) for name, tensor in weight["tensors"].items()},
            "expected": weight["expected"].tolist(),
            "input": weight["input"].tolist(),
            "output": weight["output"].tolist(),
        }
        for weight in weights
    }
    body = ",\n".join(f'"{name}": {json.dumps(weight)}' for name, weight in document.items())
    (FOLDER / "packed_format_v1.json").write_text("{\n" + body + "\n}\n")


def write_safetensors(weights: list[dict[str, object]]) -> None:
    names = {"<i4": "I32", "<f2": "F16", "<u2": "U16", "|i1": "I8"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    payload = b""
    for weight in weights:
        for name, tensor in sorted(weight["tensors"].items(), key=lambda item: -item[1].itemsize):
            header[f"{weight['name']}.{name}"] = {
                "dtype": names[tensor.dtype.str],
                "shape": list(tensor.shape),
                "data_offsets": [len(payload), len(payload) + tensor.nbytes],
            }
            payload += tensor.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (FOLDER / "packed_format_v1.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)


def main() -> None:
    weights = [with_product(worked_example()), with_product(every_tensor())]
    write_text(weights)
    write_json(weights)
    write_safetensors(weights)


if __name__ == "__main__":
    main()
