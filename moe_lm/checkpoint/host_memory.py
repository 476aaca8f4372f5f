"""Memory of the host for the copy of a state that is written while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moe_lm.parallel.logical import Piece

CHUNK = 1 << 26  # bytes; a power of two, to which torch rounds up what it pins
ALIGNMENT = 64  # bytes


class HostMemory:
    """Memory for one copy at a time, in chunks that a piece may lie across.

    For what is on a GPU the chunks are pinned. To pin takes long, so they stay for the next copy. Others are given back
    when their copy is.
    """

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []

    @torch.no_grad()
    def copy(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """The same pieces in this memory. Their last copy is overwritten."""
        on_gpu = any(view.is_cuda for piece in pieces.values() for view in piece.views)
        chunks = self._chunks(on_gpu)
        free = torch.empty(0, dtype=torch.uint8)
        copies = {}
        for name, piece in pieces.items():
            views: list[Tensor] = []
            copied = 0
            while copied < piece.size:
                free = free if len(free) else next(chunks)
                count = min(piece.size - copied, len(free) // piece.dtype.itemsize)
                size = count * piece.dtype.itemsize
                views.append(free[:size].view(piece.dtype))
                _copy(piece.cut(copied, copied + count), views[-1])
                copied += count
                free = free[-(-size // ALIGNMENT) * ALIGNMENT :]
            copies[name] = piece._replace(views=tuple(views), copy=0, copies=1) if views else piece
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _chunks(self, pinned: bool) -> Iterator[Tensor]:
        if pinned:
            yield from self._pinned
        while True:
            chunk = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned)
            if pinned:
                self._pinned.append(chunk)
            yield chunk


def _copy(piece: Piece, memory: Tensor) -> None:
    """Copy the elements of a piece into 1-d memory; those of a GPU when it comes to it."""
    at = 0
    for view in piece.views:
        memory[at : at + view.numel()].view(view.shape).copy_(view, non_blocking=view.is_cuda)
        at += view.numel()
