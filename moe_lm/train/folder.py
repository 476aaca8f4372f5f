"""The folder of a run, `runs/<name>/`: it is made, is writable, and belongs to one process at a time."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import not_writable, try_lock, whole_file


class RunFolder:
    """Holds the run folder during the `with` block; the lock ends with the process, however that ends.

    Raises UsageError if the folder cannot be written, MoeLmError if only its disk is full, or, with the holder, if
    another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path / ".lock"
        self._holder = path / ".lock-holder.json"  # not in the lock file itself, which a second job may truncate

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def __enter__(self) -> Self:
        for folder in (self.path, self.checkpoints):
            _make_writable(folder)
        try:
            lock = try_lock(self._lock_path)
        except OSError as error:
            raise not_writable(f"the run folder {self.path}", error) from error
        if lock is None:
            raise MoeLmError(
                f"the run folder {self.path} is in use by {self._describe_holder()}; wait for it, stop it, or choose "
                "another run_dir"
            )
        self._lock, self._lock_identity = lock, _identity(self._lock_path)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        with suppress(OSError):  # on a full disk; it only helps to describe the holder
            self._holder.write_text(json.dumps(holder), encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def write_config(self, text: str) -> bool:
        """Write the resolved config; returns whether it was another one before.

        A kill leaves the old file or the new one. Raises MoeLmError on a full disk.
        """
        path = self.path / "config.yaml"
        try:
            if path.is_file() and path.read_bytes() == text.encode():
                return False
            with whole_file(path) as file:
                file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise MoeLmError(f"cannot write {path}: {error.strerror}; make room or choose another run_dir") from error
        return True

    def keep_lock(self) -> None:
        """Take the lock again if its file was deleted. Raises MoeLmError if another process has it by now."""
        if _identity(self._lock_path) == self._lock_identity:
            return
        lock = try_lock(self._lock_path)
        if lock is None:
            raise MoeLmError(
                f"the lock of the run folder {self.path} was deleted, and {self._describe_holder()} trains in it now; "
                "this run ends, so that only one writes"
            )
        self._lock, self._lock_identity = lock, _identity(self._lock_path)

    def _describe_holder(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return "another process"


def name_of(run_dir: Path) -> str:
    """The end of a run folder's path: `mine`, or `deepseek/lora`, since the last part alone often says little."""
    return "/".join(Path(os.path.abspath(run_dir)).parts[-2:]).removeprefix("runs/")


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of the same name; None without a file."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise not_writable(f"the run folder {folder}", error) from error
