"""Writes a checkpoint: a share of the tensors on every rank, then the manifest, COMPLETE, and the folder's final name.

`torch.distributed.checkpoint` writes the tensors: plain ones in one process, DTensors and plain ones over any number of
ranks. Its safetensors storage is the one without a pickled `.metadata`. Of a tensor that several ranks hold alike, the
rank with the least to write writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import COMPLETE, MANIFEST, Entry
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import sync, unfinished_path
from moe_lm.parallel.logical import host_copy, with_local
from moe_lm.parallel.process_group import Ranks

MAX_FILE_BYTES = 1 << 30  # a file is serialised in memory before it is written
Content = str | Path | Callable[[Path], None]

# One process needs no process group. Once and for all: what `warnings.catch_warnings` does is not for threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


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
    the same step is replaced. Raises MoeLmError with the path and the reason when writing fails; the older checkpoints
    are untouched then.
    """
    ranks = ranks or Ranks()
    folder = checkpoints / f"step-{step:08d}"
    unfinished = unfinished_path(folder)
    try:
        ranks.first(lambda: _make_empty(unfinished), (OSError,))
        written: list[Path] = []
        for part, tensors in checkpoint.parts_of(state).items():
            written += _write_tensors(unfinished / part, tensors, ranks)
        manifests = ranks.each(lambda: _settle(unfinished, written, files, ranks.rank), (OSError,))
        entries = {name: entry for manifest in manifests for name, entry in manifest.items()}
        ranks.first(lambda: _finish(unfinished, folder, entries), (OSError,))
    except (OSError, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise MoeLmError(
            f"cannot write the checkpoint {folder}: {_reason(error)}; make room or mend the folder, the older "
            "checkpoints are as they were"
        ) from error
    except MoeLmError:  # from a function among `files`
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


@torch.no_grad()
def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in the host's memory of this rank's part of every tensor, which training does not change."""
    return {name: with_local(tensor, host_copy) for name, tensor in state.items()}


@torch.no_grad()
def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> list[Path]:
    """Write safetensors into `folder`, each rank its share; returns the files that this rank wrote.

    Raises CheckpointException on every rank alike.
    """
    writer = _Writer(str(folder), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True)
    dcp.save(_storable(tensors), storage_writer=writer, process_group=ranks.group)
    return sorted(folder / name for name in writer.written)


class _Writer(HuggingFaceStorageWriter):
    """Remembers the names of the files that this rank wrote."""

    written: frozenset[str] = frozenset()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner)
        self.written = frozenset(result.storage_data.relative_path for result in results.wait())
        return results


def _settle(unfinished: Path, written: list[Path], files: Mapping[str, Content], rank: int) -> dict[str, Entry]:
    """Bring what this rank wrote onto the disk, on rank 0 also the files beside the tensors; returns its entries.

    A file's writer does this: on a network's file system only the writer has the file at hand, and bytes to bring.
    """
    paths = list(written)
    if rank == 0:
        for name, content in files.items():
            _put(unfinished / name, content)
            paths += _files_of(unfinished / name)
    for path in paths:
        sync(path)
    return {path.relative_to(unfinished).as_posix(): checkpoint.entry_of(path) for path in paths}


def _finish(unfinished: Path, folder: Path, entries: Mapping[str, Entry]) -> None:
    """Put the manifest beside the files, everything onto the disk, and the folder under its name."""
    for name in entries:
        if not (unfinished / name).is_file():
            raise FileNotFoundError(f"{name} is only on the host that wrote it, run_dir must be on all hosts the same")
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


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that takes each tensor; a rank's share of a file stays below the limit."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = math.ceil(tensor.numel() / _num_pieces(tensor)) * tensor.element_size()
        if filled and filled + size > MAX_FILE_BYTES:
            number, filled = number + 1, 0
        filled += size
        numbers[name] = number
    return numbers


def _num_pieces(tensor: Tensor) -> int:
    """How many pieces the ranks have divided a tensor into."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(place) for place, kind in enumerate(tensor.placements) if isinstance(kind, Shard))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, each in memory of its own: safetensors refuses tied weights, which are two names of one tensor."""
    addresses = set()

    def own(local: Tensor) -> Tensor:
        local = local.detach().contiguous()
        if local.data_ptr() in addresses:
            return local.clone()
        addresses.add(local.data_ptr())
        return local

    return {name: with_local(tensor, own) for name, tensor in tensors.items()}


def _reason(error: OSError | CheckpointException) -> str:
    """The cause to tell the user. An interrupt, which DCP wraps like a failure, goes on as an interrupt."""
    cause: BaseException = error
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()))[0]
    if not isinstance(cause, Exception):
        raise cause
    return checkpoint.reason(cause)
