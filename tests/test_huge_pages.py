"""Packed tensors on huge pages: same contents, own storages, no memory taken twice or kept too long."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_packed_weights import random_packed_weight
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from loop_singular_bit import PackedEmbedding, PackedLinear, QuantizationConfig, huge_pages, ops, quantize_model
from loop_singular_bit.huge_pages import move_to_huge_pages
from loop_singular_bit.machine import available_memory_bytes
from loop_singular_bit.packed_weight import PackedLayout

HUGE_PAGE = 2 << 20


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = PackedEmbedding.from_packed_weight(random_packed_weight(200, 256, planes=6, column_scales=False))
        self.layer = PackedLinear.from_packed_weight(random_packed_weight(256, 256, means=True), torch.ones(256))
        self.twin = PackedLinear.from_packed_weight(self.layer.packed_weight)
        self.plain = PackedLinear.from_packed_weight(random_packed_weight(256, 256, outliers=0))
        self.head = PackedLinear.tied_to(self.embed)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        hidden = self.twin(functional.gelu(self.layer(self.embed(indices))))
        return self.head(self.plain(hidden))


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.named_buffers() if tensor.nbytes}


def is_mapped(address: int) -> bool:
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def huge_page_bytes(address: int) -> int:
    """Of the mapping that `address` is in, as the kernel accounts for them."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:
            begin, end = key.split("-")
            is_inside = int(begin, 16) <= address < int(end, 16)
        elif is_inside and key == "AnonHugePages:":
            return int(values[0]) * 1024
    return 0


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int8, torch.float16, torch.int32])
def test_copies_are_contiguous_aligned_and_have_storages_of_their_own(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.loop_singular_bit.copy_to_huge_pages.default, ([torch.ones(3, dtype=dtype)],))
    sources = [torch.randint(0, 100, (33, 5)).to(dtype), torch.randint(0, 100, (7, 11)).to(dtype).T]
    sources += [torch.empty(0, 32, dtype=dtype), torch.randint(0, 100, ()).to(dtype)]
    copies = ops.copy_to_huge_pages(sources)
    expected = copies[0].data_ptr()
    assert expected % HUGE_PAGE == 0
    for source, result in zip(sources, copies, strict=True):
        assert torch.equal(result, source) and result.dtype == dtype and result.is_contiguous()
        assert result.untyped_storage().nbytes() == source.nbytes
        if source.nbytes:
            assert result.data_ptr() == expected
            expected += -(-source.nbytes // 64) * 64
    copies[0].zero_()
    assert torch.equal(copies[1], sources[1])
    assert sources[0].any()


def test_it_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        ops.copy_to_huge_pages([])


def test_the_kernel_backs_the_copies_with_huge_pages() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this kernel is told to have no huge pages")
    size = 8 * HUGE_PAGE + 4096
    (result,) = ops.copy_to_huge_pages([torch.ones(size, dtype=torch.int8)])
    # Fragmented memory may lack some; none beyond what is filled.
    assert HUGE_PAGE <= huge_page_bytes(result.data_ptr()) <= 8 * HUGE_PAGE
    assert huge_page_bytes(result.data_ptr() + 8 * HUGE_PAGE) == 0


def test_memory_goes_with_the_last_tensor() -> None:
    model = Model()
    assert move_to_huge_pages(model) == sum(tensor.nbytes for tensor in model.state_dict().values()) - (
        model.layer.bias.nbytes + model.layer.packed_weight.nbytes  # type: ignore[union-attr]
    )
    survivor = model.plain.signs
    address, expected = model.embed.signs.data_ptr(), survivor.clone()
    del model
    assert is_mapped(address)
    assert torch.equal(survivor, expected)
    del survivor
    assert not is_mapped(address)


def test_a_model_computes_what_it_did_and_keeps_what_it_shares() -> None:
    model, indices = Model(), torch.arange(200).reshape(4, 50)
    before, names, output = pointers(model), list(model.state_dict()), model(indices)
    contents = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move_to_huge_pages(model)
    after = pointers(model)
    assert list(model.state_dict()) == names
    assert not set(before.values()) & set(after.values())
    assert all(torch.equal(tensor, contents[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(indices), output)
    assert model.twin.signs is model.layer.signs
    assert model.head.packed_weight.signs is model.embed.signs
    # In the order of the model, one behind the other.
    assert min(after.values()) == after["embed.signs"] and after["embed.signs"] % HUGE_PAGE == 0
    assert list(after.values()) == sorted(after.values())
    move_to_huge_pages(model)
    assert torch.equal(model(indices), output)


def test_state_survives_every_way_of_copying_it(tmp_path: Path) -> None:
    model = nn.Sequential(PackedLinear.from_packed_weight(random_packed_weight(256, 256, means=True)))
    move_to_huge_pages(model)
    state = model.state_dict()
    stored = sum(tensor.nbytes for tensor in state.values())

    file = io.BytesIO()
    torch.save(state, file)
    # A view of a shared storage would have been saved with all of it, eight times.
    assert stored < len(file.getvalue()) < 1.5 * stored
    file.seek(0)
    save_file(state, tmp_path / "state.safetensors")
    twin = copy.deepcopy(model)
    ways = {
        "torch.save": torch.load(file),
        "safetensors": load_file(tmp_path / "state.safetensors"),
        "deepcopy": twin.state_dict(),
    }
    for way, loaded in ways.items():
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items()), way
    assert not set(pointers(twin).values()) & set(pointers(model).values())
    twin.load_state_dict(state)
    address = state["0.signs"].data_ptr()
    input = torch.randn(3, 256)
    expected = model(input)
    del model, state, ways, loaded
    assert not is_mapped(address)
    assert torch.equal(twin(input), expected)


def test_slices_compile_and_export() -> None:
    model = nn.Sequential(PackedLinear.from_packed_weight(random_packed_weight(256, 256)))
    move_to_huge_pages(model)
    input = torch.randn(2, 256)
    expected = model(input)
    linear = model[0]
    assert isinstance(linear, PackedLinear)
    part = PackedLinear.from_packed_weight(linear.packed_weight.rows(64, 128))
    assert torch.equal(part(input), expected[:, 64:192])
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(input), expected)
    assert torch.equal(torch.export.export(model, (input,)).module()(input), expected)


def test_what_is_not_in_memory_stays_and_short_memory_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_packed_weight(64, 64).layout
    model = nn.Sequential(PackedLinear.empty(layout, device="meta"), nn.Linear(4, 4))
    assert move_to_huge_pages(model) == 0
    assert model[0].signs.is_meta  # type: ignore[union-attr]
    whole = Model()
    before = pointers(whole)
    monkeypatch.setattr(huge_pages, "available_memory_bytes", lambda: 1 << 16)
    assert move_to_huge_pages(whole) == 0
    assert pointers(whole) == before


def test_available_memory_is_that_of_the_control_group_where_it_is_less(tmp_path: Path) -> None:
    machine = available_memory_bytes(tmp_path)
    assert 1 << 26 < machine < 1 << 50
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 300000\nfile_mapped 7\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) > 1 << 26
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_memory_bytes(tmp_path) == 600000


def test_quantize_model_leaves_its_result_there() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    quantize_model(model, QuantizationConfig(preset="b4"))
    after = pointers(model)
    assert after["0.signs"] % HUGE_PAGE == 0
    assert list(after.values()) == sorted(after.values())
    assert after["2.column_scales"] - after["0.signs"] < 2 * 256 * 256


def resident_file_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) / 1024


def test_pages_of_a_mapped_file_are_left_unless_they_were_changed(tmp_path: Path) -> None:
    layout = PackedLayout(4096, 4096, 4, 0, column_scales=False)
    size = layout.part_nbytes()["signs"]
    (tmp_path / "signs").write_bytes(bytes(range(256)) * (2 * size // 256 + 1))
    # As safetensors maps them: private, and not at the beginning of a page.
    file = torch.UntypedStorage.from_file(str(tmp_path / "signs"), shared=False, nbytes=2 * size + 256)
    words = torch.empty(0, dtype=torch.int32).set_(file)  # type: ignore[call-overload]
    _, shape = layout.tensors()["signs"]
    count = size // 4
    model = nn.ModuleList(PackedLinear.empty(layout) for _ in range(2))
    old = [words[16 + i * count :][:count].view(shape) for i in range(2)]
    for linear, signs in zip(model, old, strict=True):
        linear.signs = signs
    old[1][7] = 5
    expected = [signs.clone() for signs in old]
    before = resident_file_mb()
    move_to_huge_pages(model)
    # The first is left, the second was written to.
    assert 0.9 * size < (before - resident_file_mb()) * 2**20 < 1.1 * size
    for linear, signs, contents in zip(model, old, expected, strict=True):
        assert torch.equal(linear.signs, contents) and torch.equal(signs, contents)  # type: ignore[arg-type]
        assert linear.signs is not signs


def test_memory_is_not_taken_twice() -> None:
    """A model of 512 MiB, of which half is in blocks that malloc would keep."""
    program = """
import torch
from torch import nn
from loop_singular_bit import PackedLayout, PackedLinear
from loop_singular_bit.huge_pages import move_to_huge_pages
from loop_singular_bit.memory_budget import forget_earlier_peak, peak_resident_mb, resident_mb

def linear(rows):
    packed = PackedLinear.empty(PackedLayout(rows, 4096, 2, 41))
    for tensor in packed.buffers():
        tensor.zero_()
    return packed

free = torch.ones(30 << 20, dtype=torch.int8)
del free  # from here on malloc takes blocks of this size from its heap
model = nn.ModuleList([linear(4096) for _ in range(64)] + [linear(128) for _ in range(64 * 32)])
size = sum(tensor.nbytes for tensor in model.buffers()) / 1e6
before = resident_mb()
forget_earlier_peak()
assert move_to_huge_pages(model) > 550e6
print(size, peak_resident_mb() - before, resident_mb() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, peak, after = map(float, result.stdout.split())
    assert size > 550
    assert peak < 200
    assert after < 60
