"""The checkpoints of a run in a store, such as a bucket: which there are, which stay, and bringing the newest back.

`URL/checkpoints/step-N/` holds the files of a checkpoint under their names, `manifest.json` first, since it says what
the rest will be, and `COMPLETE` last. Beside them lie the run folder's config and logs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from moe_lm.checkpoint import checkpoint, retain
from moe_lm.checkpoint.checkpoint import COMPLETE, DOUBTFUL, MANIFEST, PINNED, STEP_NAME
from moe_lm.checkpoint.retain import HELD_OUT, TRAINER, Known
from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import unfinished_path
from moe_lm.common.integrity import Entry
from moe_lm.common.storage import DamagedError, MissingError
from moe_lm.config.run import CheckpointConfig
from moe_lm.parallel.process_group import Ranks

LOGS = ("config.yaml", "metrics.jsonl", "train.log")  # of the run folder: a resume goes on with them
ADDED_LATER = (PINNED, HELD_OUT)  # to a checkpoint, so that its manifest does not know them
STREAMS = 4  # files on their way at once, of each rank


class StoredCheckpoint(NamedTuple):
    """A checkpoint in a store, whole or not: the bytes of each of its files by name."""

    step: int
    url: str
    files: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        return COMPLETE in self.files

    def read_manifest(self) -> dict[str, Entry]:
        """The manifest of a complete checkpoint. Raises DamagedError if it is not the one that COMPLETE names."""
        text, expected = (storage.read_bytes(storage.join(self.url, name)) for name in (MANIFEST, COMPLETE))
        try:
            manifest: dict[str, Entry] = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedError(f"{self.url}/{MANIFEST} is damaged: {error}") from error
        if hashlib.sha256(text).hexdigest() != expected.decode(errors="replace").strip():
            raise DamagedError(f"{self.url}/{MANIFEST} does not have the sha256 that {COMPLETE} gives")
        for name in manifest:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DamagedError(f"{self.url}/{MANIFEST} names {name}, which leads out of the checkpoint")
        return manifest


def stored(url: str) -> dict[int, StoredCheckpoint]:
    """Every checkpoint of a run in a store, by step. Raises StorageError."""
    found: dict[int, dict[str, int]] = {}
    for file in storage.find(storage.join(url, "checkpoints")):
        folder, _, name = file.name.partition("/")
        match = STEP_NAME.fullmatch(folder)
        if match and not match[2]:
            found.setdefault(int(match[1]), {})[name] = file.size
    return {step: stored_at(url, step)._replace(files=files) for step, files in found.items()}


def stored_at(url: str, step: int) -> StoredCheckpoint:
    """The checkpoint of a step as it will lie there, without files."""
    return StoredCheckpoint(step, storage.join(url, "checkpoints", f"step-{step:08d}"), {})


def delete(doomed: StoredCheckpoint, but: Iterable[str] = ()) -> None:
    """Delete a checkpoint of a store, COMPLETE first, so that what is left of it is never taken for whole."""
    if doomed.is_complete:
        storage.remove([storage.join(doomed.url, COMPLETE)])
    storage.remove([storage.join(doomed.url, name) for name in doomed.files if name not in (COMPLETE, *but)])


def clean(url: str, config: CheckpointConfig, newest: int) -> None:
    """Delete what `checkpoint.keep` and its kin do not keep, and unfinished uploads of older steps than `newest`."""
    found = stored(url)
    complete = {step: item for step, item in found.items() if item.is_complete}
    known = {
        step: Known(DOUBTFUL not in item.files, PINNED in item.files, _held_out_loss(item) if config.best else None)
        for step, item in complete.items()
    }
    stay = retain.steps_kept(known, config.keep, config.best)
    for step, item in found.items():
        if step not in stay and (step in complete or step < newest):
            delete(item)


def drop_after(url: str, step: int) -> None:
    """Delete the checkpoints after `step`, since the run has gone back to it."""
    for newer, item in stored(url).items():
        if newer > step:
            delete(item)


def bring_back(checkpoints: Path, url: str, ranks: Ranks) -> tuple[int | None, list[str]]:
    """Fetch the newest complete checkpoint of a store into the run folder, unless that has one as new.

    Each rank fetches a share of the files, which are verified on their way; a damaged one is passed over. Returns the
    step, None if nothing was fetched, and what was found damaged. Raises StorageError, and MoeLmError for the disk.
    """
    damaged: list[str] = []
    for item in ranks.first(lambda: _newer(checkpoints, url), (MoeLmError,)):
        try:
            _fetch(item, checkpoints, ranks)
            ranks.first(lambda: _fetch_logs(url, checkpoints.parent), (OSError, MoeLmError))
        except DamagedError as error:
            damaged.append(str(error))
            # No longer whole; and the run, when it is there again, uploads all of it.
            ranks.first(partial(set_aside, item), (MoeLmError,))
            continue
        except OSError as error:
            raise MoeLmError(f"cannot write {checkpoints}: {error.strerror or error}; make room there", True) from error
        return item.step, damaged
    return None, damaged


def set_aside(item: StoredCheckpoint) -> None:
    """Take COMPLETE and the manifest from a checkpoint, at which no rank goes on to upload it."""
    storage.remove([storage.join(item.url, COMPLETE)])
    storage.remove([storage.join(item.url, MANIFEST)])


def _newer(checkpoints: Path, url: str) -> list[StoredCheckpoint]:
    """The complete checkpoints of a store that are newer than the run folder's newest, newest first."""
    newest = max(checkpoint.complete_checkpoints(checkpoints), default=-1)
    return sorted((item for step, item in stored(url).items() if item.is_complete and step > newest), reverse=True)


def _fetch(item: StoredCheckpoint, checkpoints: Path, ranks: Ranks) -> None:
    folder = checkpoints / f"step-{item.step:08d}"
    unfinished = unfinished_path(folder)
    manifest = ranks.first(lambda: _begin(item, unfinished), (OSError, MoeLmError))
    try:
        names = list(manifest)[ranks.rank :: ranks.size]
        ranks.each(lambda: fetch_files(item, names, unfinished, manifest), (OSError, MoeLmError))
        ranks.first(lambda: _end(item, unfinished, folder, manifest), (OSError, MoeLmError))
    except (OSError, MoeLmError):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _begin(item: StoredCheckpoint, unfinished: Path) -> dict[str, Entry]:
    manifest = item.read_manifest()
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return manifest


def fetch_files(item: StoredCheckpoint, names: Iterable[str], folder: Path, manifest: Mapping[str, Entry]) -> None:
    """Fetch files of a checkpoint, as their lines in its manifest say. Raises DamagedError for another content."""

    def one(name: str) -> None:
        storage.fetch(storage.join(item.url, name), folder / name, manifest.get(name))

    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in pool.map(one, names):
            pass


def upload_files(item: StoredCheckpoint, names: Iterable[str], folder: Path) -> None:
    """Upload files of a checkpoint."""
    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in pool.map(lambda name: storage.upload(folder / name, storage.join(item.url, name)), names):
            pass


def _end(item: StoredCheckpoint, unfinished: Path, folder: Path, manifest: Mapping[str, Entry]) -> None:
    """Put the manifest, and COMPLETE last, beside the files, and the folder under its name."""
    checkpoint.check_all_here(unfinished, folder, manifest)
    later = [name for name in ADDED_LATER if name in item.files]
    fetch_files(item, [*later, MANIFEST], unfinished, {})
    fetch_files(item, [COMPLETE], unfinished, {})
    if folder.exists():  # without COMPLETE
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _fetch_logs(url: str, run: Path) -> None:
    for name in LOGS:
        with suppress(MissingError):
            storage.fetch(storage.join(url, name), run / name)


def _held_out_loss(item: StoredCheckpoint) -> float | None:
    losses = []
    for name in (TRAINER, HELD_OUT):
        with suppress(MissingError, ValueError):
            values: dict[str, Any] = json.loads(storage.read_bytes(storage.join(item.url, name)))
            losses.append(retain.loss_of(values))
    return next((loss for loss in losses if loss is not None), None)
