"""Text out of tokens while they are still being chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from moe_lm.errors import UsageError

UNFINISHED = "\ufffd"  # what the bytes of a character decode to before its last one has come


class Completion(Iterator[str]):
    """A text as it is written: iterate over its pieces, which together are the whole text.

    A piece never ends within a character; one that the last token leaves unfinished is dropped. The text ends before
    the first stop string to be complete, and no part of a stop string is ever shown. `decode` turns ids into text
    byte by byte, as byte-level tokenizers do. Raises UsageError for an empty stop string.
    """

    def __init__(self, tokens: Iterable[int], decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty, which ends every text before it begins; leave it out")
        self.tokens = 0  # tokens chosen so far
        self._decode = decode
        self._stop = tuple(stop)
        self._pieces = self._before_stop(self._whole_characters(tokens))

    def __next__(self) -> str:
        return next(self._pieces)

    def _whole_characters(self, tokens: Iterable[int]) -> Iterator[str]:
        ids: list[int] = []  # not all shown yet
        shown = 0  # characters of theirs
        for token in tokens:
            self.tokens += 1
            ids.append(token)
            text = self._decode(ids)
            # Of bytes that are not UTF-8, only the last ones can still become a character.
            whole = text.removesuffix(UNFINISHED)
            if len(whole) > shown:
                yield whole[shown:]
                shown = len(whole)
            if whole == text:
                ids, shown = [], 0

    def _before_stop(self, pieces: Iterable[str]) -> Iterator[str]:
        held = ""  # may be the beginning of a stop string
        for piece in pieces:
            held += piece
            found = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
            if found:
                _, start = min(found)
                if start:
                    yield held[:start]
                return
            safe = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
            if safe:
                yield held[:safe]
                held = held[safe:]
        if held:
            yield held


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that `stop` begins with."""
    sizes = range(min(len(text), len(stop)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
