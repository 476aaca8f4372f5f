"""Who is named when the ranks wait: those without a sign of life, those behind, those outside a collective."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist

from moe_lm.common.errors import UsageError
from moe_lm.parallel import process_group
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.heartbeat import Heartbeat, Place, Sign
from moe_lm.parallel.meeting import Meeting, lost_ranks
from moe_lm.parallel.topology import Topology
from moe_lm.parallel.watch import Watchdog, who_hangs

BEAT = 0.33
HOSTS = Topology(0, 4, hosts=("a", "a", "b", "b"))


def signs(*places: tuple[str, int, bool]) -> dict[int, Sign]:
    return {
        rank: Sign(9, f"step 26, {phase}", phase, moves, waits) for rank, (phase, moves, waits) in enumerate(places)
    }


WAITING = ("exchange", 101, True)


@pytest.mark.parametrize(
    ("silent", "places", "said"),
    [
        (
            [3], [WAITING, WAITING, WAITING, ("forward", 100, False)],
            "rank 3 on b has not moved for 15 s (last: step 26, forward); it or its host stands still",
        ),
        (
            [1, 2], [WAITING, ("forward", 100, False), ("reading", 99, False), WAITING],
            "ranks 1 and 2 on a, b have not moved for 15 s (last: step 26, forward or step 26, reading); see their",
        ),
        (
            [], [WAITING, ("backward", 100, True), WAITING, WAITING],
            "rank 1 on a has not moved for 15 s (last: step 26, backward); see its stacks",
        ),
        (
            [], [("backward", 100, True), ("backward", 100, True), ("backward", 100, False), ("backward", 100, True)],
            "rank 2 on b has not moved for 15 s (last: step 26, backward); see its stacks",
        ),
        (
            [], [WAITING] * 4,
            "no rank has moved for 15 s, and none is behind the others (last: step 26, exchange); see the stacks",
        ),
    ],
)  # fmt: skip
def test_the_one_who_hangs_is_named(silent: list[int], places: list[tuple[str, int, bool]], said: str) -> None:
    assert who_hangs(HOSTS, 15, silent, signs(*places)).startswith(said)


def test_an_error_leaves_no_rank_at_a_place_where_it_is_not() -> None:
    """As a save that fails, after which training goes on: `saving` would be waited for ten times as long."""

    class Met:
        class heartbeat:  # noqa: N801
            place = Place()

    place, exchange = Met.heartbeat.place, Exchange(torch.device("cpu"))
    watchdog = Watchdog(1, cast("Meeting", Met))
    watchdog.follow(exchange)
    place.at("after the step", 5)
    for block in (watchdog.patiently("saving"), exchange.waiting()):
        with suppress(OSError), block:
            raise OSError
        assert str(place) == "step 5, after the step"


def test_only_ranks_without_a_sign_are_lost() -> None:
    places = signs(WAITING, WAITING, WAITING, ("reading", 100, False))
    assert lost_ranks(HOSTS, [3], places).startswith(
        "lost rank 3 on b, which has ended or does not answer (last: step 26, reading); see what it said, then run"
    )
    assert "lost ranks 2 and 3 on b, which have ended or do not answer" in lost_ranks(HOSTS, [2, 3], places)
    assert lost_ranks(HOSTS, [], places).startswith("the connection between the ranks broke, though all of them answer")


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs come three times as often as in a run."""
    monkeypatch.setattr("moe_lm.parallel.heartbeat.BEAT_SECONDS", BEAT)
    monkeypatch.setattr("moe_lm.parallel.heartbeat.LISTEN_SECONDS", 4 * BEAT)


@pytest.mark.usefixtures("_soon")
def test_a_rank_that_waits_gives_signs_of_life_and_one_that_has_ended_does_not() -> None:
    notes = dist.HashStore()
    ranks = [Heartbeat(notes, rank, 3) for rank in range(3)]
    ranks[2].stop()
    ranks[1].place.at("forward", 7)
    time.sleep(2 * BEAT)  # this thread, the main one of all, does nothing
    assert ranks[0].roll_call() == [2]
    assert ranks[0].signs[1].place == "step 7, forward"
    for rank in ranks:
        rank.stop()


def test_nccls_flight_recorder_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_FR_BUFFER_SIZE": "7"})
    process_group.record_flight(tmp_path / "logs")
    prefix = f"{tmp_path}/logs/nccl_trace_rank_"
    assert os.environ == {
        "TORCH_FR_BUFFER_SIZE": "7",  # what a person has set
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
    }


@pytest.mark.usefixtures("_soon")
def test_a_long_step_is_waited_for_while_it_moves_and_compiles_and_a_hang_within_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each micro-batch is a move; what torch compiles in one may take ten times as long."""
    heartbeat = Heartbeat(dist.HashStore(), 0, 1)
    meeting = Meeting(Topology(0, 1, hosts=("a",)))
    meeting.heartbeat, meeting._store = heartbeat, heartbeat._notes
    ends: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, meeting, failure: ends.append(failure.message))
    exchange, seconds = Exchange(torch.device("cpu")), 0.7
    torch.compile(lambda x: x - 1, backend="eager")(torch.zeros(2))  # imports what compiling needs
    with Watchdog(seconds, meeting) as watchdog:
        watchdog.follow(exchange)
        exchange.place.at("forward", 1)

        def slowly(graph: object, _: object) -> object:
            assert str(exchange.place) == "step 1, compiling"
            time.sleep(2 * seconds)
            return graph

        assert torch.compile(lambda x: x + 1, backend=slowly)(torch.zeros(2)).tolist() == [1, 1]
        assert str(exchange.place) == "step 1, forward"
        for _ in range(3):
            time.sleep(seconds / 2)
            exchange.place.at("forward")
        assert not ends
        wait = time.monotonic() + 20
        while not ends and time.monotonic() < wait:
            time.sleep(0.05)
    heartbeat.stop()
    assert ends[0].startswith("no rank has moved for 0.7 s, and none is behind the others (last: step 1, forward)")


def test_rank_0_says_before_the_meeting_that_it_may_not_open_enough_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.parallel.meeting.open_files", lambda: 1000)
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    with pytest.raises(UsageError, match=r"rank 0 of 512 needs 2,176 connections and files, and may open 1,000; raise"):
        Meeting(Topology(0, 512)).assemble(1)
