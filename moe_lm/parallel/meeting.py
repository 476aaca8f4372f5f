"""The meeting of the ranks: how they find each other, and how they speak without a process group.

They share notes in a store at MASTER_ADDR:MASTER_PORT. Each rank knocks, and rank 0 answers with a name drawn for this
meeting, which prefixes all further notes: torchrun's store outlives the processes that it restarts, and still holds
the notes of those that failed before. From then on each gives signs of life (heartbeat.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.process import open_files
from moe_lm.parallel.heartbeat import LISTEN_SECONDS, POLL_SECONDS, Failure, Heartbeat, Sign, wait_until
from moe_lm.parallel.topology import Topology

FAILED_SECONDS = 30.0  # for which a rank that fails before the ranks met looks for the others, to tell them
CONNECTIONS_OF_RANK = 4  # to rank 0: three to the notes, and one of gloo
SPARE_FILES = 128  # of rank 0, for everything else
LINGER_SECONDS = 3.0  # for which rank 0 keeps its store, so that the others can read why it ends
MOST_SPEAKERS = 3  # ranks that print errors of their own: 512 that fail each in its own words fail for one reason
RANKS_OF_A_POLL = 64  # that may ask rank 0 at POLL_SECONDS; with more of them each asks less often
# How the back ends report a rank that has gone, or has not answered in time.
LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe", "NCCL", "Socket Timeout")
GO_ON = "run the same command again to go on from the last checkpoint"


class Meeting:
    """The ranks of a run, and the notes by which they agree on what to say when one of them fails.

    Once they have met, `topology` names their hosts, and `heartbeat` gives and hears their signs of life.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.heartbeat: Heartbeat | None = None
        self.is_ending = False  # the main thread is about to say why
        self._store_and_name: tuple[dist.Store, str] | None = None
        self._store: dist.Store | None = None  # the notes
        self._unreachable = False  # rank 0 does not answer; to try again would take as long again
        self._speaking, self._has_spoken = threading.Lock(), False
        self._gone: Sequence[int] = ()  # ranks that will not read why the run ends
        self._over = threading.Event()
        self._answering: threading.Thread | None = None
        self._poll_seconds = POLL_SECONDS * max(1.0, topology.world_size / RANKS_OF_A_POLL)

    def assemble(self, seconds: float) -> dist.Store:
        """Wait until every rank is here, and return the notes. Ranks that have met meet only once.

        Every rank sends a bounded number of requests, and rank 0 few for each of them.

        Raises MoeLmError (UsageError) on every rank if one does not come in time, or has failed before.
        """
        if self._store_and_name is not None and self.topology.hosts:
            return self._notes_to_keep()
        notes, world_size = self._enter(seconds), self.topology.world_size
        try:
            self.heartbeat = Heartbeat(self._connect(), self.topology.rank, world_size)
            notes.set(f"here/{self.topology.rank}", socket.gethostname())
            if self.topology.is_main:
                places = [f"here/{rank}" for rank in range(world_size)]
                wait_until(lambda: notes.check(places) or notes.check(["failed"]), seconds)
                missing = [rank for rank, place in enumerate(places) if not notes.check([place])]
                if missing and not notes.check(["failed"]):
                    self._gone = missing
                    self.report(
                        f"{self.topology.named(missing)} of {world_size} did not come to {_address()} within "
                        f"{seconds:g} s; check that the launcher started every rank with this address, and that no "
                        "firewall is in between",
                        MoeLmError.exit_code,
                    )
                elif not missing:
                    notes.set("hosts", json.dumps([host.decode() for host in notes.multi_get(places)]))
            met = self._wait(lambda: notes.check(["hosts"]) or notes.check(["failed"]), seconds + LINGER_SECONDS)
            if met and notes.check(["failed"]):
                raise _as_error(Failure.of(notes.get("failed")))
            if met:
                self.topology = replace(self.topology, hosts=tuple(json.loads(notes.get("hosts"))))
                return notes
        except dist.DistError:
            pass
        raise self.unreachable(f"rank 0 at {_address()} ended while the ranks met; see what it said, then start again")

    def differences(self, mine: Mapping[str, str], about: str = "run") -> str | None:
        """What one rank has otherwise than rank 0, in a sentence that all ranks return; None if there is nothing.

        A rank may leave out names. Only what rank 0 has travels, once to each rank, with two requests more. Ranks that
        compare again do so `about` something else.
        """
        topology = self.topology
        assert self._store is not None
        notes = dist.PrefixStore(about, self._store)
        if topology.is_main:
            notes.set("values", json.dumps(mine))
        self._wait_for(notes, "values")
        first = json.loads(notes.get("values"))
        for name in mine:
            if first.get(name) != mine[name]:
                me, main = topology.named([topology.rank]), topology.named([0])
                notes.compare_set("differs", "", f"{me} has {name}={mine[name]}, {main} has {first.get(name)}")
                break
        if notes.add("compared", 1) == topology.world_size:
            notes.set("all compared", "")
        self._wait_for(notes, "all compared")
        return notes.get("differs").decode() if notes.check(["differs"]) else None

    def _wait_for(self, notes: dist.Store, note: str) -> None:
        """Wait until there is a note that comes when every rank has done its part. Raises MoeLmError if one is lost."""
        heartbeat = self.heartbeat
        assert heartbeat is not None
        while not self._wait(lambda: notes.check([note]) or heartbeat.failure is not None, LISTEN_SECONDS):
            is_lost = heartbeat.notes_are_gone or bool(self.topology.is_main and heartbeat.roll_call())
            if is_lost and (heartbeat.notes_are_gone or not notes.check([note])):  # it may have come, and all have left
                raise self._loss()
        if heartbeat.failure is not None:
            raise _as_error(heartbeat.failure)

    def of_first(self, name: str, mine: str) -> str:
        """What rank 0 has, on every rank. Raises MoeLmError for what a rank has failed with, or if one is lost."""
        assert self._store is not None
        if self.topology.is_main:
            self._store.set(name, mine)
        self._wait_for(self._store, name)
        return str(self._store.get(name).decode())

    def raise_failure(self) -> None:
        """Raise MoeLmError if a rank has failed, or rank 0 has ended."""
        heartbeat = self.heartbeat
        if heartbeat is not None and heartbeat.failure is not None:
            raise _as_error(heartbeat.failure)

    def part(self) -> None:
        """End well: rank 0 keeps the notes until the others have parted too, or have gone."""
        self._linger()

    @contextmanager
    def lost_ranks_named(self) -> Iterator[None]:
        """Turn the back end's error about a lost rank into one sentence (MoeLmError), the same on every rank."""
        try:
            yield
        except RuntimeError as error:
            is_loss = isinstance(error, dist.DistError) or any(text in str(error) for text in LOST)
            if self.topology.world_size == 1 or not is_loss:
                raise
            raise self._loss() from error

    def fail(self, message: str, exit_code: int, common: bool = False) -> None:
        """Print why this rank ends, unless another rank prints it, and stay until the others have read it.

        Rank 0 prints what is `common` to all ranks.
        """
        topology = self.topology
        with self._speaking:  # the main thread and the watchdog's may fail at once
            if not self._has_spoken and (topology.is_main if common else self._must_print(message, exit_code)):
                name = "" if topology.is_main else f"rank {topology.rank} on {socket.gethostname()}: "
                print(f"{name}{message}", file=sys.stderr, flush=True)
            self._has_spoken = True
        self._linger()

    def _loss(self) -> MoeLmError:
        """The reason why a connection broke: the failure that a rank reported, else the ranks that give no sign.

        The first that notices calls the roll, and all that are left say the same.
        """
        self.is_ending = True
        heartbeat, lost = self.heartbeat, f"lost {self.topology.named([0])}, which has ended or does not answer; see "
        if heartbeat is None:
            return self.unreachable(f"{lost}what it said, then {GO_ON}")
        if heartbeat.failure is not None:  # whoever failed has seen that this rank knows, and has ended
            return _as_error(heartbeat.failure)
        with suppress(dist.DistError):
            if not self.is_first("loss"):
                wait_until(lambda: heartbeat.failure is not None or heartbeat.notes_are_gone, LISTEN_SECONDS + 2)
            silent = heartbeat.roll_call()
            if (failure := heartbeat.failure) is None and self.topology.rank not in silent:
                failure = self.report(lost_ranks(self.topology, silent, heartbeat.signs), MoeLmError.exit_code, silent)
            if failure is not None:
                return _as_error(failure)
        return self.unreachable(f"{lost}what it said, then {GO_ON}")

    def is_first(self, occasion: str) -> bool:
        """Whether this rank is the first to ask, so that the others can wait for it. Raises DistError."""
        assert self._store is not None
        mine = str(self.topology.rank).encode()
        return bool(self._store.compare_set(f"first/{occasion}", "", mine.decode()) == mine)

    def report(self, message: str, exit_code: int, gone: Sequence[int] = (), hung: bool = False) -> Failure:
        """End the meeting for all ranks but those that are `gone`; returns the first failure, which counts."""
        assert self._store is not None
        self._gone = gone or self._gone
        return Failure.of(self._store.compare_set("failed", "", json.dumps([message, exit_code, hung])))

    def unreachable(self, message: str) -> MoeLmError:
        """An error about which ranks cannot agree: one rank a host prints it, and rank 1 in place of rank 0."""
        self._unreachable = True
        return MoeLmError(message)

    def _must_print(self, message: str, exit_code: int) -> bool:
        """Report a failure to the other ranks; whether it falls to this one to print it: rank 0, else the first."""
        if self._unreachable:
            return self.topology.local_rank == 0 or self.topology.rank == 1
        message = message.removeprefix("error: ")  # the others raise it as an error of their own
        key = f"said/{hashlib.sha256(message.encode()).hexdigest()}"
        mine = str(self.topology.rank)
        try:
            notes = self._store or self._enter(FAILED_SECONDS)
            if not self.topology.is_main:
                self._wait(lambda: notes.check([key]), 1)
            speaks = notes.compare_set(key, "", mine) == mine.encode()
            self.report(message, exit_code)
            if speaks and not self.topology.is_main:
                speaks = notes.add("speakers", 1) <= MOST_SPEAKERS
        except (MoeLmError, dist.DistError):  # there is no rank 0 to agree with; it has said what all know
            known = None if self.heartbeat is None else self.heartbeat.failure
            return known is None or known.message != message
        return speaks

    def _linger(self) -> None:
        """As rank 0, which may keep the notes, wait until the other ranks have read why the run ends."""
        notes, topology = self._store, self.topology
        if notes is None:
            return
        seconds = LINGER_SECONDS if topology.hosts or self._gone else FAILED_SECONDS
        with suppress(dist.DistError):
            if topology.is_main:
                others = [rank for rank in range(1, topology.world_size) if rank not in self._gone]
                parted = [f"parted/{rank}" for rank in others]
                wait_until(lambda: notes.check(parted), seconds)
            else:
                notes.set(f"parted/{topology.rank}", "")
        # A process that ends while one of its threads speaks with the store may abort.
        self._over.set()
        if self._answering is not None:
            self._answering.join()
        if self.heartbeat is not None:
            self.heartbeat.stop()

    def _enter(self, seconds: float) -> dist.Store:
        """Connect to the store, and return the notes of this meeting."""
        topology, address, port = self.topology, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = None
        if topology.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _check_files(topology.world_size)
            listener = _listen(port)
        self._reach(address, port, seconds)
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
            arguments = (store.clone(), nonce, range(1, topology.world_size), self._over)  # type: ignore[attr-defined]
            self._answering = threading.Thread(target=_answer_knocks, args=arguments, daemon=True)
            self._answering.start()
            return self._meet(store, nonce)
        answer = f"moe-lm/answer/{topology.rank}/{nonce}"
        with suppress(dist.DistError):
            store.set(f"moe-lm/knock/{store.add('moe-lm/knocks', 1)}", f"{topology.rank}/{nonce}")
            if self._wait(lambda: store.check([answer]), seconds):
                return self._meet(store, store.get(answer).decode())
        raise self.unreachable(f"rank 0 at {_address()} does not answer; check that the launcher started it")

    def _meet(self, store: dist.Store, name: str) -> dist.Store:
        self._store_and_name = store, name
        self._store = self._connect()
        return self._notes_to_keep()

    def _notes_to_keep(self) -> dist.Store:
        """The notes for a process group. Not a clone: it so keeps the server when nobody keeps this object."""
        assert self._store_and_name is not None
        store, name = self._store_and_name
        return dist.PrefixStore(f"moe-lm/{name}", store)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Poll a condition that asks rank 0, the less often the more ranks there are."""
        return wait_until(condition, seconds, self._poll_seconds)

    def _connect(self) -> dist.Store:
        """The notes of this meeting, over a connection of their own: who waits in one does not hold up the others."""
        assert self._store_and_name is not None
        store, name = self._store_and_name
        return dist.PrefixStore(f"moe-lm/{name}", store.clone())  # type: ignore[attr-defined]

    def _reach(self, address: str, port: int, seconds: float) -> None:
        """Try until the store is there, without torch's warnings."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((address, port), max(1.0, deadline - time.monotonic())).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
            if time.monotonic() > deadline:
                advice = "check that it runs there, and that no firewall is in between"
                if self.topology.is_main:
                    advice = "this is rank 0: set MASTER_ADDR to its host"
                raise self.unreachable(
                    f"cannot reach rank 0 of {self.topology.world_size} at {_address()} within {seconds:g} s "
                    f"({reason}); {advice}"
                )
            time.sleep(POLL_SECONDS)


def _answer_knocks(store: dist.Store, name: str, ranks: Sequence[int], over: threading.Event) -> None:
    """Tell ranks that knock the name of the meeting, until each of them has written a note under it.

    Knocks are numbered: a poll costs two requests, however many ranks have yet to come.
    """
    here = [f"moe-lm/{name}/here/{rank}" for rank in ranks]
    seen, waiting = 0, list[str]()
    with suppress(dist.DistError):
        while not over.wait(POLL_SECONDS) and not store.check(here):
            number = store.add("moe-lm/knocks", 0)
            waiting += [f"moe-lm/knock/{knock}" for knock in range(seen + 1, number + 1)]
            seen = number
            for knock in [one for one in waiting if store.check([one])]:
                store.set(f"moe-lm/answer/{store.get(knock).decode()}", name)
                waiting.remove(knock)


def lost_ranks(topology: Topology, silent: Sequence[int], signs: Mapping[int, Sign]) -> str:
    """Why a connection broke: the ranks that give no sign of life."""
    if not silent:
        return f"the connection between the ranks broke, though all of them answer; check the network, then {GO_ON}"
    has, does, it = ("has", "does", "it") if len(silent) == 1 else ("have", "do", "they")
    gone = f"lost {topology.named(silent)}, which {has} ended or {does} not answer ({last_places(silent, signs)})"
    return f"{gone}; see what {it} said, then {GO_ON}"


def last_places(ranks: Sequence[int], signs: Mapping[int, Sign]) -> str:
    """`last: step 26, forward`"""
    places = dict.fromkeys(signs[rank].place for rank in ranks if rank in signs)
    return f"last: {' or '.join(places)}"


def _as_error(failure: Failure) -> MoeLmError:
    """The failure that a rank reported, as an error of this one."""
    return (UsageError if failure.exit_code == UsageError.exit_code else MoeLmError)(failure.message)


def _check_files(ranks: int) -> None:
    """Raise UsageError, before anybody waits, if rank 0 cannot keep as many connections as the ranks make."""
    needed, room = ranks * CONNECTIONS_OF_RANK + SPARE_FILES, open_files()
    if needed > room:
        raise UsageError(
            f"rank 0 of {ranks:,} needs {needed:,} connections and files, and may open {room:,}; raise the hard limit "
            "where it is started (ulimit -Hn; LimitNOFILE of systemd, --ulimit of a container)"
        )


def _listen(port: int) -> socket.socket:
    """A listening socket; if the port is taken, torch's own would print warnings and a stack of C++."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise MoeLmError(
            f"rank 0 cannot listen on port {port} ({error.strerror}); set MASTER_PORT to a free one"
        ) from error


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
