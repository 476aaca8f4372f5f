"""Checks between ranks: that they agree before they begin, and that none stands still."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

import moe_lm
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.exits import exit_code
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.heartbeat import LISTEN_SECONDS, Failure, Heartbeat, Place, Sign, wait_until
from moe_lm.parallel.meeting import GO_ON, Meeting, last_places
from moe_lm.parallel.process_group import dump_flight_recorder
from moe_lm.parallel.topology import Topology

PATIENT = ("starting", "verifying", "loading", "saving", "compiling")  # phases that may take PATIENCE times as long
PATIENCE = 10
GRACE_SECONDS = 5.0  # in which the main thread ends by itself after a failure elsewhere
LAST_RESORT_SECONDS = 60.0
MOST_ON_SCREEN = 16  # ranks that show their stacks on stderr too; with more, the logs have them


def agree(meeting: Meeting, values: Mapping[str, object]) -> None:
    """Raise UsageError on every rank if one of the `values`, the code or torch is another than on rank 0.

    The ranks have met; they need no process group. One rank of each host hashes the source: from a shared
    disk 512 ranks would read it 512 times.
    """
    if meeting.topology.world_size == 1:
        return
    mine = {name: str(value) for name, value in values.items()} | {"torch": torch.__version__}
    if meeting.topology.is_first_of_host:
        mine["moe_lm's code"] = _code()
    if difference := meeting.differences(mine):
        raise UsageError(f"{difference}; start every rank with the same config, code and versions", common=True)


class Watchdog:
    """Ends a process whose main thread has not moved on for `seconds`, and all that wait with it.

    Every micro-batch is a move, and every exchange: a step may take as long as it needs. To verify data, to load a
    checkpoint, to save one or to compile may take ten times as long while all ranks give signs of life. Every rank
    shows the stacks of its threads, in its `log` and, if they are few, on stderr, and the one that hangs is named. A
    single process waits for no other: without a meeting the watchdog does nothing.
    """

    def __init__(self, seconds: float = 0.0, meeting: Meeting | None = None, log: Path | None = None) -> None:
        self._seconds, self._meeting, self._log = seconds, meeting, log
        self._heartbeat = None if meeting is None else meeting.heartbeat
        self._over, self._at_exit = threading.Event(), ExitStack()
        self._thread: threading.Thread | None = None

    @property
    def patience_seconds(self) -> float | None:
        """The longest that a PATIENT phase may take; None without a meeting."""
        return None if self._heartbeat is None else PATIENCE * self._seconds

    def at(self, phase: str, step: int | None = None) -> None:
        """The main thread moves on to a phase, of `step` if it is a new one."""
        if self._heartbeat is not None:
            self._heartbeat.place.at(phase, step)

    def follow(self, exchange: Exchange | None) -> None:
        """Let the exchanges of a step be places too."""
        if self._heartbeat is not None and exchange is not None:
            exchange.place = self._heartbeat.place
            if "torch._dynamo" in sys.modules:  # something is compiled; its import takes seconds
                self._note_compiling(self._heartbeat.place)

    def _note_compiling(self, place: Place) -> None:
        """Have torch say when it begins to compile, in whichever micro-batch, and when it has."""
        from torch._dynamo.callback import callback_handler

        started = callback_handler.register_start_callback(lambda _: place.begin("compiling"))
        ended = callback_handler.register_end_callback(lambda _: place.end())
        self._at_exit.callback(callback_handler.remove_start_callback, started)
        self._at_exit.callback(callback_handler.remove_end_callback, ended)

    @contextmanager
    def patiently(self, phase: str) -> Iterator[None]:
        """Around one of the PATIENT phases."""
        before = "" if self._heartbeat is None else self._heartbeat.place.phase
        self.at(phase)
        try:
            yield
        finally:
            self.at(before)

    def __enter__(self) -> Watchdog:
        if self._meeting is not None and self._heartbeat is not None:
            arguments = (self._meeting, self._heartbeat)
            self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._at_exit.close()
        if self._thread is not None:
            self._thread.join(LISTEN_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, meeting: Meeting, heartbeat: Heartbeat) -> None:
        place, due, since = heartbeat.place, self._seconds, 0.0
        while not (self._over.wait(min(1.0, self._seconds / 4)) or meeting.is_ending):
            # If even this thread stands still, as when the main thread holds Python's lock.
            faulthandler.dump_traceback_later(self._seconds + LAST_RESORT_SECONDS, exit=True, file=2)
            if place.since != since:
                due, since = self._seconds, place.since
            if (failure := heartbeat.failure) is not None:
                # The main thread says more of an error than this one, and saves what it can.
                if failure.hung or not wait_until(lambda: self._over.is_set() or meeting.is_ending, GRACE_SECONDS):
                    self._end(meeting, failure)
            elif place.seconds > due and (failure := self._judge(meeting, heartbeat)) is not None:
                self._end(meeting, failure)
            elif place.seconds > due:
                due = place.seconds + self._seconds

    def _judge(self, meeting: Meeting, heartbeat: Heartbeat) -> Failure | None:
        """Who hangs, as one rank finds and tells the others; None if this rank moves on, or may take longer."""
        place, topology = heartbeat.place, meeting.topology
        moves, since, seconds = place.moves, place.since, self._seconds

        def settled() -> bool:
            return heartbeat.failure is not None or heartbeat.notes_are_lost or place.since != since

        with suppress(dist.DistError):
            if not settled() and not meeting.is_first(f"hang/{moves}/{place.seconds // seconds:.0f}"):
                wait_until(settled, LISTEN_SECONDS + 2)
            silent = [] if settled() else heartbeat.roll_call()
            if heartbeat.failure is not None or place.since != since:
                return heartbeat.failure
            if not heartbeat.notes_are_lost:
                phases = {place.phase, *(sign.phase for sign in heartbeat.signs.values())}
                if not silent and not phases.isdisjoint(PATIENT):
                    seconds *= PATIENCE
                if place.seconds < seconds:
                    return None
                message = who_hangs(topology, seconds, silent, heartbeat.signs)
                return meeting.report(message, MoeLmError.exit_code, silent, hung=True)
        hung = f"{topology.named([0])} has not answered for {seconds:g} s (here: {place})"
        return Failure(str(meeting.unreachable(f"{hung}; {GO_ON}")), MoeLmError.exit_code, hung=True)

    def _end(self, meeting: Meeting, failure: Failure) -> None:
        if failure.hung:
            self._show_stacks(meeting)
        meeting.fail(f"error: {failure.message}", failure.exit_code)
        sys.stdout.flush()
        os._exit(exit_code(failure.exit_code))

    def _show_stacks(self, meeting: Meeting) -> None:
        assert self._heartbeat is not None
        topology, place = meeting.topology, self._heartbeat.place
        title = f"{topology.named([topology.rank])} has been at the same place for {place.seconds:.0f} s ({place}):\n"
        dump_flight_recorder(topology.rank)
        with suppress(OSError), ExitStack() as files:
            shown = [sys.stderr] if self._log is None or topology.world_size <= MOST_ON_SCREEN else []
            for file in shown if self._log is None else [*shown, files.enter_context(self._log.open("a"))]:
                file.write(title)
                file.flush()
                faulthandler.dump_traceback(file)


NO_WATCHDOG = Watchdog()


def who_hangs(topology: Topology, seconds: float, silent: Sequence[int], signs: Mapping[int, Sign]) -> str:
    """The ranks that give no sign of life, else those that are behind the others, else those outside a collective."""
    fewest = min(sign.moves for sign in signs.values())
    behind = [rank for rank, sign in signs.items() if sign.moves == fewest]
    if len(behind) == len(signs):
        behind = [rank for rank, sign in signs.items() if not sign.waits]
    hung = silent or behind
    if not 0 < len(hung) < len(signs):
        everywhere = last_places(list(signs), signs)
        return f"no rank has moved for {seconds:g} s, and none is behind the others ({everywhere}); see the stacks"
    has, it = ("has", "its") if len(hung) == 1 else ("have", "their")
    why = "it or its host stands still" if silent and len(hung) == 1 else f"see {it} stacks"
    return f"{topology.named(hung)} {has} not moved for {seconds:g} s ({last_places(hung, signs)}); {why}, then {GO_ON}"


def _code() -> str:
    """Version and hash of the source that runs here."""
    digest = hashlib.sha256()
    for file in sorted(Path(moe_lm.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{moe_lm.__version__} ({digest.hexdigest()[:12]})"
