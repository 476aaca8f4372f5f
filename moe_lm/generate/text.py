"""Text out of tokens while they are still being chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe_lm.common.errors import UsageError
from moe_lm.generate.decode import Step

UNFINISHED = "\ufffd"  # the bytes of a character decode to this before its last byte has come


class Delta(NamedTuple):
    """The text that a step added to a row, which may be empty.

    `start` counts the row's characters before it. `finish` says why the row has ended, None while it goes on: the
    decoder's reason (`Step.finish`), or "stop" at a stop string.
    """

    row: int
    text: str
    start: int
    step: Step
    finish: str | None


class Row:
    """One text while it is written: takes the decoder's steps and gives the text that each of them adds.

    Text never ends within a character; a character that the last token leaves unfinished is dropped. The text ends
    before the first stop string to be complete, and no part of a stop string is ever given. `decode` turns ids into
    text byte by byte, as byte-level tokenizers do. `prefix` comes before the first delta's own text. Raises UsageError
    for an empty stop string.
    """

    def __init__(
        self, index: int, decode: Callable[[list[int]], str], stop: Sequence[str] = (), prefix: str = ""
    ) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty, which ends every text before it begins; leave it out")
        self.index = index
        self._decode, self._stop, self._prefix = decode, tuple(stop), prefix
        self._start = 0  # characters that were given
        self._ids: list[int] = []  # whose text is not complete yet
        self._shown = 0  # characters of theirs that were given
        self._held = ""  # may be the beginning of a stop string
        self._stopped = False  # at a stop string

    def take(self, step: Step) -> Delta:
        """Add a step. The delta can have a `finish` where the step has none: at a stop string."""
        text = self._prefix if self._start == 0 else ""
        if step.token is not None:
            text += self._before_stop(self._completed_by(step.token))
        if step.finish is not None and not self._stopped:
            text += self._held
        delta = Delta(self.index, text, self._start, step, "stop" if self._stopped else step.finish)
        self._start += len(text)
        return delta

    def _completed_by(self, token: int) -> str:
        """The characters whose last byte comes with a token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Of bytes that are not UTF-8, only the last ones can still become a character.
        whole = text.removesuffix(UNFINISHED)
        added = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if whole == text:
            self._ids, self._shown = [], 0
        return added

    def _before_stop(self, added: str) -> str:
        held = self._held + added
        found = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        if found:
            self._stopped = True
            return held[: min(found)[1]]
        safe = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[safe:]
        return held[:safe]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    sizes = range(min(len(text), len(stop)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class Speed:
    """The number of tokens, and tokens/s after the first one, which waits for whatever is slow only once."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finish: str | None = None  # why the last text ended
        self._first = self._last = 0.0

    def see(self, delta: Delta) -> None:
        self.finish = delta.finish or self.finish
        if delta.step.token is None:
            return
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens += 1

    def __str__(self) -> str:
        if self.tokens < 2:
            return f"{self.tokens} tokens"
        return f"{self.tokens} tokens, {(self.tokens - 1) / max(self._last - self._first, 1e-9):.1f} tokens/s"
