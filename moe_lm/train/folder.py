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

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import try_lock, whole_file


class RunFolder:
    """Holds the run folder during the `with` block; the lock ends with the process, however that ends.

    Raises UsageError if the folder cannot be written, MoeLmError with the holder if another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._holder = path / ".lock-holder.json"  # not in the lock file itself, which a second job may truncate

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def __enter__(self) -> Self:
        for folder in (self.path, self.checkpoints):
            _make_writable(folder)
        lock = try_lock(self.path / ".lock")
        if lock is None:
            raise MoeLmError(
                f"the run folder {self.path} is in use by {self._describe_holder()}; wait for it, stop it, or choose "
                "another run_dir"
            )
        self._lock = lock
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self._holder.write_text(json.dumps(holder), encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def write_config(self, text: str) -> None:
        """Write the resolved config; a kill leaves the old file or the new one."""
        with whole_file(self.path / "config.yaml") as file:
            file.write_text(text, encoding="utf-8")

    def _describe_holder(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return "another process"


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UsageError(
            f"cannot write to the run folder {folder}: {error.strerror}; fix that or choose another run_dir"
        ) from error
