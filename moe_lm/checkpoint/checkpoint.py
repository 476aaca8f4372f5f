"""Checkpoints: a folder `step-00001000` is whole and checksummed, or it is not there.

    model/          safetensors with the tensors named `model.*`: all that sampling reads
    optimizer/      safetensors with every other tensor
    ...             the files beside them: config, tokenizer, the trainer's counters
    manifest.json   size and sha256 of every file above
    COMPLETE        the manifest's sha256, written last

Every rank writes, hashes and verifies a share of the files. A checkpoint loads into any layout (checkpoint_tensors.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from moe_lm.checkpoint import checkpoint_tensors
from moe_lm.checkpoint.checkpoint_tensors import reason
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import UNFINISHED, sha256_of, sync, unfinished_path
from moe_lm.parallel.process_group import Ranks

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
PINNED = "PINNED"
MODEL, OPTIMIZER = "model", "optimizer"
MODEL_PREFIX = "model."
ALL_THERE_ARE = Ranks()
Content = str | Path | Callable[[Path], None]
# `.tmp` is unfinished or being deleted; `.replaced` is a whole checkpoint making room for a new one of its step.
STEP_NAME = re.compile(r"step-(\d{8,})(\.replaced|(?:\.replaced)?\.tmp)?")


class Entry(TypedDict):
    """What the manifest says of a file."""

    size: int
    sha256: str


def save(
    checkpoints: Path,
    step: int,
    state: Mapping[str, Tensor],
    files: Mapping[str, Content],
    ranks: Ranks = ALL_THERE_ARE,
) -> Path:
    """Write `checkpoints/step-<step>` with the tensors of `state` and return it; every rank calls this.

    `files` are kept beside the tensors under their names: a string is text, a path is a file or folder to copy, and a
    function writes what it likes at the path that it gets, such as tensors too large to be in memory together.
    A checkpoint of the same step is replaced. Raises MoeLmError with the path and the reason when writing fails;
    the older checkpoints are untouched then.
    """
    folder = checkpoints / f"step-{step:08d}"
    unfinished = unfinished_path(folder)
    try:
        ranks.first(lambda: _make_empty(unfinished), (OSError,))
        for part, tensors in _parts(state).items():
            checkpoint_tensors.write(unfinished / part, tensors, ranks)
        manifests = ranks.each(lambda: _settle(unfinished, files, ranks.rank), (OSError,))
        entries = {name: entry for manifest in manifests for name, entry in manifest.items()}
        ranks.first(lambda: _finish(unfinished, folder, entries), (OSError,))
    except (OSError, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise MoeLmError(
            f"cannot write the checkpoint {folder}: {reason(error)}; make room or mend the folder, the older "
            "checkpoints are as they were"
        ) from error
    except MoeLmError:  # from a function among `files`
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def load(folder: Path, state: Mapping[str, Tensor], ranks: Ranks = ALL_THERE_ARE) -> None:
    """Verify every file of a checkpoint, then fill the tensors of `state` in place; every rank calls this.

    They keep their dtype and layout. Raises UsageError for a checkpoint without COMPLETE, MoeLmError naming the file
    that is not as it was written or the tensor that is missing or has another shape; no tensor has been touched then.
    """
    ranks.each(lambda: verify(folder, share=slice(ranks.rank, None, ranks.size)), (MoeLmError,))
    _fill(folder, state, ranks)


def load_model_weights(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks = ALL_THERE_ARE) -> None:
    """`load` for tensors named `model.*` alone: reads and verifies no optimizer state."""
    others = [name for name in tensors if not name.startswith(MODEL_PREFIX)]
    if others:
        raise MoeLmError(f"{others[0]!r} is not a weight: names of weights in a checkpoint begin with {MODEL_PREFIX!r}")
    ranks.each(lambda: verify(folder, MODEL, share=slice(ranks.rank, None, ranks.size)), (MoeLmError,))
    _fill(folder, tensors, ranks)


def headers(folder: Path) -> dict[str, Tensor]:
    """Shape and data type of every weight of a checkpoint, as tensors without memory."""
    saved = checkpoint_tensors.saved_tensors(folder / MODEL)
    return {
        name: torch.empty(header.size, dtype=header.properties.dtype, device="meta") for name, header in saved.items()
    }


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 that a checkpoint's manifest gives of each of its files, by name."""
    return {name: entry["sha256"] for name, entry in _read_manifest(folder).items()}


def read_text(folder: Path, name: str) -> str:
    """The text of a file that `save` kept beside the tensors, verified."""
    return verified_path(folder, name).read_text(encoding="utf-8")


def verified_path(folder: Path, name: str) -> Path:
    """The path of a file or folder that `save` kept beside the tensors, after verifying it."""
    if not verify(folder, name):
        raise MoeLmError(f"the checkpoint {folder} has no {name}; it was written by something else than training")
    return folder / name


def verify(folder: Path, part: str = "", share: slice = slice(None)) -> list[str]:
    """Read back size and checksum of every file, or of one file or subfolder; returns the names of these files.

    `share`: of the files in the manifest's order, those to verify; other ranks verify the rest. Raises UsageError for a
    checkpoint without COMPLETE, MoeLmError naming the first file that is not as written.
    """
    manifest = _read_manifest(folder)
    names = [name for name in manifest if part in ("", name) or name.startswith(f"{part}/")]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda name: _verify_file(folder, name, manifest[name]), names[share]))
    for tensors in (MODEL, OPTIMIZER):
        if part in ("", tensors):
            present = {f"{tensors}/{path.name}" for path in (folder / tensors).glob("*.safetensors")}
            for name in sorted(present.difference(manifest)):
                raise _corrupt(folder, name, "is not in the manifest")
    return names


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint of a folder of checkpoints."""
    complete = _complete(checkpoints)
    return complete[max(complete)] if complete else None


def latest_of_all(checkpoints: Path, ranks: Ranks = ALL_THERE_ARE) -> Path | None:
    """`latest` as rank 0 sees it, for every rank; raises MoeLmError when another does not see it too."""

    def seen() -> None:
        if name is not None and not (checkpoints / name / COMPLETE).is_file():
            raise MoeLmError(
                f"rank {ranks.rank} does not see the checkpoint {checkpoints / name} that rank 0 goes on from; set "
                "run_dir to a folder that all hosts share"
            )

    newest = latest(checkpoints)
    name = ranks.first(lambda: newest and newest.name, ())
    ranks.each(seen, (MoeLmError,))
    return None if name is None else checkpoints / name


def resolve(path: Path) -> Path:
    """The complete checkpoint that a user means by a run folder or by a checkpoint in it, or UsageError."""
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}; give a run folder or a checkpoint in it")
    if (path / COMPLETE).is_file():
        return path
    newest = latest(path / "checkpoints")
    if newest is not None:
        return newest
    if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        raise _incomplete(path)
    raise UsageError(
        f"{path} holds no complete checkpoint: expected {path}/checkpoints/step-*/{COMPLETE}; "
        "train first, or give another run folder"
    )


def is_there(path: Path) -> bool:
    """Whether `resolve` finds a checkpoint."""
    return (path / COMPLETE).is_file() or latest(path / "checkpoints") is not None


def pin(folder: Path, why: str) -> None:
    """Have `clean` leave a checkpoint alone that something else needs; where this cannot write, neither can that."""
    with suppress(OSError):
        (folder / PINNED).write_text(f"{why}\n", encoding="utf-8")


def clean(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints and the pinned ones, and leftovers of unfinished saves.

    What cannot be deleted stays for the next time. A folder under its final name without COMPLETE is no leftover
    of a save, so it stays too.
    """
    complete = _complete(checkpoints)
    kept = {complete[step] for step in sorted(complete)[-keep:]}
    kept |= {folder for folder in complete.values() if (folder / PINNED).is_file()}
    for folder, _, suffix in _step_folders(checkpoints):
        if folder not in kept and (suffix or folder in complete.values()):
            _delete(folder)


def _settle(unfinished: Path, files: Mapping[str, Content], rank: int) -> dict[str, Entry]:
    """Bring what this rank wrote onto the disk, rank 0 the files beside the tensors too; returns its entries.

    A file's writer does this: on a network's file system it alone has the file at hand, and something to bring.
    """
    paths = [path for part in (MODEL, OPTIMIZER) for path in checkpoint_tensors.written_by(unfinished / part, rank)]
    if rank == 0:
        for name, content in files.items():
            _put(unfinished / name, content)
            paths += _files_of(unfinished / name)
    for path in paths:
        sync(path)
    return {path.relative_to(unfinished).as_posix(): _entry(path) for path in paths}


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
        _delete(replaced)


def _fill(folder: Path, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    parts = _parts(state)
    for part, tensors in parts.items():
        others_too = part != MODEL
        ranks.each(lambda: checkpoint_tensors.check(folder / part, tensors, others_too), (MoeLmError,))  # noqa: B023
    for part, tensors in parts.items():
        checkpoint_tensors.read(folder / part, tensors, ranks)


def _read_manifest(folder: Path) -> dict[str, Entry]:
    if not (folder / COMPLETE).is_file():
        raise _incomplete(folder)
    try:
        text = (folder / MANIFEST).read_bytes()
        expected = (folder / COMPLETE).read_bytes().strip().decode()
        if hashlib.sha256(text).hexdigest() != expected:
            raise _corrupt(folder, MANIFEST, f"does not have the sha256 that {COMPLETE} gives")
        manifest: dict[str, Entry] = dict(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise _corrupt(folder, MANIFEST, reason(error)) from error
    return manifest


def _verify_file(folder: Path, name: str, entry: Entry) -> None:
    root = Path(os.path.realpath(folder))
    path = root / name
    try:
        if not path.is_relative_to(root) or os.path.realpath(path) != str(path):
            raise _corrupt(folder, name, "leads out of the checkpoint or through a symbolic link")
        if not path.is_file():
            raise _corrupt(folder, name, "is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise _corrupt(folder, name, f"has {size} bytes, expected {entry['size']}")
        if _entry(path) != entry:
            raise _corrupt(folder, name, "does not have the sha256 that the manifest gives")
    except (OSError, ValueError, TypeError, KeyError) as error:  # unreadable, or a manifest that no `save` wrote
        raise _corrupt(folder, name, f"cannot be checked ({reason(error)})") from error


def _corrupt(folder: Path, name: str, what: str) -> MoeLmError:
    older = {step: path for step, path in _complete(folder.parent).items() if path.name < folder.name}
    advice = (
        f"to go on from {older[max(older)]}, the previous complete checkpoint, delete {folder} and run again"
        if older
        else "no older complete checkpoint is beside it"
    )
    return MoeLmError(f"the checkpoint {folder} is damaged: {name} {what}; {advice}")


def _incomplete(folder: Path) -> UsageError:
    newest = latest(folder.parent)
    advice = f"use {newest}" if newest else "no complete checkpoint is beside it"
    return UsageError(f"{folder} has no {COMPLETE}, so it was never written to its end; {advice}")


def _complete(checkpoints: Path) -> dict[int, Path]:
    """The complete checkpoint of every step. One that is being replaced counts until its successor is there."""
    found: dict[int, Path] = {}
    for folder, step, suffix in sorted(_step_folders(checkpoints), key=lambda item: item[2], reverse=True):
        if suffix in ("", ".replaced") and (folder / COMPLETE).is_file():
            found[step] = folder
    return found


def _step_folders(checkpoints: Path) -> Iterator[tuple[Path, int, str]]:
    """Every `step-*` folder with its step and the suffix of its name."""
    if not checkpoints.is_dir():
        return
    for folder in list(checkpoints.iterdir()):
        match = STEP_NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            yield folder, int(match[1]), match[2] or ""


def _delete(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves a `.tmp`, never half a checkpoint under its name."""
    doomed = folder if folder.suffix == UNFINISHED else unfinished_path(folder)
    with suppress(OSError):
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed)


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by the subfolder that holds them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(MODEL if name.startswith(MODEL_PREFIX) else OPTIMIZER, {})[name] = tensor
    return parts


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


def _entry(path: Path) -> Entry:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
