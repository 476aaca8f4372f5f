"""A request on its way: the texts that it asks for, and the inbox for what is written."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from moe_lm.generate.decode import Settings
from moe_lm.generate.text import Delta, Row
from moe_lm.tools.serve.errors import ApiError


class Job(NamedTuple):
    """One of the texts that a request asks for."""

    row: Row
    prompt: Sequence[int]
    settings: Settings
    stop_ids: Collection[int]


class Ticket:
    """The scheduler moves `waiting` jobs into the decoder; the event loop reads what they write with `next`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.rows = len(jobs)
        self.waiting = deque(jobs)
        self.running = 0  # in the decoder
        self._open = len(jobs)  # whose end was not read yet
        self._inbox: asyncio.Queue[list[Delta] | ApiError] = asyncio.Queue()

    def put(self, item: list[Delta] | ApiError) -> None:
        """Called in the event loop."""
        self._inbox.put_nowait(item)

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
        self._open -= sum(delta.finish is not None for delta in deltas)
        return deltas
