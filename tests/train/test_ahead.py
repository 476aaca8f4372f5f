"""Batches are read ahead: the same ones, at most one step early, with errors where they belong, and no thread left."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from moe_lm.common.errors import MoeLmError
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.train.ahead import Ahead
from moe_lm.train.loop import local_micro_batches
from tests.loops import LoopRun

CPU = torch.device("cpu")


class Noting:
    """A source that notes the steps that are read, and by which thread; it may take its time, or fail."""

    fingerprint = "noting"

    def __init__(self, source: BatchSource, broken: int = -1, seconds: float = 0.0) -> None:
        self.source, self.broken, self.seconds = source, broken, seconds
        self.steps: list[int] = []
        self.threads: set[int] = set()

    def read(self, step: int) -> list[Batch]:
        self.steps.append(step)
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if step == self.broken:
            raise MoeLmError("the disk is gone; put it back")
        return [self.source.batch(step, range(4))]

    def batch(self, step: int, rows: range) -> Batch:
        return self.read(step)[0]


def test_the_next_step_is_read_by_one_thread_while_this_one_runs(ragged: BatchSource) -> None:
    noting = Noting(ragged, seconds=0.02)
    with Ahead(noting.read, CPU) as ahead:
        for step in range(4):
            [batch] = ahead.take(step, last=3).micro_batches
            assert torch.equal(batch.input_ids, ragged.batch(step, range(4)).input_ids)
            ahead.forget()  # once it is read
            assert noting.steps == [number for first in range(step + 1) for number in (first, first + 1) if number < 4]
    assert len(noting.threads) == 1
    assert threading.get_ident() not in noting.threads
    assert not any(thread.name == "reading ahead" for thread in threading.enumerate())


def test_losses_are_to_the_bit_those_of_batches_that_each_step_reads_itself(
    ragged: BatchSource, tmp_path: Path
) -> None:
    run = LoopRun(tmp_path, ragged, validation=[], micro_batch_size=2, scheduled_sampling={"share": 0.5})
    run()
    engine = run.build()
    batches = (local_micro_batches(engine, ragged, run.config, step) for step in range(6))
    assert [line["loss"] for line in run.records] == [
        engine.train_step(step, each).loss for step, each in enumerate(batches)
    ]


def test_only_the_step_that_was_read_is_taken(ragged: BatchSource) -> None:
    noting = Noting(ragged)
    with Ahead(noting.read, CPU) as ahead:
        ahead.take(0, last=9)
        [batch] = ahead.take(5, last=9).micro_batches
    assert torch.equal(batch.input_ids, ragged.batch(5, range(4)).input_ids)
    assert noting.steps[:3] == [0, 1, 5]


def test_an_error_is_raised_by_the_step_that_needs_it(ragged: BatchSource, tmp_path: Path) -> None:
    with Ahead(Noting(ragged, broken=1).read, CPU) as ahead:
        ahead.take(0, last=9)
        ahead.forget()
        ahead.take(2, last=9)
        with pytest.raises(MoeLmError, match="the disk is gone; put it back"):
            ahead.take(1, last=9)
    run = LoopRun(tmp_path, Noting(ragged, broken=3), validation=[])
    with pytest.raises(MoeLmError, match="the disk is gone; put it back"):
        run()
    assert run.steps == [1, 2, 3]
    assert not any(thread.name == "reading ahead" for thread in threading.enumerate())


def test_the_time_that_a_step_waits_is_less_than_that_of_reading(ragged: BatchSource, tmp_path: Path) -> None:
    run = LoopRun(tmp_path, Noting(ragged, seconds=0.02), validation=[])
    run()
    assert all(record["reading_seconds"] >= 0.02 for record in run.records)
    assert all(record["data_seconds"] < record["seconds"] for record in run.records)
    assert all(record["data_seconds"] < record["reading_seconds"] for record in run.records[1:])
