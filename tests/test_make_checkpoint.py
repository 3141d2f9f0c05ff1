"""The checkpoint that the memory and time figures are measured on: shapes, tails, and the same bytes for a seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import make_checkpoint

from loop_singular_bit.checkpoint_directory import CheckpointDirectory


def test_a_seed_gives_the_same_bytes_and_the_shapes_of_the_model(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint.write_checkpoint(tmp_path / name, "tiny", layers=2, seed=seed, max_shard_bytes=500_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 4 and "model.safetensors.index.json" in files
    same, other = ([(tmp_path / name / file).read_bytes() for file in files] for name in ("a", "b"))
    assert same == other
    assert (tmp_path / "c" / files[2]).read_bytes() != (tmp_path / "a" / files[2]).read_bytes()

    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "a"))
    with CheckpointDirectory(tmp_path / "a") as checkpoint:
        shapes = {name: checkpoint.entry(name).shape for name in checkpoint.tensor_names}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert all(path.stat().st_size < 520_000 for path in (tmp_path / "a").glob("*.safetensors"))


def test_tails_are_heavy_columns_are_loud_and_single_weights_are_super(tmp_path: Path) -> None:
    quantiles = make_checkpoint.student_t_quantiles().double()
    assert abs(quantiles.mean()) < 1e-6
    assert abs(quantiles.square().mean() - 1) < 1e-6
    # Kurtosis of a Student t with 5 degrees of freedom is 9; of a sample cut at one in 131,072 somewhat less.
    assert 6 < quantiles.pow(4).mean() < 9
    blocks = make_checkpoint.random_rows("w", (2048, 1024), 0, make_checkpoint.student_t_quantiles())
    weight = torch.cat(list(blocks)).float()
    assert weight.std(dim=0).max() > 4 * weight.std(dim=0).median()
    super_weight = torch.tensor(60 * 0.02).bfloat16().float()
    assert (weight == super_weight).sum() == 2
    assert super_weight > 40 * weight.std(dim=0).median()


def test_sizes_of_the_full_shape() -> None:
    sizes = make_checkpoint.SHAPES["mistral-7b"]
    shapes = dict(make_checkpoint.tensor_shapes(sizes))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 7_241_732_096
    assert json.dumps(make_checkpoint.model_config(sizes))
