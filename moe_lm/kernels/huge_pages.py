"""Memory in huge pages, for what every decoding step reads: weights and the cache.

A pass over memory in pages of 4 KB waits for their addresses; pages of 2 MB are found in the processor's own table.
Linux gives huge pages to a process that asks before it first writes; elsewhere this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALLEST = 4 << 20  # bytes that are worth it: two pages
ALIGNED = 64  # bytes: a cache line


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, in huge pages on a CPU."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize < SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):  # too little memory: torch's error says so
        return torch.zeros(shape, dtype=dtype, device=device)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def move(model: nn.Module) -> None:
    """Give the parameters of a model on the CPU that is not filled yet one block of memory, to be filled."""
    parameters = list(model.parameters())
    sizes = [-(-p.numel() * p.element_size() // ALIGNED) * ALIGNED for p in parameters]
    memory = zeros([sum(sizes)], torch.uint8, torch.device("cpu"))
    for parameter, part in zip(parameters, memory.split(sizes), strict=True):
        own = part[: parameter.numel() * parameter.element_size()]
        parameter.data = own.view(parameter.dtype).view(parameter.shape)
