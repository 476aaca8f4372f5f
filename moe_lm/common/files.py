"""Files and folders that appear whole or not at all, files that come from elsewhere, locks that end with a process."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moe_lm.common.errors import MoeLmError, UsageError

if TYPE_CHECKING:
    from filelock import BaseFileLock

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or this user's share of it
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


def check_writable(file: Path, option: str) -> None:
    """Raise MoeLmError for a file that cannot be written, before the work that it is for; what is in it stays.

    `option` is what names the file on the command line.
    """
    is_new = not file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise MoeLmError(f"cannot write {file}: {error.strerror}; name another {option}") from error


def not_writable(place: str, error: OSError) -> MoeLmError:
    """The error about a place in the run folder that cannot be written; a full disk is no wrong use."""
    if error.errno in FULL:
        return MoeLmError(f"cannot write to {place}: {error.strerror}; make room or choose another run_dir")
    return UsageError(f"cannot write to {place}: {error.strerror or error}; fix that or choose another run_dir")


# Files from elsewhere


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a file that a stranger may have made, unbuffered: a regular file of at most `most` bytes.

    Nothing is waited for, as at a FIFO, and nothing is allocated. A symbolic link is followed only within a cache of
    Hugging Face, from `snapshots/REVISION` to `blobs` beside it. Raises UsageError naming the file and what it is.
    """
    try:
        place = _blob(path) or path if path.is_symlink() else path
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and os.path.islink(path):
            raise UsageError(
                f"{path} is a symbolic link, which is not followed; put the file itself there (`cp -L`), or download "
                "the folder with --local-dir"
            ) from error
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read {path}: {why}") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (most is None or status.st_size <= most):
        return os.fdopen(descriptor, "rb", buffering=0)
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} has {status.st_size} bytes, expected at most {most}; is it the right file?")
    raise UsageError(f"cannot read {path}: it is not a regular file")


def read_regular(path: Path, most: int) -> bytes:
    """The content of a file that `open_regular` opens."""
    with open_regular(path, most) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > most:
        raise UsageError(f"{path} grew beyond {most} bytes while it was read")
    return content


class OpenFiles:
    """Files that stay open from one read to the next: at most `most`, beside those that threads are reading."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._open: OrderedDict[Hashable, BinaryIO] = OrderedDict()  # the one that was read last stands last
        self._readers: Counter[Hashable] = Counter()

    @contextmanager
    def of(self, key: Hashable, opened: Callable[[], BinaryIO]) -> Iterator[BinaryIO]:
        """The file of this key, which `opened` opens if it is not open, and which stays open meanwhile."""
        with self._lock:
            file = self._open[key] if key in self._open else self._open.setdefault(key, opened())
            self._open.move_to_end(key)
            self._readers[key] += 1
            for other in list(self._open)[: max(0, len(self._open) - self._most)]:
                if not self._readers[other]:
                    self._open.pop(other).close()
        try:
            yield file
        finally:
            with self._lock:
                self._readers[key] -= 1
                if not self._readers[key]:
                    del self._readers[key]

    def close(self) -> None:
        """Close the files that nobody is reading."""
        with self._lock:
            for key in [key for key in self._open if key not in self._readers]:
                self._open.pop(key).close()


def check_regular(folder: Path) -> None:
    """Raise UsageError for an entry of a folder that another program might read, and `open_regular` would refuse."""
    for entry in os.scandir(folder):
        if not entry.is_dir(follow_symlinks=False) and not entry.is_file(follow_symlinks=False):
            open_regular(Path(entry.path)).close()


def _blob(path: Path) -> Path | None:
    """The file that an entry of a Hugging Face cache is a link to; None for any other link."""
    target = Path(os.path.realpath(path))
    repositories = (folder.parent for folder in path.absolute().parents if folder.name == "snapshots")
    return target if any(target.parent == Path(os.path.realpath(folder), "blobs") for folder in repositories) else None


# Locks and checksums


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
