"""The processes of `prepare`, on one host or on many, which take the pieces of a source one after the other.

Who takes a piece makes a file, its claim, and touches it while at work. Claims keep two from doing the same; nothing
depends on them, as two would write the same. The piece of one that died is taken over.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from moe_lm.common.errors import MoeLmError
from moe_lm.data.chunks import Task, Tell, read_record, write_piece

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0  # without a sign of life, as seen here: clocks of hosts differ, and folders of a network lag behind
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    """The processes that a launcher started together. A process alone needs no values.

    first: gives what rank 0 has. check_same: raises UsageError unless all have these values.
    """

    rank: int = 0
    on_this_host: int = 1
    first: Callable[[str], str] = lambda mine: mine
    check_same: Callable[[dict[str, str]], None] = lambda mine: None


def work_on(task: Task, count: int, tell: Tell) -> int:
    """Have all pieces done that are needed, by `count` processes here and those elsewhere. Returns how many died.

    Raises what a process raises, and MoeLmError if all that were started here die.
    """
    died = 0
    if count > 1 and len(task.pieces) > 1:
        died = _in_processes(task, min(count, len(task.pieces)), tell)
    _work(task, tell)
    _wait(task, tell)
    return died


def _work(task: Task, tell: Tell) -> None:
    """Do the pieces that nobody has done or claimed."""
    needed = Needed(task)
    for number in range(len(task.pieces)):
        if needed.is_enough():
            return
        record = read_record(task, number)
        if record is None and _claim(task, number):
            _do(task, number, tell)


def _wait(task: Task, tell: Tell) -> None:
    """Wait for the pieces that others have claimed; those of the dead are done here."""
    needed, seen = Needed(task), dict[int, tuple[int, float]]()
    while (number := needed.next_missing()) is not None:
        missing = [number for number in range(number, len(task.pieces)) if not task.record_path(number).exists()]
        for number in missing:
            stamp, now = _stamp(task, number), time.monotonic()
            if stamp is None:
                if _claim(task, number) and read_record(task, number) is None:
                    _do(task, number, tell)
                continue
            if seen.get(number, (0, 0.0))[0] != stamp:
                seen[number] = stamp, now
            elif now - seen[number][1] > DEAD_SECONDS:
                _do(task, number, tell)
        time.sleep(POLL_SECONDS)


class Needed:
    """The pieces from the first on until they have `max_bytes` of text."""

    def __init__(self, task: Task) -> None:
        self._task, self._next, self._text_bytes = task, 0, 0

    def next_missing(self) -> int | None:
        """The first needed piece that is not done."""
        while not self.is_enough() and self._next < len(self._task.pieces):
            record = read_record(self._task, self._next)
            if record is None:
                return self._next
            self._text_bytes += record.text_bytes
            self._next += 1
        return None

    def is_enough(self) -> bool:
        most = self._task.source.max_bytes
        if most is None:
            return False
        while self._text_bytes < most and self._next < len(self._task.pieces):
            record = read_record(self._task, self._next)
            if record is None:
                break
            self._text_bytes += record.text_bytes
            self._next += 1
        return self._text_bytes >= most

    @property
    def count(self) -> int:
        """The pieces that are needed, once all are done."""
        return self._next


def _claim_path(task: Task, number: int) -> Path:
    return task.session / f"claim-{number:05d}"


def _claim(task: Task, number: int) -> bool:
    try:
        with _claim_path(task, number).open("x") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}")
    except FileExistsError:
        return False
    return True


def finish_claim(session: Path) -> Path:
    """The claim of who writes the manifest."""
    return session / "claim-finish"


def claimed_to_finish(session: Path) -> bool:
    """Whether this process is to write the manifest; again after a while, if another has claimed it and died."""
    claim = finish_claim(session)
    try:
        claim.open("x").close()
    except FileExistsError:
        with suppress(OSError):
            return time.time() - claim.stat().st_mtime > 2 * DEAD_SECONDS
        return False
    return True


def _stamp(task: Task, number: int) -> int | None:
    try:
        return _claim_path(task, number).stat().st_mtime_ns
    except OSError:
        return None


def _do(task: Task, number: int, tell: Tell) -> None:
    with beating(_claim_path(task, number)):
        write_piece(task, number, tell)


@contextmanager
def beating(claim: Path) -> Iterator[None]:
    """Give signs of life through a claim."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):
                claim.touch()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _in_processes(task: Task, count: int, tell: Tell) -> int:
    """Work in processes of their own. Spawned, not forked: a lock that a thread of a library holds stays locked."""
    context = get_context("spawn")
    crew = {}
    died = 0
    try:
        for _ in range(count):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(task, there), daemon=True)
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
                        _release(task, process.pid or 0)
                    continue
                if isinstance(said, BaseException):
                    raise said
                tell(said)
    finally:
        for process in crew.values():
            process.kill()
            process.join()
    if died == count:
        raise MoeLmError(
            "every process of prepare was killed, perhaps because memory ran out; run the same command again to go on, "
            "with fewer data.workers if it happens again"
        )
    return died


def _release(task: Task, pid: int) -> None:
    """Remove the claims of a process of this host that died."""
    for number in range(len(task.pieces)):
        claim = _claim_path(task, number)
        with suppress(OSError):
            if claim.read_text() == f"{socket.gethostname()} {pid}" and not task.record_path(number).exists():
                claim.unlink()


def _run(task: Task, there: connection.Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's reach every process; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(task, there.send)
    except (MoeLmError, OSError) as error:
        there.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a parent that was killed cannot stop its workers
