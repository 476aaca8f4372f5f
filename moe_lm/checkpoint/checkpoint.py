"""The folder of a checkpoint, `step-00001000`: its layout, finding the newest, verifying it.

It is whole and checksummed, or it is not there.

    model/          safetensors with the tensors named `model.*`: all that sampling reads
    optimizer/      safetensors with every other tensor; in both, pieces.json says where their elements are
    carried/        safetensors of an imported model that are none of ours, for its export
    ...             the files beside them: config, tokenizer, the trainer's counters
    manifest.json   size and checksum of every file above
    COMPLETE        the manifest's sha256, written last

Each rank writes, hashes and verifies a share of the files (write.py), and a checkpoint loads into any layout (read.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from moe_lm.common import hub, storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import UNFINISHED, read_regular, unfinished_path
from moe_lm.common.integrity import Entry, damage_in
from moe_lm.common.process import to_type
from moe_lm.config.strict_yaml import parse_section

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
PINNED = "PINNED"
MOST_MANIFEST = 64 << 20  # bytes
DOUBTFUL = "doubtful.txt"  # says why a checkpoint is not one to go back to; it was saved so that nothing is lost
GENERATION = "generation_config.json"  # came with an imported model, and goes with all that is trained from it
MODEL, OPTIMIZER, TOKENIZER = "model", "optimizer", "tokenizer"
CARRIED = "carried"  # see carried.py
MODEL_PREFIX = "model."
# `.tmp` is unfinished or being deleted; `.replaced` is a whole checkpoint making room for a new one of its step;
# `.damaged` was moved aside when a run went on from an older one.
REPLACED, DAMAGED = ".replaced", ".damaged"
MOST_RUNS = 4  # that are named
STEP_NAME = re.compile(r"step-(\d{8,})((?:\.replaced|\.damaged)?(?:\.tmp)?)")


T = TypeVar("T")

# What an OSError says of the checkpoint. Any other, like EIO or EACCES, is of the storage, and may be over soon.
OF_THE_CHECKPOINT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class UnreadableError(MoeLmError):
    """A file cannot be read, and nothing says that it is damaged."""


def parts_of(state: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The tensors by the subfolder that holds them."""
    parts: dict[str, dict[str, T]] = {}
    for name, tensor in state.items():
        parts.setdefault(MODEL if name.startswith(MODEL_PREFIX) else OPTIMIZER, {})[name] = tensor
    return parts


# Find


def resolve(path: Path) -> Path:
    """The complete checkpoint that a user means by a run folder or by a checkpoint in it, or UsageError.

    A doubtful one is taken too, with a warning on stderr.
    """
    if not path.is_dir():
        raise UsageError(f"there is no folder {storage.text_of(path)}; {_meant_by_name(path)}")
    found = path if (path / COMPLETE).is_file() else latest(path / "checkpoints")
    if found is not None:
        _warn_of_doubt(found)
        return found
    if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        raise _incomplete(path)
    raise UsageError(f"{path} holds no complete checkpoint{_meant_by_folder(path)}")


def _meant_by_name(path: Path) -> str:
    """What to do about a folder that is not there."""
    if storage.is_remote(path):
        folder = to_type("checkpoint", "fetch", storage.text_of(path), f"runs/{path.name}")
        return f"bring it here first: {folder}"
    siblings = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    if near := get_close_matches(path.name, siblings, n=1):
        return f"did you mean {path.parent / near[0]}?"
    if hub.is_name(path):
        return f"for a model of the Hugging Face hub: moe-lm import {path}"
    return "give a run folder or a checkpoint in it"


def _meant_by_folder(path: Path) -> str:
    """What a folder without a checkpoint is, if it is known, and what to do."""
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"; it is a Hugging Face folder: moe-lm import {path}"
    if complete_checkpoints(path):
        return f" but those of a run; give the run, {path.parent}, or one of them"
    runs = sorted((item.parent for item in path.glob("*/checkpoints")), key=lambda run: run.stat().st_mtime)
    if named := [str(run) for run in runs if latest(run / "checkpoints") is not None][:MOST_RUNS]:
        return f" but the runs in it do; give one of them: {', '.join(named)}"
    return f": expected {path}/checkpoints/step-*/{COMPLETE}; train first, or give another run folder"


def is_there(path: Path) -> bool:
    """Whether `resolve` finds a checkpoint."""
    return (path / COMPLETE).is_file() or latest(path / "checkpoints") is not None


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint of a folder of checkpoints."""
    complete = complete_checkpoints(checkpoints)
    return complete[max(complete)] if complete else None


def latest_readable(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint of which all but the tensors verifies."""
    complete = complete_checkpoints(checkpoints)
    return next((complete[step] for step in sorted(complete, reverse=True) if _is_readable(complete[step])), None)


def previous_sound(folder: Path) -> Path | None:
    """The newest checkpoint before `folder` that verifies."""
    match = STEP_NAME.fullmatch(folder.name)
    complete = complete_checkpoints(folder.parent) if match else {}
    older = [complete[step] for step in sorted(complete, reverse=True) if match and step < int(match[1])]
    return next((path for path in older if _is_sound(path)), None)


@cache  # a verb may look for it more than once
def _warn_of_doubt(folder: Path) -> None:
    if (folder / DOUBTFUL).is_file():
        complete = complete_checkpoints(folder.parent)
        good = [complete[step] for step in good_steps(complete)]
        why = (folder / DOUBTFUL).read_text(encoding="utf-8", errors="replace").strip()
        advice = f"the newest good one is {good[-1]}" if good else "no good one is beside it"
        print(f"warning: {folder} is doubtful: {why}; {advice}", file=sys.stderr)


# Verify


def verify(folder: Path, part: str = "", share: slice = slice(None)) -> list[str]:
    """Read back size and checksum of every file, or of one file or subfolder; returns the names of these files.

    `share` selects the files to verify, in the manifest's order; other ranks verify the rest. Raises UsageError for a
    checkpoint without COMPLETE, MoeLmError naming the first file that is not as written or cannot be read.
    """
    if not (folder / COMPLETE).is_file():
        raise _incomplete(folder)
    damage = damage_of(folder, part, share)
    if damage is not None:
        raise _damaged(folder, damage)
    return _names_in(read_manifest(folder), part)


def damage_of(folder: Path, part: str = "", share: slice = slice(None)) -> str | None:
    """The first file that is not as it was written, and how; None for a sound checkpoint. Arguments as of `verify`."""
    return next(iter(damages(folder, part, share)), None)


def damages(folder: Path, part: str = "", share: slice = slice(None)) -> list[str]:
    """Every file that is not as it was written, and how. Arguments as of `verify`.

    Raises UnreadableError if one cannot be read.
    """
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, TypeError) as error:
        return [f"{MANIFEST} {_damage_that_shows_in(error, folder, MANIFEST)}"]
    names = _names_in(manifest, part)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda name: _damage_in(folder, name, manifest[name]), names[share]))
    for subfolder in (MODEL, OPTIMIZER, TOKENIZER):
        if part in ("", subfolder):
            paths = (path for path in (folder / subfolder).rglob("*") if path.is_symlink() or not path.is_dir())
            present = {path.relative_to(folder).as_posix() for path in paths}
            found += [f"{name} is not in the manifest" for name in sorted(present.difference(manifest))]
    return [damage for damage in found if damage is not None]


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The manifest, if it is the one that COMPLETE names. Raises OSError, ValueError or TypeError if it is not."""
    if not (folder / COMPLETE).is_file():
        raise ValueError(f"has no {COMPLETE} beside it, which is written last")
    text = read_regular(folder / MANIFEST, MOST_MANIFEST)
    expected = read_regular(folder / COMPLETE, 1 << 10).strip().decode()
    if hashlib.sha256(text).hexdigest() != expected:
        raise ValueError(f"does not have the sha256 that {COMPLETE} gives")
    try:
        return dict(json.loads(text))
    except RecursionError as error:
        raise ValueError("is nested too deep") from error


def verified_path(folder: Path, name: str) -> Path:
    """The path of a file or folder that `write.save` kept beside the tensors, after verifying it."""
    if not verify(folder, name):
        raise MoeLmError(f"the checkpoint {folder} has no {name}; it was not written by this program's training")
    return folder / name


def read_text(folder: Path, name: str) -> str:
    """The text of a file that `write.save` kept beside the tensors, verified."""
    return verified_path(folder, name).read_text(encoding="utf-8")


def read_section(folder: Path, name: str) -> dict[str, Any]:
    """The `key: value` lines of a YAML file that `write.save` kept beside the tensors, verified."""
    text = read_text(folder, name)
    return parse_section(text, f"{folder}/{name}") if text else {}


def entries(folder: Path) -> dict[str, Entry]:
    """The lines of a checkpoint's manifest, by name. Raises as `verify` does, but looks at no other file."""
    verify(folder, MANIFEST)
    return read_manifest(folder)


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint's folder gives. Raises MoeLmError for another name."""
    match = STEP_NAME.fullmatch(folder.name)
    if match is None:
        raise MoeLmError(f"{folder} is not the folder of a checkpoint; expected a name like step-00001000")
    return int(match[1])


def check_all_here(unfinished: Path, folder: Path, entries: Mapping[str, Entry]) -> None:
    """Raise MoeLmError unless this host sees every file that the ranks have written for a checkpoint."""
    for name, entry in entries.items():
        path = unfinished / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise MoeLmError(
                f"cannot write the checkpoint {folder}: {name} is only on the host that wrote it; set run_dir to a "
                "folder that all hosts share"
            )


# Keep and delete


def pin(folder: Path, why: str) -> None:
    """Protect a checkpoint from `retain.clean`. In a read-only folder it does nothing: nothing can be deleted there."""
    with suppress(OSError):
        if not (folder / PINNED).exists():  # the manifest may know it
            (folder / PINNED).write_text(f"{why}\n", encoding="utf-8")


def delete(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves a `.tmp`, never half a checkpoint under its name."""
    doomed = folder if folder.suffix == UNFINISHED else unfinished_path(folder)
    with suppress(OSError):
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed)


def reason(error: Exception) -> str:
    """The cause of an error in words for the user."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return str(error) or type(error).__name__


def _names_in(manifest: Mapping[str, Entry], part: str) -> list[str]:
    return [name for name in manifest if part in ("", name) or name.startswith(f"{part}/")]


def _damage_in(folder: Path, name: str, entry: Entry) -> str | None:
    root = Path(os.path.realpath(folder))
    path = root / name
    try:
        if not path.is_relative_to(root) or os.path.realpath(path) != str(path):
            return f"{name} leads out of the checkpoint or through a symbolic link"
        damage = damage_in(path, entry)
    except (OSError, ValueError, TypeError, KeyError) as error:  # unreadable, or a manifest that no `save` wrote
        return f"{name} cannot be checked ({_damage_that_shows_in(error, folder, name)})"
    return None if damage is None else f"{name} {damage}"


def _damage_that_shows_in(error: Exception, folder: Path, name: str) -> str:
    if isinstance(error, OSError) and error.errno not in OF_THE_CHECKPOINT:
        raise UnreadableError(
            f"{folder / name} cannot be read: {error.strerror}; try again when the storage answers, or move {folder} "
            "away to do without it"
        ) from error
    return reason(error)


def _damaged(folder: Path, damage: str) -> MoeLmError:
    sound = previous_sound(folder)
    advice = f"use {sound}, the newest sound one before it" if sound else "no sound checkpoint is before it"
    return MoeLmError(f"the checkpoint {folder} is damaged: {damage}; {advice}")


def _incomplete(folder: Path) -> UsageError:
    newest = latest(folder.parent)
    advice = f"use {newest}" if newest else "no complete checkpoint is beside it"
    return UsageError(f"{folder} has no {COMPLETE}, so it was never written to its end; {advice}")


def complete_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """The complete checkpoint of every step. A `.replaced` one counts until its successor is there."""
    found: dict[int, Path] = {}
    for folder, step, suffix in sorted(step_folders(checkpoints), key=lambda item: item[2], reverse=True):
        if suffix in ("", REPLACED) and (folder / COMPLETE).is_file():
            found[step] = folder
    return found


def good_steps(complete: Mapping[int, Path]) -> list[int]:
    """The steps, in order, whose checkpoints are not doubtful."""
    return [step for step in sorted(complete) if not (complete[step] / DOUBTFUL).is_file()]


def _is_sound(folder: Path) -> bool:
    with suppress(UnreadableError):
        return damage_of(folder) is None
    return False


def _is_readable(folder: Path) -> bool:
    with suppress(OSError, ValueError, TypeError, UnreadableError):
        of_tensors = tuple(f"{part}/" for part in (MODEL, OPTIMIZER, CARRIED))
        names = [name for name in read_manifest(folder) if not name.startswith(of_tensors)]
        return all(damage_of(folder, name) is None for name in names)
    return False


def step_folders(checkpoints: Path) -> Iterator[tuple[Path, int, str]]:
    """Every `step-*` folder with its step and the suffix of its name."""
    if not checkpoints.is_dir():
        return
    for folder in list(checkpoints.iterdir()):
        match = STEP_NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            yield folder, int(match[1]), match[2]
