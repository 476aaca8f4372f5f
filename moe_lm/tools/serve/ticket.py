"""A request on its way: the rows that it wants, and what comes back to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_lm.generate.completion import Writer
from moe_lm.generate.decode import Settings, Step
from moe_lm.tools.serve.errors import ApiError


class Piece(NamedTuple):
    """What a step added to one of a request's texts; `start` is how many characters were there before."""

    row: int
    text: str
    start: int
    step: Step
    finish: str | None


@dataclass
class Row:
    """One text that a request wants; `start` counts its characters. The engine's thread alone writes in it."""

    index: int
    prompt: Sequence[int]
    settings: Settings
    stop_ids: Collection[int]
    writer: Writer
    prefix: str = ""  # comes before the text: an echo of the prompt
    start: int = 0

    def take(self, step: Step) -> Piece:
        """The stop strings may end the row before the decoder does."""
        text = self.prefix if self.start == 0 else ""
        if step.token is not None:
            text += self.writer.push(step.token)
        if step.finish is not None and not self.writer.stopped:
            text += self.writer.end()
        finish = "stop" if self.writer.stopped else step.finish
        piece = Piece(self.index, text, self.start, step, finish)
        self.start += len(text)
        return piece


class Ticket:
    """The engine moves `waiting` rows into the decoder; the event loop reads what they give with `next`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = len(rows)
        self.waiting = deque(rows)
        self.running = 0  # in the decoder
        self._open = len(rows)  # that have not come back whole
        self._inbox: asyncio.Queue[list[Piece] | ApiError] = asyncio.Queue()

    def put(self, item: list[Piece] | ApiError) -> None:
        """In the event loop."""
        self._inbox.put_nowait(item)

    async def next(self) -> list[Piece]:
        """What was written since the last time; nothing when all texts are whole. Raises the ApiError that ended it."""
        if not self._open:
            return []
        pieces: list[Piece] = []
        while not pieces or not self._inbox.empty():
            item = await self._inbox.get()
            if isinstance(item, ApiError):
                raise item
            pieces += item
        self._open -= sum(piece.finish is not None for piece in pieces)
        return pieces
