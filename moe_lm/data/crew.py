"""The processes of `prepare`, on one host or on many, which take the pieces of a job one after the other.

Who takes a piece makes a file, its claim, and touches it while at work. Claims keep two from doing the same; nothing
depends on them, as two would write the same. The piece of one that died is taken over by one other.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Protocol

from moe_lm.common.errors import MoeLmError
from moe_lm.config.data import SourceConfig
from moe_lm.text.files import Piece

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0  # without a sign of life, as seen here: clocks of hosts differ, and folders of a network lag behind
POLL_SECONDS = 0.2

Tell = Callable[[int], None]  # bytes of text that have been done since it was told last


class Job(Protocol):
    """Numbered pieces of work, each of which leaves files when it is done."""

    @property
    def claims(self) -> Path:
        """The folder of the claims."""

    @property
    def max_bytes(self) -> int | None:
        """The text after which no more pieces are needed; None: all are."""

    def __len__(self) -> int: ...

    def is_done(self, number: int) -> bool: ...

    def text_bytes(self, number: int) -> int:
        """The text of a piece that is done."""

    def do(self, number: int, tell: Tell, is_mine: Callable[[], bool]) -> None:
        """Do a piece. Nothing is left of it if another has taken it over when it ends."""


@dataclass(frozen=True)
class PiecesJob:
    """Pieces of a source, each of which is done when its record, written last, is there."""

    source: SourceConfig
    pieces: Sequence[Piece]
    records: Path  # their folder
    claims: Path

    @property
    def max_bytes(self) -> int | None:
        return self.source.max_bytes

    def __len__(self) -> int:
        return len(self.pieces)

    def is_done(self, number: int) -> bool:
        return self.record_path(number).exists()

    def record_path(self, number: int) -> Path:
        return self.records / f"piece-{number:05d}.json"


@dataclass(frozen=True)
class Ranks:
    """The processes that a launcher started together. A process alone needs no values.

    first: gives what rank 0 has. check_same: raises UsageError unless all have these values. look: raises what another
    rank failed with.
    """

    rank: int = 0
    on_this_host: int = 1
    first: Callable[[str], str] = lambda mine: mine
    check_same: Callable[[dict[str, str]], None] = lambda mine: None
    look: Callable[[], None] = lambda: None


def work_on(job: Job, count: int, tell: Tell, look: Callable[[], None]) -> int:
    """Have all pieces done that are needed, by `count` processes here and those elsewhere. Returns how many died.

    Raises what a process raises, what another rank has failed with, and MoeLmError if all that were started here die.
    """
    died = 0
    if count > 1 and len(job) > 1 and Needed(job).first_missing() is not None:
        died = _in_processes(job, min(count, len(job)), tell)
    claims = Claims(job.claims)
    _work(job, claims, tell)
    _wait(job, claims, tell, look)
    return died


def _work(job: Job, claims: Claims, tell: Tell) -> None:
    """Do the pieces that nobody has done or claimed."""
    needed = Needed(job)
    for number in range(len(job)):
        if needed.first_missing() is None:
            return
        _take(job, number, claims, tell)


def _wait(job: Job, claims: Claims, tell: Tell, look: Callable[[], None]) -> None:
    """Wait for the pieces that others have claimed; those of the dead are done here."""
    needed = Needed(job)
    while (first := needed.first_missing()) is not None:
        look()
        for number in range(first, len(job)):
            _take(job, number, claims, tell)
        if not job.is_done(first):
            time.sleep(POLL_SECONDS)


def _take(job: Job, number: int, claims: Claims, tell: Tell) -> None:
    """Do a piece unless it is done, or another has it."""
    if job.is_done(number) or (claim := claims.take(f"{number:05d}")) is None:
        return
    if not job.is_done(number):  # meanwhile
        with beating(claim):
            job.do(number, tell, lambda: claims.is_last(claim))


class Needed:
    """The pieces from the first on until they have `max_bytes` of text."""

    def __init__(self, job: Job) -> None:
        self._job, self._next, self._text_bytes = job, 0, 0

    def first_missing(self) -> int | None:
        """The first of them that is not done."""
        job = self._job
        while self._next < len(job) and (job.max_bytes is None or self._text_bytes < job.max_bytes):
            if not job.is_done(self._next):
                return self._next
            self._text_bytes += job.text_bytes(self._next) if job.max_bytes is not None else 0
            self._next += 1
        return None


class Claims:
    """The claims in a folder: `NAME.0`, and `NAME.1` of who took over from the dead, as far as this process sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = dict[Path, tuple[int, float]]()

    def take(self, name: str) -> Path | None:
        """Claim what nobody has claimed, or one that has given no sign of life for long; None if another has it.

        Raises FileNotFoundError once the folder has been removed.
        """
        generation = 0
        while (claim := self._folder / f"{name}.{generation}").exists():
            generation += 1
        if generation and not self._is_dead(self._folder / f"{name}.{generation - 1}"):
            return None
        try:
            with claim.open("x") as file:
                file.write(_me(os.getpid()))
        except FileExistsError:
            return None
        return claim

    def is_last(self, claim: Path) -> bool:
        """Whether nobody has taken over from the one with this claim, and the work still goes on."""
        return claim.exists() and not claim.with_suffix(f".{int(claim.suffix[1:]) + 1}").exists()

    def was_taken_over(self, name: str) -> bool:
        """Whether the first that claimed this gave no sign of life for long."""
        return (self._folder / f"{name}.1").exists()

    def release(self, process: int) -> None:
        """Remove the claims of a process of this host that died."""
        for claim in self._folder.glob("*.*"):
            with suppress(OSError):
                if claim.read_text() == _me(process):
                    claim.unlink()

    def _is_dead(self, claim: Path) -> bool:
        try:
            stamp, now = claim.stat().st_mtime_ns, time.monotonic()
        except OSError:
            return False
        before, since = self._seen.get(claim, (0, 0.0))
        if before != stamp:
            self._seen[claim] = stamp, now
            return False
        return now - since > DEAD_SECONDS


def _me(process: int) -> str:
    return f"{socket.gethostname()} {process}"


@contextmanager
def beating(claim: Path) -> Iterator[None]:
    """Give signs of life through a claim, and give it up if the work fails."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(claim)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        with suppress(OSError):
            claim.unlink()
        raise
    finally:
        over.set()
        thread.join()


def _in_processes(job: Job, count: int, tell: Tell) -> int:
    """Work in processes of their own. Spawned, not forked: a lock that a thread of a library holds stays locked."""
    context = get_context("spawn")
    crew = {}
    died = 0
    try:
        for _ in range(count):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(job, there), daemon=True)
            process.start()
            there.close()
            crew[here] = process
        while crew:
            ready = connection.wait(list(crew))
            for here in [pipe for pipe in crew if pipe in ready]:
                try:
                    said = here.recv()
                except EOFError:
                    process = crew.pop(here)
                    process.join()
                    if process.exitcode:
                        died += 1
                        Claims(job.claims).release(process.pid or 0)
                    continue
                if isinstance(said, BaseException):
                    raise said
                tell(said)
    finally:
        for process in crew.values():
            process.kill()
            process.join()
            Claims(job.claims).release(process.pid or 0)
    if died == count:
        raise MoeLmError(
            "every process of prepare was killed, perhaps because memory ran out; run the same command again to go on, "
            "with fewer data.workers if it happens again"
        )
    return died


def _run(job: Job, there: connection.Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's reach every process; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(job, Claims(job.claims), there.send)
    except FileNotFoundError:
        if job.claims.exists():
            raise
        return  # all was finished elsewhere
    except Exception as error:
        there.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a parent that was killed cannot stop its workers
