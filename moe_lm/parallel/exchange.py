"""The exchanges of a step that make a rank wait for others, and the time that this rank works between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.parallel.heartbeat import Place
from moe_lm.parallel.process_group import all_reduce_sum

Mark = float | torch.cuda.Event


class Exchange:
    """Sums over the ranks, and a stopwatch of this rank's own work that stands still while it waits for others."""

    def __init__(self, device: torch.device) -> None:
        self.place = Place()  # where this rank is, for those who wait for it
        self._device = device
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._spans: list[tuple[Mark, Mark, int]] = []  # the sign: 1 is work, -1 is waiting within work
        self._began: Mark | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        with self.waiting():
            return all_reduce_sum(tensor)

    def gather(self, *values: float) -> list[list[float]]:
        """Of each value, that of every rank."""
        found = torch.zeros(len(values), dist.get_world_size(), dtype=torch.float64)
        found[:, dist.get_rank()] = torch.tensor(values, dtype=torch.float64)
        everywhere: list[list[float]] = self.sum(found.to(self._device)).tolist()
        return everywhere

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for other ranks."""
        before = self.place.phase
        self.place.at("exchange")
        # Only within work: activation checkpointing repeats the forward pass in the backward pass, which is not timed.
        started = None if self._began is None else self._mark()
        try:
            yield
        finally:
            if started is not None:
                self._spans.append((started, self._mark(), -1))
            self.place.at(before)

    def fetch(self, tensor: Tensor, filled: dist.Work) -> Callable[[], Tensor]:
        """A tensor that an exchange fills, for the host: call the result to wait for it.

        What the exchange reads lies in the same memory, which is held until then. On CUDA it is copied beside what is
        computed, so that the wait is not for what was queued since.
        """
        if self._side is None:

            def read() -> Tensor:
                filled.wait()
                return tensor

            return read
        with torch.cuda.stream(self._side):
            filled.wait()
            copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
            copied = self._side.record_event()

        def read_copy(_: Tensor = tensor) -> Tensor:  # which stays until it is copied
            copied.synchronize()
            return copy

        return read_copy

    def mark(self) -> torch.cuda.Event | None:
        """A mark behind all that is queued on the device by now."""
        return None if self._side is None else torch.cuda.current_stream().record_event()

    @contextmanager
    def beside(self, mark: torch.cuda.Event | None = None) -> Iterator[None]:
        """Queue work that needs what lies before the mark, and does not wait for what was queued behind it."""
        if self._side is None:
            yield
            return
        if mark is not None:
            self._side.wait_event(mark)
        with torch.cuda.stream(self._side):
            yield

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Let what is queued from now on wait for the work beside it, which made these tensors."""
        if self._side is None:
            return
        main = torch.cuda.current_stream()
        main.wait_stream(self._side)
        for tensor in tensors:
            tensor.record_stream(main)

    def begin_work(self) -> None:
        self._began = self._mark()

    def end_work(self) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._mark(), 1))
        self._began = None

    def take_seconds(self) -> float:
        """Seconds of this rank's own work since the last call."""
        seconds = sum(sign * self._seconds(begin, end) for begin, end, sign in self._spans)
        self._spans.clear()
        return seconds

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Mark, end: Mark) -> float:
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begin.elapsed_time(end) / 1000
