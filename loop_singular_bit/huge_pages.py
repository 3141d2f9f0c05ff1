"""Packed tensors of a model on pages of 2 MiB, from which decode reads memory at its full speed."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from . import ops
from .machine import available_memory_bytes
from .packed_linear import _PackedModule
from .packed_weight import TENSOR_NAMES

# Tensors that are copied at once; for as long, they are in memory twice. Less than 2 MiB at the end of each such batch
# are on ordinary pages.
_BATCH_BYTES = 64 << 20


def move_to_huge_pages(model: nn.Module) -> int:
    """Moves the packed tensors of a model into memory that is backed by huge pages, in place.

    Hardware prefetchers start anew at every page: decode from memory takes up to 1.7 times as long on pages of 4 KiB,
    the more the more these are scattered. Buffers get new tensors with the same contents, each with a storage of its
    own; modules, names and state dicts stay as they are, and modules that share a tensor go on sharing it.
    `quantize_model` and `from_pretrained` do this; copies (`copy.deepcopy`) and tensors that are loaded or assigned
    later are on ordinary pages until it is called again.

    The tensors are moved a batch at a time, so that memory grows by 64 MiB (or one large weight) on the way. Weights
    that were mapped from a file, as `from_pretrained` does, become memory of the process; the pages of the file are
    page cache, which counts as resident until its last tensor is gone, and which the kernel takes when it needs memory.
    Nothing is moved when the packed tensors take more than half of the memory that is available; tensors on other
    devices stay where they are.

    Returns:
        The bytes that were moved.
    """
    places = _places(model)
    total = sum(tensor.nbytes for tensor, _ in places)
    if total > (available_memory_bytes() or 0) // 2:
        return 0
    places.reverse()
    while places:
        _move_batch(places)
        _give_back_freed_memory()
    return total


_Place = tuple[torch.Tensor, list[tuple[_PackedModule, str]]]


def _places(model: nn.Module) -> list[_Place]:
    """Every packed tensor on the CPU, in the order of the model, and the buffers that it is."""
    places: dict[int, _Place] = {}
    for module in model.modules():
        if not isinstance(module, _PackedModule):
            continue
        for name in TENSOR_NAMES:
            tensor = module._buffers.get(name)
            if type(tensor) is torch.Tensor and tensor.is_cpu and tensor.nbytes > 0:
                places.setdefault(id(tensor), (tensor, []))[1].append((module, name))
    return list(places.values())


def _move_batch(places: list[_Place]) -> None:
    """Moves tensors from the end of `places`, and takes them off it: they are freed here unless others hold them."""
    batch, size = [], 0
    while places and size < _BATCH_BYTES:
        batch.append(places.pop())
        size += batch[-1][0].nbytes
    copies = ops.copy_to_huge_pages([tensor for tensor, _ in batch])
    for copy, (_, users) in zip(copies, batch, strict=True):
        for module, name in users:
            module._buffers[name] = copy


def _give_back_freed_memory() -> None:
    """glibc keeps what is freed in between for itself: without this the old tensors would stay resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
