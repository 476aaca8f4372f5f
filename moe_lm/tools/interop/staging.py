"""A folder that is whole under its name, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_lm.common.errors import MoeLmError, UsageError


@contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when the `with` block ends well and is deleted when it does not.

    Raises UsageError when something is at `path` already, or another process, or one that was killed, is filling it;
    MoeLmError when the disk does not take what is written.
    """
    path = path.absolute()  # the name of "." is empty
    unfinished = path.parent / f"{path.name}.unfinished"
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not empty and (path.exists() or path.is_symlink()):
        raise UsageError(f"{path} exists already; give the name of a new folder, or delete it")
    try:
        unfinished.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(
            f"{unfinished} exists: another process is writing {path}, or one was killed; delete it when none is"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot write to {path.parent}: {error.strerror}; choose another folder") from error
    try:
        yield unfinished
        unfinished.rename(path)  # an empty folder gives way, and may be the working directory until then
    except OSError as error:
        raise MoeLmError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
