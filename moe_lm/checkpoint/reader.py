"""The weights of one of our checkpoints, read some rows at a time, whatever layout wrote it.

Ranks that divided a tensor wrote its pieces into files of their own, each with the piece's place in the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_lm.checkpoint import adapters, checkpoint
from moe_lm.checkpoint.checkpoint_tensors import piece_places
from moe_lm.checkpoint.safetensors_file import Stored, read_header
from moe_lm.common.errors import MoeLmError
from moe_lm.model import lora


class TensorSource(Protocol):
    """Where tensors are read from, some rows at a time: a folder of Hugging Face's, or a checkpoint."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def where(self, name: str) -> str: ...
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


def open_tensors(folder: Path, base: Path | None = None) -> TensorSource:
    """The weights of a checkpoint, adapters merged into their base; `base` is where that is when it has moved.

    Raises UsageError or MoeLmError when the checkpoint, or the base, is missing, incomplete or damaged, as reading it
    for anything does.
    """
    own = CheckpointTensors(folder)
    adapter = adapters.read(folder)
    if adapter is None and base is None:
        return own
    beneath = open_tensors(adapters.base_of(folder, base))
    assert adapter is not None
    return MergedTensors(own, beneath, lora.scale(adapter.lora))


class Piece(NamedTuple):
    """A box of a tensor: where it begins in the whole, and where a file keeps it."""

    begin: tuple[int, ...]
    stored: Stored


class CheckpointTensors:
    """The tensors named `model.*` of a checkpoint folder, as they lie there."""

    def __init__(self, folder: Path) -> None:
        checkpoint.verify(folder, checkpoint.MODEL)
        self.folder = folder
        self._pieces: dict[str, list[Piece]] = {}
        for path in sorted((folder / checkpoint.MODEL).glob("*.safetensors")):
            header = read_header(path)
            places = piece_places(header.metadata)
            for name, stored in header.tensors.items():
                begin = tuple(places.get(name, [0] * len(stored.shape)))
                self._pieces.setdefault(name, []).append(Piece(begin, stored))

    def names(self) -> Iterable[str]:
        return self._pieces

    def shape(self, name: str) -> tuple[int, ...]:
        ends = [
            [begin + size for begin, size in zip(piece.begin, piece.stored.shape, strict=True)]
            for piece in self._find(name)
        ]
        return tuple(max(sizes) for sizes in zip(*ends, strict=True))

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name)[0].stored.dtype

    def where(self, name: str) -> str:
        return f"{self.folder}"

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start..stop` of the first dimension, put together from the pieces that hold some of them.

        Raises MoeLmError when the pieces do not cover them.
        """
        pieces = self._find(name)
        whole = self.shape(name)
        out = torch.empty(stop - start, *whole[1:], dtype=pieces[0].stored.dtype)
        filled = 0
        for begin, stored in pieces:
            first, last = max(start, begin[0]), min(stop, begin[0] + stored.shape[0])
            if first >= last:
                continue
            found = stored.rows(first - begin[0], last - begin[0])
            box = [slice(first - start, last - start)]
            box += [slice(place, place + size) for place, size in zip(begin[1:], stored.shape[1:], strict=True)]
            out[tuple(box)] = found
            filled += found.numel()
        if filled != out.numel():
            raise MoeLmError(f"the checkpoint {self.folder} holds only a part of tensor {name}")
        return out

    def _find(self, name: str) -> list[Piece]:
        if name not in self._pieces:
            raise MoeLmError(f"the checkpoint {self.folder} has no tensor {name}, which its model.yaml promises")
        return self._pieces[name]


class MergedTensors:
    """A base's tensors with what a checkpoint of adapters changes; merged ones are float32, whatever the base is in."""

    def __init__(self, own: CheckpointTensors, base: TensorSource, scale: float) -> None:
        self._own, self._base, self._scale = own, base, scale
        self._trained = set(own.names())

    def names(self) -> Iterable[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._trained:
            return self._own.dtype(name)
        return torch.float32 if self._is_adapted(name) else self._base.dtype(name)

    def where(self, name: str) -> str:
        return self._own.where(name) if name in self._trained else self._base.where(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._trained:
            return self._own.rows(name, start, stop)
        rows = self._base.rows(name, start, stop)
        if not self._is_adapted(name):
            return rows
        first, second = lora.factors_of(name)
        of_experts = rows.ndim == 3
        lora_A = self._own.rows(first, *((start, stop) if of_experts else (0, self._own.shape(first)[0])))
        merged = rows.float()
        lora.merge(merged, lora_A.float(), self._own.rows(second, start, stop).float(), self._scale)
        return merged

    def _is_adapted(self, name: str) -> bool:
        return lora.factors_of(name)[0] in self._trained
