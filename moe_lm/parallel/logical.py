"""Logical tensors: a checkpoint names and shapes tensors as one process does, however the ranks divide them.

What a rank keeps of one is a run of its elements, flattened: ZeRO cuts parameters into such runs, and the experts of a
rank are a run of the stack `[E, D, F]`. What all ranks keep alike is an ordinary tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.model.moe import logical_names
from moe_lm.model.transformer import is_expert
from moe_lm.parallel.process_group import Ranks

SMALL = 1 << 20  # bytes; of smaller tensors that all ranks keep, one rank writes all


class Piece(NamedTuple):
    """Elements of a logical tensor of `shape`, flattened, from `start` on; none, if this rank keeps nothing of it.

    They are in the memory of `views`, one after the other: 1-d, or the rows of `[rows, columns]` that lie apart.
    """

    views: tuple[Tensor, ...]
    start: int
    shape: tuple[int, ...]
    copy: int = 0  # the number of this rank among the `copies` that keep the same elements
    copies: int = 1

    @property
    def size(self) -> int:
        return sum(view.numel() for view in self.views)

    @property
    def is_whole(self) -> bool:
        return self.size == math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.views[0].dtype

    def cut(self, start: int, stop: int) -> Piece:
        """The elements `start..stop` of this piece, counted from its first."""
        views: list[Tensor] = []
        first = 0
        for view in self.views:
            last = first + view.numel()
            if max(start, first) < min(stop, last):
                views += _elements(view, max(start, first) - first, min(stop, last) - first)
            first = last
        return Piece(tuple(views), self.start + start, self.shape)


def piece_of(tensor: Tensor | Piece) -> Piece:
    """A whole tensor as a piece of itself."""
    if isinstance(tensor, Piece):
        return tensor
    return Piece(_elements(tensor, 0, tensor.numel()), 0, tuple(tensor.shape))


def pieces_of_run(
    name: str, run: Tensor, start: int, shape: tuple[int, ...], first_expert: int = 0, experts: int = 0
) -> dict[str, Piece]:
    """The elements from `start` on of a parameter, which are in the 1-d `run`, as pieces of its logical tensors.

    The parameter has this `shape`; if it is a stack of experts, they are those from `first_expert` on of all `experts`.
    """
    names = logical_names(name)
    columns, width = shape[-1], shape[-1] // len(names)
    whole = (experts, *shape[1:-1], width) if is_expert(name) else (*shape[:-1], width)
    begin = first_expert * math.prod(whole[1:]) if is_expert(name) else 0
    if len(names) == 1:
        return {name: Piece((run,) if run.numel() else (), begin + start, whole)}
    # Each of several has a part of the columns: of whole rows a view, and a part of the rows at both ends.
    head = min(run.numel(), -start % columns)
    tail = (run.numel() - head) % columns
    rows = run[head : run.numel() - tail].view(-1, columns)
    found = {}
    for number, part in enumerate(names):
        first = number * width
        column = start % columns
        views = (
            run[max(0, first - column) : max(0, min(head, first + width - column))],
            rows[:, first : first + width],
            run[run.numel() - tail :][first : first + width],
        )
        before = start // columns * width + min(max(0, column - first), width)
        found[part] = Piece(tuple(view for view in views if view.numel()), begin + before, whole)
    return found


def share_of(name: str, piece: Piece, rank: int, size: int) -> Piece:
    """What one of `size` ranks writes of elements that all of them keep."""
    if size == 1 or not piece.size:
        return piece
    if piece.size * piece.dtype.itemsize < SMALL:
        # Every rank reads the counts of steps of all its parameters: they are in one file.
        key = name if piece.shape else name.split(".")[0]
        return piece if zlib.crc32(key.encode()) % size == rank else Piece((), 0, piece.shape)
    share = -(-piece.size // size)
    return piece.cut(min(rank * share, piece.size), min((rank + 1) * share, piece.size))


def gathered(tensors: Mapping[str, Tensor | Piece], ranks: Ranks | None = None) -> dict[str, Tensor]:
    """The logical tensors, whole and on the host, on every rank; every rank calls this. For small models only."""
    ranks = ranks or Ranks()
    own = {name: piece_of(tensor) for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for pieces in ranks.each(lambda: [(n, p.start, p.shape, flat(p)) for n, p in own.items() if p.views], ()):
        for name, start, shape, elements in pieces:
            if name not in found:
                found[name] = torch.empty(shape, dtype=elements.dtype)
            found[name].view(-1)[start : start + len(elements)] = elements
    return found


def rows_of(view: Tensor, first: int, most: int = 1 << 22) -> Iterator[tuple[Tensor, int]]:
    """A view of a piece, at most so many elements and at least a row at a time, each with its first element's place."""
    width = math.prod(view.shape[1:])
    for rows in view.split(max(1, most // max(1, width))):
        yield rows, first
        first += rows.numel()


@torch.no_grad()
def assign(tensors: Mapping[str, Tensor | Piece], values: Mapping[str, Tensor | Piece]) -> None:
    """Copy values into tensors or pieces of the same names, unless they are in that memory already."""
    for name, tensor in tensors.items():
        views, given = piece_of(tensor).views, piece_of(values[name]).views
        if [view.data_ptr() for view in views] != [view.data_ptr() for view in given]:
            elements = torch.cat([view.reshape(-1) for view in given]).split([view.numel() for view in views])
            for view, some in zip(views, elements, strict=True):
                view.copy_(some.view(view.shape))


def flat(piece: Piece) -> Tensor:
    """A copy of a piece on the host, 1-d."""
    return torch.cat([view.detach().reshape(-1).cpu() for view in piece.views])


def _elements(tensor: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
    """Views of the elements `start..stop` of a tensor: whole rows in one, a begun and an ended row in their own."""
    if tensor.is_contiguous():
        return (tensor.view(-1)[start:stop],)
    rows = tensor.view(-1, tensor.shape[-1])
    width = rows.shape[1]
    first, last = -(-start // width), stop // width
    if first > last:
        return (rows[last, start - last * width : stop - last * width],)
    begun, ended = rows[first - 1, width + start - first * width :], rows[last : last + 1, : stop - last * width]
    return tuple(view for view in (begun, rows[first:last], ended) if view.numel())
