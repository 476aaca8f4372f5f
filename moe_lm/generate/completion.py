"""Text out of tokens while they are still being chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from moe_lm.common.errors import UsageError

UNFINISHED = "\ufffd"  # what the bytes of a character decode to before its last one has come


class Writer:
    """A text whose tokens are pushed one at a time; each push gives the piece that it adds.

    A piece never ends within a character; one that the last token leaves unfinished is dropped. The text ends before
    the first stop string to be complete, and no part of a stop string is ever given. `decode` turns ids into text
    byte by byte, as byte-level tokenizers do. Raises UsageError for an empty stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty, which ends every text before it begins; leave it out")
        self.stopped = False  # at a stop string
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []  # not all given yet
        self._shown = 0  # characters of theirs
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        # Of bytes that are not UTF-8, only the last ones can still become a character.
        whole = text.removesuffix(UNFINISHED)
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if whole == text:
            self._ids, self._shown = [], 0
        return self._before_stop(piece)

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        held, self._held = self._held, ""
        return held

    def _before_stop(self, piece: str) -> str:
        held = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        safe = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[safe:]
        return held[:safe]


class Completion(Iterator[str]):
    """A text as it is written: iterate over its pieces, which together are the whole text; see `Writer`."""

    def __init__(self, tokens: Iterable[int], decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.tokens = 0  # tokens chosen so far
        self._clock: list[tuple[float, int]] = []  # when pieces came, and the tokens until then
        self._pieces = self._write(tokens, Writer(decode, stop))

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._clock = [*self._clock[:1], (time.perf_counter(), self.tokens)]
        return piece

    @property
    def speed(self) -> float | None:
        """Tokens/s after the first piece, which waits for what is slow once; None until there are two."""
        if len(self._clock) < 2:
            return None
        (begun, before), (ended, tokens) = self._clock
        return (tokens - before) / max(ended - begun, 1e-9)

    def _write(self, tokens: Iterable[int], writer: Writer) -> Iterator[str]:
        for token in tokens:
            self.tokens += 1
            if piece := writer.push(token):
                yield piece
            if writer.stopped:
                return
        if piece := writer.end():
            yield piece


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that `stop` begins with."""
    sizes = range(min(len(text), len(stop)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
