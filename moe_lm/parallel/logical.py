"""Logical tensors: a checkpoint names and shapes tensors as one process does, however the ranks divide them.

A mesh has the dimensions (data, expert). An expert stack `[E, D, F]` is divided by experts over `expert` and by its
second dimension over `data`; any other tensor by its first dimension over all ranks. What does not divide evenly is
kept by several ranks alike; of those the checkpoint writes one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

SMALL = 4096  # elements; smaller tensors are not worth dividing


def divided_experts(local: Tensor, mesh: DeviceMesh) -> DTensor:
    """The experts of this rank as a part of the whole stack, in the memory of `local`."""
    return _dtensor(local, mesh, [Replicate(), Shard(0)], (local.shape[0] * mesh.size(1), *local.shape[1:]))


def divide_experts(local: Tensor, mesh: DeviceMesh) -> DTensor:
    """`divided_experts` on the host, divided over `data` too: each rank that keeps an expert has a piece of it."""
    data = mesh.size(0)
    if data == 1 or local.shape[1] % data:
        return divided_experts(host_copy(local), mesh)
    piece = host_copy(local.chunk(data, dim=1)[mesh.get_local_rank(0)])
    return _dtensor(piece, mesh, [Shard(1), Shard(0)], (local.shape[0] * mesh.size(1), *local.shape[1:]))


def divide(tensor: Tensor, ranks: DeviceMesh) -> Tensor:
    """This rank's piece, on the host, of a tensor that every rank of the one-dimensional mesh `ranks` has whole."""
    size = ranks.size()
    if size == 1 or tensor.ndim == 0 or tensor.shape[0] % size or tensor.numel() < SMALL:
        return host_copy(tensor)
    return _dtensor(host_copy(tensor.chunk(size)[ranks.get_local_rank()]), ranks, [Shard(0)], tensor.shape)


def box_of(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a tensor, in the memory of the tensor, and the box of the logical tensor that the part is."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    (box,) = tensor.__create_chunk_list__()
    sides = zip(box.offsets, box.sizes, strict=True)
    return tensor.to_local(), tuple(slice(offset, offset + size) for offset, size in sides)


def with_local(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor with this rank's part changed to another part of the same shape."""
    if not isinstance(tensor, DTensor):
        return change(tensor)
    return _dtensor(change(tensor.to_local()), tensor.device_mesh, list(tensor.placements), tuple(tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """The logical tensor, on every rank; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def undivide(tensor: Tensor, expert: bool) -> Tensor:
    """The tensor before it was divided: the whole one or, of a stack of experts, the experts of this rank."""
    if expert and isinstance(tensor, DTensor):
        return tensor.redistribute(placements=[Replicate(), Shard(0)]).to_local()
    return whole(tensor)


def host_copy(local: Tensor) -> Tensor:
    """A contiguous copy on the host."""
    return local.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _dtensor(piece: Tensor, mesh: DeviceMesh, placements: list[Placement], shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
