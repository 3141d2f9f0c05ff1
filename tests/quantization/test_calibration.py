"""Statistics of inputs: right, complete, shared, resumable, and the same for any number of threads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loop_singular_bit.quantization.calibration import (
    CalibrationProgress,
    InputStatistics,
    StatisticsStore,
    calibration_windows,
    collect_statistics,
)

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import VOCABULARY, tiny_language_model


class Words:
    """A tokenizer whose tokens are words' lengths."""

    bos_token_id: int | None = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def windows(count: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


def hooked_moments(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain way: a hook on every linear, the whole batch at once, in float64."""
    moments: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1]).double()
            moments[name] = inputs.T @ inputs / len(inputs)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return moments


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_layer_by_layer_sees_what_the_whole_model_sees(architecture: str) -> None:
    model = tiny_language_model(architecture, tied=False)
    seen: list[CalibrationProgress] = []
    store = collect_statistics(model, windows(), progress=seen.append)
    expected = hooked_moments(model, windows())
    assert "lm_head" in expected
    for name, moment in expected.items():
        statistics = store[name]
        assert statistics.tokens == windows().numel()
        assert torch.allclose(statistics.hessian.double(), moment, rtol=1e-4, atol=1e-6 * float(moment.max())), name
    layer = "model.layers.0"
    assert store.leader(f"{layer}.self_attn.v_proj") == f"{layer}.self_attn.q_proj"
    assert store.leader(f"{layer}.mlp.up_proj") == f"{layer}.mlp.gate_proj"
    assert store.leader(f"{layer}.mlp.down_proj") == f"{layer}.mlp.down_proj"
    assert [step.name for step in seen] == ["model.layers.0", "model.layers.1", "model"]
    assert seen[-1].parts_done == seen[-1].parts_total == 3


def test_any_module_that_is_not_a_chain_of_layers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 32)
            self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            self.unused = nn.Linear(32, 32)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids)
            return torch.stack([branch(hidden) for branch in self.branches]).sum(0)

    model = Branches()
    store = collect_statistics(model, windows())
    expected = hooked_moments(model, windows())
    for index in range(3):
        name = f"branches.{index}"
        assert store.leader(name) == "branches.0"
        assert torch.allclose(store[name].hessian.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert "unused" not in store


def test_threads_and_spooling_change_nothing() -> None:
    model = tiny_language_model("llama", tied=False)
    threads = torch.get_num_threads()
    stores = []
    try:
        for count, activation_bytes in ((1, 2**30), (2, 2**30), (1, 0)):
            torch.set_num_threads(count)
            stores.append(collect_statistics(model, windows(), activation_bytes=activation_bytes))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        for store in stores[1:]:
            assert torch.equal(store[name].hessian, stores[0][name].hessian)


def test_resumes_after_a_kill_and_starts_over_with_another_text(tmp_path: Path) -> None:
    model = tiny_language_model("llama", tied=False)
    complete = collect_statistics(model, windows())

    class Killed(Exception):
        pass

    def kill(_: CalibrationProgress) -> None:
        raise Killed

    with pytest.raises(Killed):
        collect_statistics(model, windows(), store=StatisticsStore(tmp_path, "text"), progress=kill)
    resumed = StatisticsStore(tmp_path, "text")
    assert "model.layers.0.mlp.down_proj" in resumed
    assert "model.layers.1.mlp.down_proj" not in resumed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    collect_statistics(model, windows(), store=resumed)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        assert torch.equal(resumed[name].hessian, complete[name].hessian)
    assert "lm_head" not in StatisticsStore(tmp_path, "another text")


def test_store_in_memory() -> None:
    store = StatisticsStore()
    store.add(["a", "b"], InputStatistics(torch.eye(3), 7))
    assert store["b"].tokens == 7
    assert store.leader("b") == "a"
    with pytest.raises(KeyError):
        store["c"]


@pytest.mark.parametrize("columns", [1, 256, 700])
def test_store_on_disk_keeps_one_triangle(tmp_path: Path, columns: int) -> None:
    factor = torch.randn(columns, 8, generator=torch.Generator().manual_seed(columns))
    hessian = factor @ factor.T
    store = StatisticsStore(tmp_path, "text")
    store.add(["a", "b"], InputStatistics(hessian, 8))
    assert torch.equal(StatisticsStore(tmp_path, "text")["b"].hessian, hessian)
    stored_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    # Whole blocks on the diagonal: 0.68 of the square at 700 columns, and what the file format adds.
    assert stored_bytes < 0.7 * 4 * columns * columns + 4 * 256 * 256


def test_windows_begin_with_the_beginning_and_do_not_overlap() -> None:
    text = " ".join("x" * length for length in range(1, 11))
    assert calibration_windows(Words(), [text, "a b", text], window=4).tolist() == 2 * [
        [0, 1, 2, 3],
        [0, 4, 5, 6],
        [0, 7, 8, 9],
    ]
    spread = calibration_windows(Words(), text, window=3, max_windows=2)
    assert spread.tolist() == [[0, 1, 2], [0, 5, 6]]
    without = Words()
    without.bos_token_id = None
    assert calibration_windows(without, text, window=5).tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_rejects_too_little_text_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fill one window of 8"):
        calibration_windows(Words(), "a b c", window=8)
    with pytest.raises(ValueError, match="at least 2"):
        calibration_windows(Words(), "a b c", window=1)
    with pytest.raises(ValueError, match="nothing_there"):
        collect_statistics(nn.Linear(2, 2), windows(), ["nothing_there"])
    with pytest.raises(ValueError, match=r"at least one nn\.Linear"):
        collect_statistics(nn.Embedding(2, 2), windows())
