"""Packed tensors of a model on pages of 2 MiB, from which decode reads memory at its full speed."""

from __future__ import annotations

import ctypes
import mmap

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
    that were mapped from a file, as safetensors leaves them, become memory of the process, and the pages of the file
    that they were read from leave it. Nothing is moved when the packed tensors take more than half of the memory that
    is available; tensors on other devices stay where they are.

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
    for copy, (tensor, users) in zip(copies, batch, strict=True):
        for module, name in users:
            module._buffers[name] = copy
        _unmap_unchanged_file_pages(tensor)


def _unmap_unchanged_file_pages(tensor: torch.Tensor) -> None:
    """Takes the pages of a mapped file that a tensor fills out of this process; whoever reads them gets them again.

    As long as another tensor is in the same file, the whole of it stays mapped, and what was read of it resident.
    """
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE)
    pages = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - begin
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if pages <= 0 or madvise is None:
        return
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(8 * begin)
            entries = torch.frombuffer(bytearray(pagemap.read(8 * pages)), dtype=torch.int64)
    except OSError:
        return
    # Copying has just read every page. Bits 63 and 61: present, and of a file. A page that was written to, or that
    # malloc gave, is not, and would lose its contents.
    of_file = entries >> 61 & 0b101 == 0b101
    if len(entries) == pages and bool(of_file.all()):
        madvise(ctypes.c_void_p(begin * mmap.PAGESIZE), ctypes.c_size_t(pages * mmap.PAGESIZE), mmap.MADV_DONTNEED)


def _give_back_freed_memory() -> None:
    """glibc keeps what is freed in between for itself: without this the old tensors would stay resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
