"""How ranks meet, and how they speak without a process group: through notes in a store at MASTER_ADDR:MASTER_PORT.

Each rank knocks, and rank 0 answers with a name drawn for this meeting, under which all further notes are kept:
torchrun's own store outlives the processes that it starts again, and remembers those that failed before.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from moe_lm.common.errors import MoeLmError, UsageError

if TYPE_CHECKING:
    from moe_lm.parallel.topology import Topology

POLL_SECONDS = 0.1
FAILED_SECONDS = 30.0  # how long a rank that fails before the ranks met looks for the others, to tell them
ROLL_CALL_SECONDS = 2.0  # how long those that lost a rank wait for each other's word that they are still there
LINGER_SECONDS = 3.0  # how long rank 0 keeps its store for those that still read why it ends


class Meeting:
    """The ranks of a run. `notes` is what all of them read and write, `hosts` is where each one runs."""

    def __init__(self, topology: Topology, store: dist.Store, name: str) -> None:
        self.topology = topology
        self.notes = dist.PrefixStore(f"moe-lm/{name}", store)
        self.hosts: list[str] = []
        self.missing: Sequence[int] = ()
        self._closed = threading.Event()
        self._porter: threading.Thread | None = None

    def answer_knocks(self, store: dist.Store, name: str) -> None:
        """As rank 0: tell ranks that knock the name of the meeting, in a thread, until each one is heard under it."""
        doors = range(1, self.topology.world_size)
        self._porter = threading.Thread(target=_answer_knocks, args=(store, name, doors, self._closed), daemon=True)
        self._porter.start()

    def close(self) -> None:
        """Let the porter go home: a process that ends while a thread of it speaks with the store may abort."""
        self._closed.set()
        if self._porter is not None:
            self._porter.join()

    def named(self, ranks: Sequence[int]) -> str:
        """`rank 3 on host-b`, `ranks 4 and 5 on host-c`, with no host while it is not known."""
        words = "rank" if len(ranks) == 1 else "ranks"
        *most, last = map(str, ranks)
        names = f"{words} {', '.join(most)} and {last}" if most else f"{words} {last}"
        hosts = dict.fromkeys(self.hosts[rank] for rank in ranks if rank < len(self.hosts))
        return f"{names} on {', '.join(hosts)}" if hosts else names

    def is_mine_to_say(self, message: str) -> bool:
        """Whether this rank is the one to say what several have to say: rank 0, else the first to ask."""
        message = message.removeprefix("error: ")  # ranks that hear of it raise it as an error of theirs
        key = f"said/{hashlib.sha256(message.encode()).hexdigest()}"
        if not self.topology.is_main:
            wait_until(lambda: self.notes.check([key]), 1)
        mine = str(self.topology.rank)
        return self.notes.compare_set(key, "", mine) == mine.encode()

    def tell_failure(self, message: str, exit_code: int) -> None:
        """End the meeting for all; the first failure counts."""
        self.notes.compare_set("failed", "", json.dumps([message, exit_code]))


_current: Meeting | None = None
_has_failed = False  # the store cannot be had; to try again would take as long again


def named(ranks: Sequence[int]) -> str:
    """`Meeting.named` of the current meeting."""
    assert _current is not None
    return _current.named(ranks)


def end_meeting() -> None:
    """Let go of the store."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def meet(topology: Topology, seconds: float) -> Meeting:
    """Wait until every rank is here.

    Raises MoeLmError (UsageError) on every rank when one does not come in time, or has failed before.
    """
    global _current
    meeting = _current = _enter(topology, seconds)
    world = topology.world_size
    notes = meeting.notes
    try:
        notes.set(f"here/{topology.rank}", socket.gethostname())
        if topology.is_main:
            places = [f"here/{rank}" for rank in range(world)]
            wait_until(lambda: notes.check(places) or notes.check(["failed"]), seconds)
            missing = [rank for rank, place in enumerate(places) if not notes.check([place])]
            if missing and not notes.check(["failed"]):
                meeting.missing = missing
                meeting.tell_failure(
                    f"{meeting.named(missing)} of {world} did not come to {_address()} within {seconds:g} s; see "
                    "whether the launcher started every rank with this address, and whether a firewall is in between",
                    MoeLmError.exit_code,
                )
            elif not missing:
                notes.set("hosts", json.dumps([notes.get(place).decode() for place in places]))
        met = wait_until(lambda: notes.check(["hosts"]) or notes.check(["failed"]), seconds + LINGER_SECONDS)
        if met and notes.check(["failed"]):
            raise _failure(notes)
        if met:
            meeting.hosts = json.loads(notes.get("hosts"))
            return meeting
    except dist.DistError:
        pass
    raise _silence(topology, f"rank 0 at {_address()} ended while the ranks met; see what it said, then start again")


def say_for_all(topology: Topology, message: str, exit_code: int) -> bool:
    """Tell the other ranks why this one ends. Returns whether the person hears it from this one."""
    global _current
    if _has_failed:
        return True
    try:
        meeting = _current = _current or _enter(topology, FAILED_SECONDS)
        is_mine = meeting.is_mine_to_say(message)
        meeting.tell_failure(message, exit_code)
    except (MoeLmError, dist.DistError):  # no rank 0 to agree with
        return True
    return is_mine


def why_lost() -> MoeLmError:
    """Why the connection between the ranks broke: what one of them failed at, else which of them is gone.

    Rank 0 calls the roll, and all that are left say the same.
    """
    assert _current is not None
    what_to_do = "see what it said, then run the same command again to go on from the last checkpoint"
    lost = f"lost {_current.named([0])}, which has ended or does not answer; {what_to_do}"
    notes, topology = _current.notes, _current.topology
    with suppress(dist.DistError):
        notes.set(f"left/{topology.rank}", "")
        places = [f"left/{rank}" for rank in range(topology.world_size)]
        if topology.is_main:
            wait_until(lambda: notes.check(places) or notes.check(["failed"]), ROLL_CALL_SECONDS)
            gone = [rank for rank, place in enumerate(places) if not notes.check([place])]
            named = _current.named(gone) if gone else "the connection between the ranks"
            lost = f"lost {named}, which has ended or does not answer; {what_to_do}"
            _current.tell_failure(lost, MoeLmError.exit_code)
        wait_until(lambda: notes.check(["failed"]), ROLL_CALL_SECONDS + LINGER_SECONDS)
        if notes.check(["failed"]):
            return _failure(notes)
    return _silence(topology, lost)


def _failure(notes: dist.Store) -> MoeLmError:
    """The failure that ended the meeting, as an error of this rank's."""
    message, exit_code = json.loads(notes.get("failed"))
    return (UsageError if exit_code == UsageError.exit_code else MoeLmError)(message.removeprefix("error: "))


def part(topology: Topology) -> None:
    """Before a rank ends after a failure: rank 0, whose store it may be, lets the others read why."""
    if _current is None:
        return
    notes, others = _current.notes, topology.world_size - 1 - len(_current.missing)
    seconds = LINGER_SECONDS if _current.hosts or _current.missing else FAILED_SECONDS
    with suppress(dist.DistError):
        if topology.is_main:
            wait_until(lambda: notes.add("parted", 0) >= others, seconds)
        else:
            notes.add("parted", 1)
    end_meeting()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Look again and again; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _enter(topology: Topology, seconds: float) -> Meeting:
    """Come to the store, and learn the name of this meeting."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    if topology.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        listener = _listen(port)
    _reach(topology, address, port, seconds)
    store = dist.TCPStore(
        address,
        port,
        is_master=listener is not None,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    nonce = secrets.token_hex(8)
    if topology.is_main:
        meeting = Meeting(topology, store, nonce)
        meeting.answer_knocks(store.clone(), nonce)  # type: ignore[attr-defined]
        return meeting
    answer = f"moe-lm/answer/{topology.rank}/{nonce}"
    try:
        store.set(f"moe-lm/knock/{topology.rank}", nonce)
        if wait_until(lambda: store.check([answer]), seconds):
            return Meeting(topology, store, store.get(answer).decode())
    except dist.DistError:
        pass
    raise _silence(topology, f"rank 0 at {_address()} does not answer; see whether the launcher started it")


def _answer_knocks(store: dist.Store, name: str, doors: Sequence[int], closed: threading.Event) -> None:
    waiting = list(doors)
    with suppress(dist.DistError):
        while waiting and not closed.wait(POLL_SECONDS):
            for rank in waiting:
                if store.check([f"moe-lm/knock/{rank}"]):
                    nonce = store.get(f"moe-lm/knock/{rank}").decode()
                    store.set(f"moe-lm/answer/{rank}/{nonce}", name)
            waiting = [rank for rank in waiting if not store.check([f"moe-lm/{name}/here/{rank}"])]


def _listen(port: int) -> socket.socket:
    """A socket of our own: torch would print warnings and a stack of C++ about a port that is taken."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise MoeLmError(
            f"rank 0 cannot listen on port {port} ({error.strerror}); set MASTER_PORT to a free one"
        ) from error


def _reach(topology: Topology, address: str, port: int, seconds: float) -> None:
    """Try until the store is there, without torch's warnings."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            what_to_do = "this is rank 0: name its host in MASTER_ADDR"
            if not topology.is_main:
                what_to_do = "see whether it runs there, and whether a firewall is in between"
            raise _silence(
                topology,
                f"cannot reach rank 0 of {topology.world_size} at {_address()} within {seconds:g} s ({reason}); "
                f"{what_to_do}",
            )
        time.sleep(POLL_SECONDS)


def _silence(topology: Topology, message: str) -> MoeLmError:
    """An error that ranks cannot agree about: one rank a host says it, and rank 1, where rank 0 is missing."""
    global _has_failed
    _has_failed = True
    return MoeLmError(message, common=not (topology.local_rank == 0 or topology.rank == 1))


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
