"""Files and folders that appear whole or not at all, and locks that end with their process."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lm.common.errors import MoeLmError, UsageError

if TYPE_CHECKING:
    from filelock import BaseFileLock

UNFINISHED = ".tmp"  # the suffix of what has not got its name yet; a process that was killed leaves it behind


def unfinished_path(path: Path) -> Path:
    """The path at which a file or folder is written before it is renamed to `path`."""
    return path.with_name(path.name + UNFINISHED)


@contextmanager
def whole_file(path: Path, contested: bool = False) -> Iterator[Path]:
    """A path to write to. It is renamed to `path` when the `with` block ends well, and deleted when it does not.

    Several processes may write a `contested` file at the same time: each writes to a path of its own.
    """
    written = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}") if contested else unfinished_path(path)
    try:
        yield written
        sync(written)
        written.replace(path)
    finally:
        with suppress(OSError):
            written.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill. It is renamed to `path` when the `with` block ends well, and deleted when it does not.

    Raises UsageError when something is at `path` already, or when another process, or a killed one, is filling it;
    MoeLmError when the disk does not take what is written.
    """
    path = path.absolute()  # the name of "." is empty
    folder = path.parent / f"{path.name}{UNFINISHED}"
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not empty and (path.exists() or path.is_symlink()):
        raise UsageError(f"{path} exists already; give the name of a new folder, or delete it")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(
            f"{folder} exists: another process is writing {path}, or one was killed; delete it if none is"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot write to {path.parent}: {error.strerror}; choose another folder") from error
    try:
        yield folder
        folder.rename(path)  # replaces an empty folder, which may be the working directory until then
    except OSError as error:
        raise MoeLmError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_lock(path: Path) -> BaseFileLock | None:
    """The acquired lock of a lock file, or None when another process holds it. It ends with the process."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
