"""The benchmark of packed linears: its contenders multiply what they say, its figures fit together."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_packed_linear as bench
import linear_contenders


def test_contenders_give_the_product_of_their_weight() -> None:
    with torch.inference_mode():
        for contender in [
            *linear_contenders.our_contenders((96, 256), "int8", 1),
            linear_contenders.TorchInt4(96, 256, 1),
        ]:
            error = contender.error(3, threads=1)
            assert 0 < error <= contender.bound
            contender.bound = error / 2
            assert not contender.error(3, threads=1) <= contender.bound


@pytest.mark.parametrize("bits", [2, 4])
def test_onnx_runtime_nodes_have_weights_of_their_own(bits: int) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    contender = linear_contenders.OnnxRuntime(bits, 64, 256, 10 * 64 * 256)
    assert contender.error(1, threads=1) <= contender.bound
    (session,) = contender.sessions[contender.copies, 1]
    outputs = session.run(None, {"input": torch.randn(1, 256).numpy()})
    assert len(outputs) == contender.copies > 10
    assert len({output.tobytes() for output in outputs}) == contender.copies


def test_bitsandbytes_copies_are_equal_and_apart() -> None:
    pytest.importorskip("bitsandbytes")
    with torch.inference_mode():
        contender = linear_contenders.BitsAndBytes(64, 128, 3 * 64 * 128)
        assert contender.error(2, threads=1) <= contender.bound
    assert len({linear.weight.data_ptr() for linear in contender.linears}) == len(contender.linears) > 3


def test_a_table_and_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(bench.MachineLimits, "multiply_int8", lambda self: 1000)
    limits = bench.MachineLimits()
    with torch.inference_mode():
        contenders = linear_contenders.our_contenders((128, 256), "int8", 1)
        tables = [bench.measure(contenders, limits, tokens, 1, 3, statistics.median) for tokens in (1, 8)]
    for table in tables:
        assert list(table.rows) == ["b1", "b2", "b3", "b4", "F.linear bfloat16"]
        assert table.rows["F.linear bfloat16"]["times_bf16"] == pytest.approx(1)
        for row in table.rows.values():
            assert row["gmac_per_s"] * row["ms"] == pytest.approx(128 * 256 * table.tokens / 1e6)
            assert row["bandwidth_share"] == pytest.approx(row["gb_per_s"] * 1e9 / table.bandwidth)
    b1 = tables[0].rows["b1"]
    least = max(b1["stored_bytes"] / tables[0].bandwidth * 1e3, b1["cached_ms"])
    assert b1["to_f"] == pytest.approx(b1["ms"] / least)
    assert "to_f" not in tables[1].rows["b1"]
    printed = "\n".join(bench.table_lines(tables[0]))
    printed += "\n".join(bench.goal_lines(tables, {"b2": 2.0, "F.linear bfloat16": 4.0}))
    assert f"| {b1['ms']:.3f} |" in printed and f"| {b1['times_bf16']:.2f} |" in printed
    assert "| one call, 256x256: time / bf16 | ≤ 1.3 | | | 0.50 (2.0 µs) |" in printed
    expected = tables[1].rows["b1"]["ms"] / (4 * b1["ms"])
    assert f"| 8 tokens: time / 4 x that of 1 | ≤ 1.3 | 1 | 1 | {expected:.2f} / " in printed
    assert "512 tokens" not in printed
