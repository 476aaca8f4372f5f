"""Reading tensors: some rows at a time, from a checkpoint of any layout, with adapters merged into their base.

Everything that reads a model is a loop over `TensorSource.rows`: filling it, or a trainer's state, on one device or
over ranks; spreading it over devices; exporting and proving it. So no tensor need be in memory whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, lineage
from moe_lm.checkpoint.checkpoint import MODEL
from moe_lm.checkpoint.safetensors_file import OFFSETS, SHARDING, Header, Stored, pieces_of, read_header
from moe_lm.common.errors import MoeLmError
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.model import lora
from moe_lm.parallel.logical import box_of
from moe_lm.parallel.process_group import Ranks

READERS = 4  # threads that read tensors


class TensorSource(Protocol):
    """Named tensors that are read some rows at a time: those of a checkpoint, or of a Hugging Face folder."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def where(self, name: str) -> str:
        """The file or folder of a tensor, for errors."""

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        """Rows `start..stop` of the first dimension, only `across` of the others; a scalar is one row."""


def load(
    folder: Path,
    state: Mapping[str, Tensor],
    ranks: Ranks | None = None,
    verified: bool = False,
    zero_if_absent: Collection[str] = (),
) -> None:
    """Verify every file of a checkpoint, then fill the tensors of `state` in place; every rank calls this.

    Those named in `zero_if_absent` become 0 if the checkpoint, which is of an older version, does not have them.

    They keep their dtype and layout, and each rank reads its own part of them. Nothing is verified again that was
    `verified` just now. Raises UsageError for a checkpoint without COMPLETE, MoeLmError naming the file that is not as
    it was written or the tensor that is missing or has another shape; no tensor has been touched then.
    """
    ranks = ranks or Ranks()
    if not verified:
        ranks.each(lambda: checkpoint.verify(folder, share=slice(ranks.rank, None, ranks.size)), (MoeLmError,))
    parts = [(part, tensors, CheckpointTensors(folder, part)) for part, tensors in checkpoint.parts_of(state).items()]

    absent: dict[str, Tensor] = {}

    def check() -> None:
        for part, tensors, source in parts:
            for name in tensors.keys() & set(zero_if_absent) - set(source.names()):
                absent[name] = tensors.pop(name)
            check_fits(tensors, source, whole=part == MODEL)

    def fill_all() -> None:
        for _, tensors, source in parts:
            fill(tensors, source)
        for tensor in absent.values():
            tensor.zero_()

    ranks.each(check, (MoeLmError,))
    ranks.each(fill_all, (MoeLmError,))


def load_weights(folder: Path, tensors: Mapping[str, Tensor], base: Path | None = None) -> None:
    """Fill a model's tensors, named `model.*`, in place, adapters merged into their base; every rank calls this.

    Reads and verifies no optimizer state. Raises as `open_tensors` and `load` do.
    """
    ranks = Ranks()
    source = open_tensors(folder, base, ranks)
    ranks.each(lambda: check_fits(tensors, source, whole=True), (MoeLmError,))
    ranks.each(lambda: fill(tensors, source), (MoeLmError,))


def open_tensors(folder: Path, base: Path | None = None, ranks: Ranks | None = None) -> TensorSource:
    """The weights of a checkpoint, verified, adapters merged into their base; `base` is where that is if it has moved.

    Raises UsageError or MoeLmError when the checkpoint, or the base, is missing, incomplete or damaged.
    """
    own = open_own_tensors(folder, ranks)
    adapter = lineage.read_adapter(folder)
    if adapter is None and base is None:
        return own
    beneath = open_tensors(lineage.base_of(folder, base), ranks=ranks)
    assert adapter is not None
    return MergedTensors(own, beneath, lora.scale(adapter.lora))


def open_own_tensors(folder: Path, ranks: Ranks | None = None) -> CheckpointTensors:
    """The weights that a checkpoint itself holds, verified: of a checkpoint of adapters, these and not their base."""
    ranks = ranks or Ranks()
    ranks.each(lambda: checkpoint.verify(folder, MODEL, share=slice(ranks.rank, None, ranks.size)), (MoeLmError,))
    return CheckpointTensors(folder, MODEL)


def stored_dtype(folder: Path, base: Path | None = None) -> torch.dtype:
    """The number format of a checkpoint's largest tensor; of a checkpoint of adapters, that of their base."""
    while lineage.read_adapter(folder) is not None:
        folder, base = lineage.base_of(folder, base), None
    own = CheckpointTensors(folder)
    return own.dtype(max(own.names(), key=lambda name: math.prod(own.shape(name))))


def pieces(source: TensorSource, name: str) -> Iterator[Tensor]:
    """The rows of a tensor in order, as many at a time as may be in memory at once."""
    for start, stop in pieces_of(source.shape(name)):
        yield source.rows(name, start, stop)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: TensorSource) -> None:
    """Fill tensors in place, in their dtype; of what ranks divide, a rank reads and fills its own part."""

    def fill_one(name: str) -> None:
        local, box = box_of(tensors[name])
        if isinstance(source, CheckpointTensors) and source.read_into(name, local.detach(), box):
            return
        first = box[0].start if box else 0
        rows = local if local.ndim else local.view(1)
        for start, stop in pieces_of(local.shape):
            rows[start:stop] = source.rows(name, first + start, first + stop, *box[1:])

    with ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(torch.no_grad()(fill_one), tensors))


def check_fits(tensors: Mapping[str, Tensor], source: TensorSource, whole: bool) -> None:
    """Raise MoeLmError unless `source` has all of these tensors, in their shapes; if `whole`, no others besides."""
    names = set(source.names())
    for name, tensor in tensors.items():
        if name not in names:
            raise MoeLmError(
                f"the checkpoint {source.where(name)} has no tensor {name}; the model or optimizer settings differ "
                "from those it was trained with"
            )
        shape = source.shape(name)
        if shape != tuple(tensor.shape):
            raise MoeLmError(
                f"tensor {name} is {list(shape)} in the checkpoint {source.where(name)}, expected "
                f"{list(tensor.shape)}; the model settings differ from those it was trained with"
            )
    unused = names - tensors.keys()
    if unused and whole:
        raise MoeLmError(
            f"the checkpoint {source.where(min(unused))} has the tensor {min(unused)}, which this model lacks; the "
            "model settings differ from those it was trained with"
        )


def read_model_config(folder: Path, **changes: Any) -> ModelConfig:
    """The shape of the model in a checkpoint, with some settings changed."""
    values = checkpoint.read_section(folder, "model.yaml")
    return build_config(ModelConfig, values | changes, origin=str(folder / "model.yaml"))


class Piece(NamedTuple):
    """A box of a tensor: where it begins in the whole, and where a file keeps it."""

    begin: tuple[int, ...]
    stored: Stored

    def end(self, dimension: int) -> int:
        return self.begin[dimension] + self.stored.shape[dimension]


class CheckpointTensors:
    """The tensors in a subfolder of a checkpoint. Ranks that divided a tensor wrote its pieces into their own files.

    Reading raises MoeLmError for a file that is not sound, a tensor that is not there, or one of which a part is.
    """

    def __init__(self, folder: Path, part: str = MODEL) -> None:
        self.folder, self._part = folder, part

    def names(self) -> Iterable[str]:
        return self._pieces

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = self._find(name)
        shape = tuple(max(piece.end(place) for piece in pieces) for place in range(len(pieces[0].begin)))
        if sum(math.prod(piece.stored.shape) for piece in pieces) != math.prod(shape):
            raise MoeLmError(f"the checkpoint {self.folder} holds only a part of tensor {name}")
        return shape

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name)[0].stored.dtype

    def where(self, name: str) -> str:
        return str(self.folder)

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        pieces, shape = self._find(name), self.shape(name)
        if not shape:
            return pieces[0].stored.rows(start, stop)
        box = [slice(start, stop), *across, *(slice(0, size) for size in shape[1 + len(across) :])]
        out = torch.empty([side.stop - side.start for side in box], dtype=pieces[0].stored.dtype)
        filled = 0
        for piece in pieces:
            common = [
                slice(max(side.start, piece.begin[place]), min(side.stop, piece.end(place)))
                for place, side in enumerate(box)
            ]
            if any(side.start >= side.stop for side in common):
                continue
            first, *others = (_moved(side, -begin) for side, begin in zip(common, piece.begin, strict=True))
            found = piece.stored.rows(first.start, first.stop)[(slice(None), *others)]
            out[tuple(_moved(side, -whole.start) for side, whole in zip(common, box, strict=True))] = found
            filled += found.numel()
        if filled != out.numel():
            raise MoeLmError(f"the checkpoint {self.folder} holds only a part of tensor {name}")
        return out

    def read_into(self, name: str, out: Tensor, box: Sequence[slice]) -> bool:
        """Read a box of a tensor straight into `out`; False where files and memory do not have its rows alike."""
        if not box or not out.is_cpu or not out.is_contiguous() or out.dtype != self.dtype(name):
            return False
        wanted, *across = box
        pieces, _ = self._find(name), self.shape(name)
        for piece in pieces:
            sides = zip(across, piece.begin[1:], piece.stored.shape[1:], strict=True)
            if any((side.start, side.stop) != (begin, begin + size) for side, begin, size in sides):
                return False
        filled = 0
        for piece in pieces:
            start, stop = max(wanted.start, piece.begin[0]), min(wanted.stop, piece.end(0))
            if start < stop:
                piece.stored.read_into(out[start - wanted.start : stop - wanted.start], start - piece.begin[0])
                filled += stop - start
        if filled != len(out):
            raise MoeLmError(f"the checkpoint {self.folder} holds only a part of tensor {name}")
        return True

    @cached_property
    def _pieces(self) -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {}
        for path in sorted((self.folder / self._part).glob("*.safetensors")):
            header = read_header(path)
            for name, begin in _places(path, header).items():
                found.setdefault(name, []).append(Piece(begin, header.tensors[name]))
        return found

    def _find(self, name: str) -> list[Piece]:
        if name not in self._pieces:
            raise MoeLmError(f"the checkpoint {self.folder} has no tensor {name}, which its model.yaml promises")
        return self._pieces[name]


class MergedTensors:
    """A base's tensors with the changes of a checkpoint of adapters; merged ones are float32, whatever the base is."""

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

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        if name in self._trained:
            return self._own.rows(name, start, stop, *across)
        if not self._is_adapted(name):
            return self._base.rows(name, start, stop, *across)
        merged = self._base.rows(name, start, stop).float()
        first, second = lora.factors_of(name)
        of_experts = merged.ndim == 3
        lora_A = self._own.rows(first, *((start, stop) if of_experts else (0, self._own.shape(first)[0])))
        lora.merge(merged, lora_A.float(), self._own.rows(second, start, stop).float(), self._scale)
        return merged[(slice(None), *across)]

    def _is_adapted(self, name: str) -> bool:
        return lora.factors_of(name)[0] in self._trained


def _moved(side: slice, by: int) -> slice:
    return slice(side.start + by, side.stop + by)


def _places(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """Where each tensor of a file begins in the whole tensor, as torch's writer puts it into the header."""
    places = {name: (0,) * len(stored.shape) for name, stored in header.tensors.items()}
    try:
        entries = json.loads(header.metadata.get(SHARDING, "{}"))
        places |= {name: tuple(map(int, entry[OFFSETS])) for name, entry in entries.items()}
        sound = all(len(places[name]) == len(stored.shape) for name, stored in header.tensors.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound or min((min(place, default=0) for place in places.values()), default=0) < 0:
        raise MoeLmError(f"{path} does not say soundly where its pieces of tensors belong; copy the checkpoint again")
    return {name: places[name] for name in header.tensors}
