"""Continuous batching: one thread drives one decoder, and requests, each a ticket, take turns for its rows."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from moe_lm.common.errors import MoeLmError
from moe_lm.generate.decode import Settings, Step
from moe_lm.generate.session import Session
from moe_lm.generate.text import Delta, Row
from moe_lm.tools.serve.errors import ApiError
from moe_lm.tools.serve.metrics import Metrics

log = logging.getLogger("moe_lm.serve")
# What may wait for a client that does not read: a token counts for 8 values, and for its log-probabilities and experts.
MOST_UNREAD = 1 << 15  # values, about 3 MB


class Job(NamedTuple):
    """One of the texts that a request asks for."""

    row: Row
    prompt: Sequence[int]
    settings: Settings
    stop_ids: Collection[int]


class Ticket:
    """A request on its way: the texts that it asks for, and the inbox for what is written.

    The scheduler moves `waiting` jobs into the decoder; the event loop reads what they write with `next`. When more
    than MOST_UNREAD values wait to be read, `overflow` is called.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.rows = len(jobs)
        self.waiting = deque(jobs)
        self.running = 0  # in the decoder
        self._open = len(jobs)  # whose end was not read yet
        self._inbox: asyncio.Queue[list[Delta] | ApiError] = asyncio.Queue()
        self._unread = 0  # values
        self.overflow: Callable[[], None] = lambda: None

    def put(self, item: list[Delta] | ApiError) -> None:
        """Called in the event loop."""
        self._inbox.put_nowait(item)
        if not isinstance(item, ApiError):
            self._unread += sum(_values(delta.step) for delta in item)
            if self._unread > MOST_UNREAD:
                self.overflow()

    async def next(self) -> list[Delta]:
        """The deltas since the last call; none once all texts have ended. Raises the ApiError that ended the ticket."""
        if not self._open:
            return []
        deltas: list[Delta] = []
        while not deltas or not self._inbox.empty():
            item = await self._inbox.get()
            if isinstance(item, ApiError):
                raise item
            deltas += item
        self._unread = 0
        self._open -= sum(delta.finish is not None for delta in deltas)
        return deltas


class Scheduler:
    """Writes the texts of tickets, `slots` at a time; at most `max_queue` texts wait.

    A free row goes to the ticket that has the fewest rows, and among equals to the earliest. So requests for one text
    are served in order, and a request for a hundred texts leaves room for the others.
    Raises MoeLmError when a cache of `slots` rows of `capacity` positions does not fit into memory.
    """

    def __init__(self, session: Session, slots: int, capacity: int, max_queue: int, metrics: Metrics) -> None:
        try:
            self._decoder = session.decoder(slots, capacity)
        except RuntimeError as error:  # torch's allocators raise nothing more special
            raise MoeLmError(
                f"a cache of {slots} rows of {capacity} positions does not fit into memory "
                f"({str(error).splitlines()[0]}); give a smaller --max-concurrent or --max-context"
            ) from error
        self.slots, self.capacity, self.max_queue, self._metrics = slots, capacity, max_queue, metrics
        self._bos_id = session.tokenizer.bos_id
        self._wake = threading.Condition()
        self._waiting: list[Ticket] = []  # with texts to start, in the order in which they came
        self._left: list[Ticket] = []  # whose rows the thread still has to free
        self._working: dict[int, tuple[Ticket, Job]] = {}  # by the decoder's number; changed only by the thread
        self._refusing = self._closed = False
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)

    def warm_up(self) -> None:
        """Write short texts, one alone and two side by side: the first steps import parts of torch, or compile.

        Raises MoeLmError when that fails.
        """
        for together in (1, min(2, self.slots)):
            for _ in range(together):
                self._decoder.add([self._bos_id], Settings(max_new_tokens=2))
            for _ in self._decoder.run():
                pass

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; `loop` is the event loop in which tickets are read."""
        self._loop = loop
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return not self._refusing

    @property
    def running(self) -> int:
        """The number of texts that are being written."""
        return len(self._working)

    @property
    def queued(self) -> int:
        """The number of texts that wait for a row."""
        return sum(len(ticket.waiting) for ticket in self._waiting)

    @property
    def most(self) -> int:
        """The number of texts that can be here at a time."""
        return self.slots + self.max_queue

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket. Raises ApiError when the queue is full or the server is stopping."""
        with self._wake:
            if not self.healthy:
                raise stopping()
            if self.running + self.queued + ticket.rows > self.most:
                raise ApiError(
                    429,
                    f"the queue is full ({self.queued} texts wait, at most {self.max_queue} may); try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self._waiting.append(ticket)
            self._wake.notify()

    def leave(self, ticket: Ticket) -> None:
        """Drop the texts of a ticket that have not ended."""
        with self._wake:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if ticket.running:
                self._left.append(ticket)
                self._wake.notify()

    def refuse(self) -> None:
        """Take no more tickets; those that are here go on."""
        with self._wake:
            self._refusing = True

    def close(self) -> None:
        """End every ticket, and the thread."""
        with self._wake:
            self._refusing = self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while not self._closed:
                try:
                    if self._take_in():
                        self._give(self._decoder.step())
                except Exception as error:  # nobody knows which of the rows made the step fail
                    self._drop(_told(error), self._at_work())
        finally:  # also when the decoder cannot go on: nobody must wait for it
            self.refuse()
            self._drop(stopping(), [*self._waiting, *self._at_work()])

    def _take_in(self) -> bool:
        """Wait for work and fill the free rows. Returns False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._working or self._left or self._closed)
            for number, (ticket, _) in list(self._working.items()):
                if ticket in self._left:
                    self._end(number)
            self._left.clear()
            while self._waiting and self.running < self.slots:
                ticket = min(self._waiting, key=lambda ticket: ticket.running)
                job = ticket.waiting[0]
                try:
                    number = self._decoder.add(job.prompt, job.settings, job.stop_ids)
                except Exception as error:  # only this ticket's
                    self.leave(ticket)
                    self._tell({ticket: _told(error)})
                    continue
                ticket.waiting.popleft()
                if not ticket.waiting:
                    self._waiting.remove(ticket)
                self._working[number] = ticket, job
                ticket.running += 1
            return not self._closed

    def _give(self, steps: Sequence[Step]) -> None:
        """Send the texts of a step to their tickets."""
        news: dict[Ticket, list[Delta]] = {}
        for step in steps:
            ticket, job = self._working[step.request]
            delta = job.row.take(step)
            news.setdefault(ticket, []).append(delta)
            if delta.finish is not None:
                self._end(step.request)
        self._metrics.wrote(sum(step.token is not None for step in steps))
        self._tell(news)

    def _end(self, number: int) -> None:
        ticket, _ = self._working.pop(number)
        ticket.running -= 1
        self._decoder.cancel(number)  # does nothing when the decoder has ended it

    def _at_work(self) -> list[Ticket]:
        return list({ticket: None for ticket, _ in self._working.values()})

    def _drop(self, error: ApiError, tickets: Sequence[Ticket]) -> None:
        """End these tickets, among which are all that have rows."""
        for ticket in tickets:
            ticket.running = 0
        self._working.clear()
        with self._wake:
            self._waiting = [ticket for ticket in self._waiting if ticket not in tickets]
        self._tell(dict.fromkeys(tickets, error))
        self._decoder.clear()  # last: it may fail too

    def _tell(self, news: dict[Ticket, list[Delta]] | dict[Ticket, ApiError]) -> None:
        def put() -> None:
            for ticket, item in news.items():
                ticket.put(item)

        self._loop.call_soon_threadsafe(put)


def _values(step: Step) -> int:
    return 8 + len(step.alternatives) + sum(map(len, step.experts or ()))


def _told(error: Exception) -> ApiError:
    """Log an error. Returns it as the client is told."""
    if isinstance(error, MoeLmError):
        log.error("%s", error)
        message = str(error)
    else:
        log.error("a decoding step failed", exc_info=error)
        message = "the model failed; the server's log says why"
    return ApiError(500, message, code="model_error")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping; try again later", code="stopping", headers={"Retry-After": "10"})
