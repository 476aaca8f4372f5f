"""Logical tensors: what a checkpoint holds is named and shaped as in one process, however the ranks divide it.

A mesh has the dimensions (data, expert). An expert stack `[E, D, F]` is divided by experts over `expert` and by its
second dimension over `data`; any other tensor by its first dimension over all ranks. What does not divide evenly is
kept by several ranks alike; of those the checkpoint writes one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

SMALL = 4096  # elements; less is not worth dividing


def is_expert(name: str) -> bool:
    """Whether a parameter of this name is a stack of routed experts."""
    return ".mlp.experts." in name


def divided_experts(local: Tensor, mesh: DeviceMesh) -> DTensor:
    """A rank's experts as a part of the whole stack; shares the memory of `local`."""
    shape = torch.Size((local.shape[0] * mesh.size(1), *local.shape[1:]))
    return DTensor.from_local(
        local, mesh, [Replicate(), Shard(0)], run_check=False, shape=shape, stride=_contiguous_stride(shape)
    )


def divide(tensor: Tensor, mesh: DeviceMesh, expert: bool) -> Tensor:
    """This rank's part, copied to the host, of a whole tensor or (`expert`) of the experts that its group member keeps.

    Every rank that holds the same values must call it.
    """
    if expert:
        data, rank = mesh.size(0), mesh.get_local_rank(0)
        if tensor.shape[1] % data or data == 1:
            return divided_experts(_host_copy(tensor), mesh)
        shape = torch.Size((tensor.shape[0] * mesh.size(1), *tensor.shape[1:]))
        piece = _host_copy(tensor.chunk(data, dim=1)[rank])
        placements = [Shard(1), Shard(0)]
    else:
        ranks = mesh.size()
        if tensor.ndim == 0 or tensor.shape[0] % ranks or tensor.numel() < SMALL or ranks == 1:
            return _host_copy(tensor)
        shape = tensor.shape
        rank = mesh.get_local_rank(0) * mesh.size(1) + mesh.get_local_rank(1)
        piece = _host_copy(tensor.chunk(ranks)[rank])
        placements = [Shard(0), Shard(0)]
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=shape, stride=_contiguous_stride(shape))


def undivide(tensor: Tensor, expert: bool) -> Tensor:
    """The whole tensor, or (`expert`) all of the experts that this rank keeps: what `divide` was given."""
    if not isinstance(tensor, DTensor):
        return tensor
    if expert:
        return tensor.redistribute(placements=[Replicate(), Shard(0)]).to_local()
    return tensor.full_tensor()


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
