"""The uploader: copies the checkpoints of a run to a store in a thread of its own, which training never waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moe_lm.checkpoint import bucket, checkpoint
from moe_lm.checkpoint.bucket import ADDED_LATER, LOGS, StoredCheckpoint
from moe_lm.checkpoint.checkpoint import COMPLETE, MANIFEST, PINNED
from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError
from moe_lm.common.storage import MissingError
from moe_lm.config.run import CheckpointConfig
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.watch import Watchdog

POLL_SECONDS = 1.0  # between looks at what other ranks have uploaded
MOST_POLL_SECONDS = 8.0  # when nothing has come of looks, each of which waits twice as long as the one before
PATIENCE_SECONDS = 600.0  # for their files, when this rank's are there
LAST_ATTEMPTS = 3  # at the end of a run
TELL_SECONDS = 15.0


class Uploaded(NamedTuple):
    """The outcome of an upload."""

    step: int
    error: str | None  # why it is not there


class Uploader:
    """Uploads each complete checkpoint; every rank has one, and uploads a share of the files.

    The ranks meet in the store alone: rank 0 writes the manifest, at which the others begin, and COMPLETE when every
    file of the manifest is there. So no rank waits for another one in a collective, and an upload that was cut is
    continued. If several checkpoints wait, the newest is next, and of the older ones only archived ones follow. What
    fails is tried again with the next checkpoint.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        assert config.upload_to is not None
        self._checkpoints, self._config, self._url, self._ranks = checkpoints, config, config.upload_to, ranks
        self._rank, self._size = ranks.rank, ranks.size
        self._changed = threading.Condition()
        self._pending: list[Path] = []
        self._gone_back_to: int | None = None  # while later steps may be in the store
        self._begun: dict[Path, bytes] = {}  # the manifest under which this rank last uploaded a share, by checkpoint
        self._attempts = 0  # that failed since the last call of `add`
        self._pause = POLL_SECONDS
        self._is_due = False
        self._outcomes: list[Uploaded] = []
        self._thread: threading.Thread | None = None
        self.under_way: Path | None = None  # is not to be deleted

    def add(self, folder: Path) -> None:
        """Upload a complete checkpoint, soon."""
        with self._changed:
            self._pending = [*(path for path in self._pending if path != folder), folder]
            self._attempts, self._pause = 0, POLL_SECONDS
        self._wake()

    def go_back_to(self, step: int) -> None:
        """Delete what is in the store of later steps, before the next upload; tried until it is done."""
        with self._changed:
            if self._rank == 0:
                self._gone_back_to = step if self._gone_back_to is None else min(step, self._gone_back_to)
            self._attempts, self._pause = 0, POLL_SECONDS
            self._pending = [path for path in self._pending if checkpoint.step_of(path) <= step]
        self._wake()

    def outcomes(self) -> list[Uploaded]:
        """The outcomes of the uploads that have ended since the last call; those of rank 0 are of whole checkpoints."""
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def finish(self, tell: Callable[[str], object], watchdog: Watchdog) -> None:
        """Wait until the last checkpoint is uploaded, `upload_timeout` seconds at most. Every rank calls this."""
        deadline = time.monotonic() + self._config.upload_timeout
        told = time.monotonic() - TELL_SECONDS + 1  # nothing is told of what is quick
        with watchdog.patiently("saving"):
            while not self._ranks.first(lambda: self._is_over(deadline), ()):
                watchdog.at("saving")
                if self._rank == 0 and time.monotonic() > told + TELL_SECONDS:
                    told = time.monotonic()
                    tell(f"the last checkpoint is on its way to {self._url}; waiting {deadline - told:.0f} s at most")
                time.sleep(min(0.1, POLL_SECONDS))

    def _is_over(self, deadline: float) -> bool:
        with self._changed:
            is_idle = not self._is_due and self.under_way is None
            if is_idle and not self._pending and self._gone_back_to is None:
                return True
            if time.monotonic() > deadline:
                left = f"it did not arrive within checkpoint.upload_timeout={self._config.upload_timeout:g} s"
                step = max(map(checkpoint.step_of, self._pending), default=self._gone_back_to or 0)
                self._outcomes.append(Uploaded(step, left))
                return True
            if is_idle and self._attempts >= LAST_ATTEMPTS:
                return True
        if is_idle:
            self._wake()
        return False

    def _wake(self) -> None:
        with self._changed:
            self._is_due = True
            self._changed.notify()
        if self._thread is None:
            # A daemon: a store that does not answer keeps no process alive.
            self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                is_owing = self._gone_back_to is not None or (self._rank > 0 and bool(self._pending))
                is_asked = self._changed.wait_for(lambda: self._is_due, self._pause if is_owing else None)
                self._pending = [path for path in self._pending if (path / COMPLETE).is_file()]
                self._begun = {path: manifest for path, manifest in self._begun.items() if path in self._pending}
                newest = max(self._pending, key=checkpoint.step_of, default=None)
                self.under_way = newest if is_asked or self._rank > 0 else None
                self._is_due = False
            self._try(self.under_way, self._gone_back_to)

    def _try(self, folder: Path | None, gone_back_to: int | None) -> None:
        error, is_new, is_quiet = None, False, False
        try:
            if gone_back_to is not None:
                self._drop_after(gone_back_to)
            if folder is not None:
                is_new = self._upload_all(folder) if self._rank == 0 else self._upload_share_of_any()
        except (MoeLmError, OSError) as raised:
            error = str(raised) if isinstance(raised, MoeLmError) else f"{raised.filename or folder}: {raised.strerror}"
        except Exception as raised:  # whatever a store's client does, training goes on
            error = f"{type(raised).__name__}: {raised}"
        with self._changed:
            self.under_way = None
            self._pause = POLL_SECONDS if is_new else min(2 * self._pause, MOST_POLL_SECONDS)
            if error is not None and folder is not None and not (folder / COMPLETE).is_file():
                error = "it is no longer in the run folder, as a store that is slower than the saves leads to"
            if error is not None:
                self._attempts += 1
                is_quiet = folder is None and self._attempts > 1  # said before
            elif self._rank == 0:
                self._pending = [path for path in self._pending if folder is None or _is_owed(path, folder)]
                self._is_due = self._is_due or bool(self._pending)
            if is_new or (error is not None and not is_quiet):
                step = gone_back_to if folder is None else checkpoint.step_of(folder)
                self._outcomes.append(Uploaded(step or 0, error))

    def _drop_after(self, step: int) -> None:
        try:
            bucket.drop_after(self._url, step)
        except MoeLmError as error:
            raise MoeLmError(
                f"later steps than {step}, to which the run has gone back, are still there ({error}); until they are "
                "deleted, a start elsewhere would go on from them"
            ) from error
        with self._changed:
            if self._gone_back_to == step:  # and not to an earlier one meanwhile
                self._gone_back_to = None

    def _upload_all(self, folder: Path) -> bool:
        """Rank 0: manifest, its share, what the others upload, what was added later, logs, COMPLETE.

        Returns whether it was not complete before.
        """
        there = self._there(folder)
        manifest = (folder / MANIFEST).read_bytes()
        if MANIFEST not in there.files or storage.read_bytes(storage.join(there.url, MANIFEST)) != manifest:
            # Of an attempt that the run did not go on from. Ranks that still upload it see that its manifest is gone;
            # only what they put before that is sure to be listed.
            bucket.set_aside(there)
            bucket.delete(self._there(folder))
            there = there._replace(files={})
            storage.write_bytes(storage.join(there.url, MANIFEST), manifest)
        if not there.is_complete:
            self._upload_share(folder, there)
            self._wait_for_others(folder)
        for name in ADDED_LATER:
            if (folder / name).is_file():
                storage.upload(folder / name, storage.join(there.url, name))
        for name in LOGS:
            if (self._checkpoints.parent / name).is_file():
                storage.upload(self._checkpoints.parent / name, storage.join(self._url, name))
        if not there.is_complete:
            storage.upload(folder / COMPLETE, storage.join(there.url, COMPLETE))
        bucket.clean(self._url, self._config, there.step)
        return not there.is_complete

    def _upload_share_of_any(self) -> bool:
        """Another rank: its share of the newest checkpoint that rank 0 has begun to upload."""
        for folder in sorted(self._pending, key=checkpoint.step_of, reverse=True):
            with suppress(MissingError):
                there = self._there(folder)
                url = storage.join(there.url, MANIFEST)
                manifest = storage.read_bytes(url)
                if manifest != (folder / MANIFEST).read_bytes():
                    continue
                if self._begun.get(folder, manifest) != manifest:  # the files of both have the same sizes
                    there = there._replace(files={})
                self._begun[folder] = manifest
                self._upload_share(folder, there)
                if storage.read_bytes(url) != manifest:  # the run has gone back, and saved this step again
                    return False
                with self._changed:
                    self._pending = [path for path in self._pending if _is_owed(path, folder)]
                return True
        return False

    def _upload_share(self, folder: Path, there: StoredCheckpoint) -> None:
        entries = checkpoint.read_manifest(folder)
        names = list(entries)[self._rank :: self._size]
        missing = [name for name in names if there.files.get(name) != entries[name]["size"]]
        bucket.upload_files(there, missing, folder)

    def _wait_for_others(self, folder: Path) -> None:
        entries, waited = checkpoint.read_manifest(folder), time.monotonic()
        while True:
            there = self._there(folder).files
            missing = [name for name, entry in entries.items() if there.get(name) != entry["size"]]
            if not missing:
                return
            if time.monotonic() > waited + PATIENCE_SECONDS:
                raise MoeLmError(f"{len(missing)} of {len(entries)} files of {folder} did not come from other ranks")
            time.sleep(POLL_SECONDS)

    def _there(self, folder: Path) -> StoredCheckpoint:
        item = bucket.stored_at(self._url, checkpoint.step_of(folder))
        return item._replace(files={file.name: file.size for file in storage.find(item.url)})


def _is_owed(path: Path, uploaded: Path) -> bool:
    """Whether a checkpoint is still to be uploaded after this one: a later or an archived one."""
    is_later = checkpoint.step_of(path) > checkpoint.step_of(uploaded)
    return is_later or (path != uploaded and (path / PINNED).is_file())
