"""Writes a checkpoint: a share of the tensors on every rank, then the manifest, COMPLETE, and the folder's final name.

`torch.distributed.checkpoint` plans who writes what: plain tensors in one process, DTensors and plain ones over any
number of ranks. Of a tensor that several ranks hold alike, the rank with the least to write writes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import COMPLETE, MANIFEST
from moe_lm.checkpoint.safetensors_file import OFFSETS, SHARDING, Output, write_file
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import sync, unfinished_path
from moe_lm.common.integrity import Entry, entry_of, entry_of_bytes
from moe_lm.parallel.logical import host_copy, with_local
from moe_lm.parallel.process_group import Ranks

MAX_FILE_BYTES = 1 << 28  # files are written, verified and read side by side
Content = str | Path | Callable[[Path], None]

# One process needs no process group. Once and for all: what `warnings.catch_warnings` does is not for threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class WriteError(MoeLmError):
    """What the disk answered when a checkpoint was written; every rank raises it."""

    disk_is_full = False


def save(
    checkpoints: Path,
    step: int,
    state: Mapping[str, Tensor],
    files: Mapping[str, Content],
    ranks: Ranks | None = None,
) -> Path:
    """Write `checkpoints/step-<step>` with the tensors of `state` and return it; every rank calls this.

    `files` are kept beside the tensors under their names: a string is text, a path is a file or folder to copy, and a
    function writes to the path that it is given, such as tensors too large to be in memory together. A checkpoint of
    the same step is replaced. Raises WriteError with the path and the reason when writing fails; the older checkpoints
    are untouched then.
    """
    ranks = ranks or Ranks()
    folder = checkpoints / f"step-{step:08d}"
    unfinished = unfinished_path(folder)
    try:
        ranks.first(lambda: _make_empty(unfinished), (OSError,))
        written = _write_tensors(unfinished, state, ranks)
        manifests = ranks.each(lambda: written | _settle(unfinished, files, ranks.rank), (OSError,))
        entries = {name: entry for manifest in manifests for name, entry in manifest.items()}
        ranks.first(lambda: _finish(unfinished, folder, entries), (OSError, MoeLmError))
    except (OSError, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        cause = _cause(error)
        failed = WriteError(
            f"cannot write the checkpoint {folder}: {checkpoint.reason(cause)}; make room or mend the folder, the "
            "older checkpoints are as they were"
        )
        failed.disk_is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        raise failed from error
    except MoeLmError:  # from a function among `files`, or ranks that do not share the folder
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


@torch.no_grad()
def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in the host's memory of this rank's part of every tensor, which training does not change."""
    return {name: with_local(tensor, host_copy) for name, tensor in state.items()}


@torch.no_grad()
def _write_tensors(folder: Path, state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Entry]:
    """Write safetensors into `folder`, each rank its share; returns the lines of the files that this rank wrote.

    Raises CheckpointException on every rank alike.
    """
    writer = _Writer(folder, ranks.rank, _places(state))
    dcp.save(dict(state), storage_writer=writer, process_group=ranks.group)
    return writer.entries


class _Writer(StorageWriter):
    """Writes this rank's tensors and pieces of tensors, each file in a thread, hashed from memory and synced.

    The format is that of `HuggingFaceStorageWriter`, which serialises a whole file in memory first.
    """

    def __init__(self, folder: Path, rank: int, places: Mapping[str, tuple[str, int, int]]) -> None:
        self._folder, self._rank, self._places = folder, rank, places
        self.entries: dict[str, Entry] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            part, number, total = self._places[item.index.fqn]
            name = f"{part}/shard-{self._rank + 1:05d}-model-{number:05d}-of-{total:05d}.safetensors"
            files.setdefault(name, []).append(item)
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: _write_shard(self._folder / name, files[name], planner), files)
            self.entries = dict(zip(files, found, strict=True))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _write_shard(path: Path, items: list[WriteItem], planner: SavePlanner) -> Entry:
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs, begins = [], {}
    for item in items:
        assert item.tensor_data is not None
        name, chunk, dtype = item.index.fqn, item.tensor_data.chunk, item.tensor_data.properties.dtype
        outputs.append(Output(name, tuple(chunk.sizes), dtype, partial(_on_host, planner, item)))
        begins[name] = {OFFSETS: list(chunk.offsets)}
    entry = write_file(path, outputs, {SHARDING: json.dumps(begins), "format": "pt"})
    sync(path)
    return entry


def _on_host(planner: SavePlanner, item: WriteItem) -> Iterator[Tensor]:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    yield tensor.detach().cpu()


def _settle(unfinished: Path, files: Mapping[str, Content], rank: int) -> dict[str, Entry]:
    """Write the files beside the tensors, on rank 0, and bring them onto the disk; returns their lines."""
    found: dict[str, Entry] = {}
    for name, content in files.items() if rank == 0 else ():
        _put(unfinished / name, content)
        for path in _files_of(unfinished / name):
            sync(path)
            found[path.relative_to(unfinished).as_posix()] = entry_of(path)
        if isinstance(content, str):
            found[name] = entry_of_bytes(content.encode())
    return found


def _finish(unfinished: Path, folder: Path, entries: Mapping[str, Entry]) -> None:
    """Put the manifest beside the files, everything onto the disk, and the folder under its name."""
    for name in entries:
        if not (unfinished / name).is_file():
            raise MoeLmError(
                f"cannot write the checkpoint {folder}: {name} is only on the host that wrote it; set run_dir to a "
                "folder that all hosts share"
            )
    manifest = json.dumps(dict(sorted(entries.items())), indent=1)
    _put(unfinished / MANIFEST, manifest)
    sync(unfinished / MANIFEST)
    for path in [unfinished, *unfinished.rglob("*")]:
        if path.is_dir():
            sync(path)
    _put(unfinished / COMPLETE, hashlib.sha256(manifest.encode()).hexdigest() + "\n")
    sync(unfinished / COMPLETE)
    sync(unfinished)
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    unfinished.rename(folder)
    sync(folder.parent)
    if replaced.exists():
        checkpoint.delete(replaced)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _put(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif callable(content):
        content(path)
    elif content.is_dir():
        shutil.copytree(content, path)
    else:
        shutil.copyfile(content, path)


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]


def _places(state: Mapping[str, Tensor]) -> dict[str, tuple[str, int, int]]:
    """The file of each tensor: subfolder, number from 1, and how many; a rank's share of a file is below the limit."""
    places: dict[str, tuple[str, int, int]] = {}
    for part, tensors in checkpoint.parts_of(state).items():
        numbers, number, filled = {}, 1, 0
        for name, tensor in tensors.items():
            size = math.ceil(tensor.numel() / _num_pieces(tensor)) * tensor.element_size()
            if filled and filled + size > MAX_FILE_BYTES:
                number, filled = number + 1, 0
            filled += size
            numbers[name] = number
        places |= {name: (part, its, number) for name, its in numbers.items()}
    return places


def _num_pieces(tensor: Tensor) -> int:
    """How many pieces the ranks have divided a tensor into."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(place) for place, kind in enumerate(tensor.placements) if isinstance(kind, Shard))


def _cause(error: OSError | CheckpointException) -> Exception:
    """What went wrong. An interrupt, which DCP wraps like a failure, goes on as an interrupt."""
    cause: BaseException = error
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()))[0]
    if not isinstance(cause, Exception):
        raise cause
    return cause
