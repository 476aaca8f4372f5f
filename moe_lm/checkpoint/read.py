"""Reading tensors: some rows at a time, from a checkpoint of any layout, with adapters merged into their base.

Everything that reads a model is a loop over `TensorSource.rows`: filling it, or a trainer's state, on one device or
over ranks; spreading it over devices; exporting and proving it. So no tensor need be in memory whole.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, lineage
from moe_lm.checkpoint.checkpoint import MODEL
from moe_lm.checkpoint.placement import Placed, Placement
from moe_lm.checkpoint.safetensors_file import DTYPES, pieces_of
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import OpenFiles
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.model import lora
from moe_lm.model.moe import logical
from moe_lm.parallel.logical import Piece, piece_of, rows_of
from moe_lm.parallel.process_group import Ranks

READERS = 4  # threads that read tensors
MOST_OPEN = 64  # files of a part of a checkpoint: many tensors are in each


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
    state: Mapping[str, Tensor | Piece],
    ranks: Ranks | None = None,
    verified: bool = False,
    zero_if_absent: Collection[str] = (),
) -> None:
    """Verify every file of a checkpoint, then fill the tensors of `state` in place; every rank calls this.

    Those named in `zero_if_absent` become 0 if the checkpoint, which is of an older version, does not have them.

    They keep their dtype, and each rank reads its own pieces of them. Nothing is verified again that was `verified`
    just now. Raises UsageError for a checkpoint without COMPLETE, MoeLmError naming the file that is not as
    it was written or the tensor that is missing or has another shape; no tensor has been touched then.
    """
    ranks = ranks or Ranks()
    if not verified:
        ranks.each(lambda: checkpoint.verify(folder, share=slice(ranks.rank, None, ranks.size)), (MoeLmError,))
    parts = [(part, tensors, CheckpointTensors(folder, part)) for part, tensors in checkpoint.parts_of(state).items()]

    absent: dict[str, Tensor | Piece] = {}

    def check() -> None:
        for part, tensors, source in parts:
            for name in tensors.keys() & set(zero_if_absent) - set(source.names()):
                absent[name] = tensors.pop(name)
            check_fits(tensors, source, whole=part == MODEL)

    def fill_all() -> None:
        for _, tensors, source in parts:
            fill(tensors, source)
        for tensor in absent.values():
            for memory in piece_of(tensor).views:
                memory.zero_()

    ranks.each(check, (MoeLmError,))
    ranks.each(fill_all, (MoeLmError,))


def load_weights(folder: Path, tensors: Mapping[str, Tensor | Piece], base: Path | None = None) -> None:
    """Fill a model's tensors, named `model.*`, in place, adapters merged into their base; every rank calls this.

    Reads and verifies no optimizer state. Raises as `open_tensors` and `load` do.
    """
    ranks = Ranks()
    source = open_tensors(folder, base, ranks)
    ranks.each(lambda: check_fits(tensors, source, whole=True), (MoeLmError,))
    ranks.each(lambda: fill(tensors, source), (MoeLmError,))


def open_weights(folder: Path, tensors: Mapping[str, Tensor | Piece]) -> Callable[[str, Tensor, int], None]:
    """What fills rows of a model's parameter, by its name in the model, from its row of this number on.

    As `load_weights`, for a model that no rank has whole; of `tensors`, named `model.*`, only the shapes are looked at.
    Factors of adapters are left as they are.
    """
    ranks = Ranks()
    source = open_tensors(folder, ranks=ranks)
    ranks.each(lambda: check_fits(tensors, source, whole=True), (MoeLmError,))

    def fill_rows(name: str, rows: Tensor, first: int) -> None:
        if lora.is_factor(name):
            return
        pieces = {}
        for part, view in logical(name, rows).items():
            whole = source.shape(f"{MODEL}.{part}")
            pieces[f"{MODEL}.{part}"] = piece_of(view)._replace(start=first * math.prod(whole[1:]), shape=whole)
        fill(pieces, source)

    return fill_rows


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
def fill(tensors: Mapping[str, Tensor | Piece], source: TensorSource) -> None:
    """Fill tensors, or this rank's pieces of them, in place, in their dtype. Nothing else is read."""

    def fill_one(name: str) -> None:
        piece, dtype = piece_of(tensors[name]), source.dtype(name)
        at = piece.start
        for view in piece.views:
            if view.is_cpu and view.is_contiguous() and view.dtype == dtype:
                read_elements(source, name, view.view(-1), at)
            else:
                for rows, first in rows_of(view, at):
                    found = torch.empty(rows.shape, dtype=dtype)
                    read_elements(source, name, found.view(-1), first)
                    rows.copy_(found)
            at += view.numel()

    with ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(torch.no_grad()(fill_one), tensors))


def read_elements(source: TensorSource, name: str, out: Tensor, start: int) -> None:
    """Fill 1-d memory of the source's dtype with the elements of a tensor, flattened, from `start` on."""
    if isinstance(source, CheckpointTensors):
        source.read_into(name, out, start)
        return
    shape = source.shape(name)
    row = math.prod(shape[1:])
    stop = start + out.numel()
    rows = source.rows(name, start // row, -(-stop // row))
    out.copy_(rows.reshape(-1)[start % row :][: out.numel()])


def check_fits(tensors: Mapping[str, Tensor | Piece], source: TensorSource, whole: bool) -> None:
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


class CheckpointTensors:
    """The tensors in a subfolder of a checkpoint, whatever pieces the ranks have written.

    Reading raises MoeLmError for a file that is not sound, a tensor that is not there, or one of which a part is.
    """

    def __init__(self, folder: Path, part: str = MODEL) -> None:
        self.folder = folder
        self._placement = Placement(folder / part)
        self._open = OpenFiles(MOST_OPEN)
        weakref.finalize(self, self._open.close)

    def names(self) -> Iterable[str]:
        return self._placement.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        dtype_name = self._find(name).dtype_name
        if dtype_name not in DTYPES:
            raise MoeLmError(
                f"tensor {name} of the checkpoint {self.folder} has dtype {dtype_name}, expected one of "
                f"{', '.join(DTYPES)}; convert it first"
            )
        return DTYPES[dtype_name]

    def where(self, name: str) -> str:
        return str(self.folder)

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        shape = self.shape(name)
        rows = torch.empty([stop - start, *shape[1:]], dtype=self.dtype(name))
        self.read_into(name, rows.view(-1), start * math.prod(shape[1:]))
        return rows[(slice(None), *across)]

    def read_into(self, name: str, out: Tensor, start: int) -> None:
        """Fill 1-d memory of the tensor's dtype with its elements, flattened, from `start` on."""
        for span in self._placement.spans(name, start, start + out.numel()):
            at = span.start - start
            span.stored.read_into(out[at : at + span.length], span.offset, self._open)

    def _find(self, name: str) -> Placed:
        if name not in self._placement.tensors:
            raise MoeLmError(f"the checkpoint {self.folder} has no tensor {name}, which its model.yaml promises")
        return self._placement.tensors[name]


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
