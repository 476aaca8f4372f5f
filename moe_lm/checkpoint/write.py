"""Writes a checkpoint: the pieces of every rank, then the manifest, COMPLETE, and the folder's final name.

A rank writes what it keeps, into files of its own. What all ranks keep alike is divided among them by a rule that each
applies for itself. So nothing travels but the names of files, their checksums, and once in a run where everything is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import COMPLETE, MANIFEST
from moe_lm.checkpoint.placement import INDEX, Plan, index_of
from moe_lm.checkpoint.safetensors_file import PIECE_BYTES, Output, write_file
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import sync, unfinished_path
from moe_lm.common.integrity import Entry, entry_of, entry_of_bytes
from moe_lm.parallel.logical import Piece, piece_of, rows_of, share_of
from moe_lm.parallel.process_group import Ranks

MAX_FILE_BYTES = 1 << 30  # files are written, verified and read side by side
WRITERS = 4  # threads
Content = str | Path | Callable[[Path], None]
Shards = dict[str, dict[str, dict[str, Piece]]]  # by part and file, pieces by name


class WriteError(MoeLmError):
    """What the disk answered when a checkpoint was written; every rank raises it."""

    disk_is_full = False


class Plans:
    """Where everything is, as the ranks have said at the last save: they say it again only when it has changed."""

    def __init__(self) -> None:
        self._own: dict[str, Plan] = {}  # by part
        self._all: list[dict[str, Plan]] = []  # of all ranks, on rank 0
        self._indices: dict[str, str] | None = None

    def gather(self, own: dict[str, Plan], ranks: Ranks) -> None:
        """Let rank 0 know the plans of all ranks; every rank calls this."""
        is_known = own.keys() == self._own.keys() and all(plan.equals(self._own[part]) for part, plan in own.items())
        self._own = own
        found = ranks.to_first(None if is_known else own)
        if found is not None and any(plans is not None for plans in found):
            known = self._all or [{} for _ in found]
            self._all = [before if plans is None else plans for before, plans in zip(known, found, strict=True)]
            self._indices = None

    def indices(self) -> dict[str, str]:
        """The text of each part's index, on rank 0. Raises MoeLmError if the ranks have left out a part of a tensor."""
        if self._indices is None:
            parts = sorted({part for plans in self._all for part in plans})
            self._indices = {part: index_of([plans[part] for plans in self._all if part in plans]) for part in parts}
        return self._indices


def save(
    checkpoints: Path,
    step: int,
    state: Mapping[str, Tensor | Piece],
    files: Mapping[str, Content],
    ranks: Ranks | None = None,
    plans: Plans | None = None,
) -> Path:
    """Write `checkpoints/step-<step>` with the tensors of `state` and return it; every rank calls this.

    A `Piece` is kept by the ranks that it names, an ordinary tensor by all. `files` are kept beside the tensors under
    their names: a string is text, a path is a file or folder to copy, and a function writes to the path that it is
    given, such as tensors too large to be in memory together. `plans` goes from save to save. A checkpoint of the same
    step is replaced. Raises WriteError with the path and the reason when writing fails; the older checkpoints are
    untouched then.
    """
    ranks, plans = ranks or Ranks(), plans or Plans()
    folder = checkpoints / f"step-{step:08d}"
    unfinished = unfinished_path(folder)
    shards = _shards(own_pieces(state, ranks), ranks.rank)
    try:
        ranks.first(lambda: _make_empty(unfinished), (OSError,))
        found = ranks.each(
            lambda: _write_shards(unfinished, shards) | _settle(unfinished, files, ranks.rank), (OSError, MoeLmError)
        )
        entries = {name: entry for lines in found for name, entry in lines.items()}
        plans.gather({part: Plan.of(shards_of_part) for part, shards_of_part in shards.items()}, ranks)
        ranks.first(lambda: _finish(unfinished, folder, entries, plans.indices()), (OSError, MoeLmError))
    except OSError as error:
        ranks.first(lambda: shutil.rmtree(unfinished, ignore_errors=True), ())
        failed = WriteError(
            f"cannot write the checkpoint {folder}: {checkpoint.reason(error)}; make room or mend the folder, the "
            "older checkpoints are as they were"
        )
        failed.disk_is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise failed from error
    except BaseException:  # from a function among `files`, of ranks that do not share the folder, or an interrupt
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def own_pieces(state: Mapping[str, Tensor | Piece], ranks: Ranks) -> dict[str, Piece]:
    """What this rank writes: its own pieces, and its share of the tensors that all ranks have."""
    return {
        name: share_of(name, tensor, tensor.copy, tensor.copies)
        if isinstance(tensor, Piece)
        else share_of(name, piece_of(tensor), ranks.rank, ranks.size)
        for name, tensor in state.items()
    }


def _shards(own: Mapping[str, Piece], rank: int) -> Shards:
    """The files of this rank, by part, and what it writes into each; a piece is not divided."""
    shards: Shards = {}
    for part, pieces in checkpoint.parts_of(own).items():
        groups: list[dict[str, Piece]] = []
        filled = 0
        for name, piece in pieces.items():
            if not piece.size and not (piece.is_whole and rank == 0):
                continue
            size = piece.size * piece.dtype.itemsize
            if not groups or filled + size > MAX_FILE_BYTES:
                groups.append({})
                filled = 0
            groups[-1][name] = piece
            filled += size
        names = (f"shard-{rank + 1:05d}-model-{n:05d}-of-{len(groups):05d}.safetensors" for n in count(1))
        shards[part] = dict(zip(names, groups, strict=False))
    return shards


@torch.no_grad()
def _write_shards(folder: Path, shards: Shards) -> dict[str, Entry]:
    """Write this rank's files into `folder`, each in a thread, hashed from memory and synced; returns their lines."""
    files = {f"{part}/{name}": pieces for part, named in shards.items() for name, pieces in named.items()}
    with ThreadPoolExecutor(max_workers=min(WRITERS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(lambda name: _write_shard(folder / name, files[name]), files), strict=True))


def _write_shard(path: Path, pieces: Mapping[str, Piece]) -> Entry:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = write_file(path, [_output(name, piece) for name, piece in pieces.items()], {"format": "pt"})
    sync(path)
    return entry


def _output(name: str, piece: Piece) -> Output:
    """A piece as it stands in a file: a whole tensor in its shape, another flattened."""

    def rows() -> Iterator[Tensor]:
        for view in piece.views:
            for some, _ in rows_of(view, 0, PIECE_BYTES // piece.dtype.itemsize):
                yield some.detach().cpu()

    return Output(name, piece.shape if piece.is_whole else (piece.size,), piece.dtype, rows)


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


def _finish(unfinished: Path, folder: Path, entries: dict[str, Entry], indices: Mapping[str, str]) -> None:
    """Put indices and manifest beside the files, everything onto the disk, and the folder under its name."""
    checkpoint.check_all_here(unfinished, folder, entries)
    for part, text in indices.items():
        _put(unfinished / part / INDEX, text)
        sync(unfinished / part / INDEX)
        entries[f"{part}/{INDEX}"] = entry_of_bytes(text.encode())
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
