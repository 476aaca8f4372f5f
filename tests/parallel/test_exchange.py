"""The side stream of an exchange, without CUDA: what is held, and where time is taken.

On a GPU the numbers are tested (test_expert_parallel.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.expert_parallel import AllToAllDispatcher
from tests.parallel.test_expert_parallel import group, layer
from tests.tiny import random

__all__ = ["group"]


class Device:
    """Two streams that note what they are given; all of it is computed at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = self.main = Stream(self, "main")
        self.side = Stream(self, "side")
        monkeypatch.setattr("torch.cuda.stream", self.within)
        monkeypatch.setattr("torch.cuda.current_stream", lambda: self.current)
        monkeypatch.setattr("torch.cuda.Event", lambda **_: Event(self))
        monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def exchange(self) -> Exchange:
        exchange: Any = Exchange(torch.device("cpu"))
        exchange._device, exchange._side = torch.device("cuda"), self.side
        return exchange


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self._device.events.append(f"mark on {self._device.current.name}")

    def synchronize(self) -> None:
        self._device.events.append("the host waits")


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self._device, self.name = device, name

    def record_event(self) -> Event:
        return Event(self._device)

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        self._device.events.append(f"{self.name} waits for {other.name}")


class Done:
    """An exchange that is over; after `wait` the library holds none of its tensors."""

    def wait(self) -> None:
        pass


def test_counts_are_held_until_the_exchange_that_reads_them_is_over(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side stream waits for the exchange, and the main stream would take memory that is free."""
    read: list[StorageWeakRef] = []

    def exchange(output: Tensor, tensor: Tensor, **_: Any) -> Done:
        read.append(StorageWeakRef(tensor.untyped_storage()))
        output.copy_(tensor)
        return Done()

    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    dispatcher = AllToAllDispatcher(group, Device(monkeypatch).exchange())
    read_counts = dispatcher.exchange_counts(torch.tensor([[5, 7]]))
    assert not read[0].expired()
    assert read_counts().tolist() == [[[5, 7]], [[5, 7]]]
    del read_counts
    assert read[0].expired()


def test_waiting_is_what_the_main_stream_waits(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the side stream waits meanwhile, behind which the shared experts are computed."""
    device, moe = Device(monkeypatch), layer()
    exchange = device.exchange()
    moe.dispatcher = AllToAllDispatcher(group, exchange)
    exchange.begin_work()
    moe(random(2, 7, 32))
    exchange.end_work()
    mark, wait = "mark on main", "main waits for side"
    assert device.events == [mark, mark, "the host waits", mark, mark, wait, mark, mark, wait, mark, mark]
