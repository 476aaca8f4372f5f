"""A string that knows who wrote each of its characters, through whatever a chat template does with it.

An author is one character, so the authors of a string are a string of the same length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

TEMPLATE = "\0"  # the author of the template's own text


class Traced(str):
    """A string with authors. Its methods return traced strings; it compares and searches like any other string."""

    authors: str

    def __new__(cls, text: str, authors: str | None = None) -> Traced:
        self = super().__new__(cls, text)
        self.authors = authors_of(text) if authors is None else authors
        return self

    def __str__(self) -> Traced:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        return Traced(super().__getitem__(key), self.authors[key])

    def __iter__(self) -> Iterator[Traced]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: str) -> Traced:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Traced:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Traced:
        return Traced(super().__mul__(times), self.authors * times)

    __rmul__ = __mul__

    def lstrip(self, chars: str | None = None) -> Traced:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> Traced:
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None) -> Traced:
        return self.rstrip(chars).lstrip(chars)

    def removeprefix(self, prefix: str) -> Traced:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> Traced:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._cut(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._cut(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Traced]:  # type: ignore[override]
        return self._cut(super().splitlines(keepends))

    def partition(self, sep: str) -> tuple[Traced, Traced, Traced]:
        return self._in_three(super().partition(sep))

    def rpartition(self, sep: str) -> tuple[Traced, Traced, Traced]:
        return self._in_three(super().rpartition(sep))

    def join(self, texts: Iterable[str]) -> Traced:
        pieces: list[str] = []
        for text in texts:
            pieces += [self, text] if pieces else [text]
        return concat(pieces)

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Traced:
        """Text that is not traced gets the author of what it replaces."""
        if not old:
            text = super().replace(old, new, count)
            return Traced(text, (self.authors[:1] or TEMPLATE) * len(text))
        done, pieces, limit = 0, list[str](), int(count)
        while (start := self.find(old, done)) >= 0 and (limit < 0 or len(pieces) < 2 * limit):
            inserted = new if isinstance(new, Traced) else Traced(new, self.authors[start] * len(new))
            pieces += [self[done:start], inserted]
            done = start + len(old)
        return concat([*pieces, self[done:]])

    def lower(self) -> Traced:
        return self._by_character([character.lower() for character in str.__str__(self)])

    def upper(self) -> Traced:
        return self._by_character([character.upper() for character in str.__str__(self)])

    def capitalize(self) -> Traced:
        return self[:1].title() + self[1:].lower()

    def title(self) -> Traced:
        text = str.__str__(self)
        in_word = (before.isupper() or before.islower() or before.istitle() for before in " " + text)
        return self._by_character(
            [letter.lower() if within else letter.title() for letter, within in zip(text, in_word, strict=False)]
        )

    def _by_character(self, texts: list[str]) -> Traced:
        """The new text of each character, which may be several characters, by its author."""
        authors = (author * len(text) for text, author in zip(texts, self.authors, strict=True))
        return Traced("".join(texts), "".join(authors))

    def _cut(self, pieces: list[str], separator: str | None = None) -> list[Traced]:
        """The pieces with their authors. They are in order, with the separator or white space between them."""
        result, done = list[Traced](), 0
        for piece in pieces:
            start = self.find(piece, done) if separator is None else done + len(separator) * bool(result)
            done = start + len(piece)
            result.append(self[start:done])
        return result

    def _in_three(self, pieces: tuple[str, str, str]) -> tuple[Traced, Traced, Traced]:
        first, second = len(pieces[0]), len(pieces[0]) + len(pieces[1])
        return self[:first], self[first:second], self[second:]


def concat(values: Iterable[Any]) -> Traced:
    """`"".join(map(str, values))` with the authors of all values."""
    texts = [str(value) for value in values]
    return Traced("".join(texts), "".join(map(authors_of, texts)))


def authors_of(text: str) -> str:
    """The authors of a text: its own when it is traced, else the template."""
    return text.authors if isinstance(text, Traced) else TEMPLATE * len(text)


def traced(value: Any, author: str) -> Any:
    """A copy of nested lists and objects in which every string, keys included, has this author."""
    if isinstance(value, str):
        return Traced(value, author * len(value))
    if isinstance(value, dict):
        return {traced(key, author): traced(item, author) for key, item in value.items()}
    return [traced(item, author) for item in value] if isinstance(value, list) else value


def first_author(value: Any) -> str | None:
    """The author of the first string in nested lists and objects that has one, other than the template."""
    if isinstance(value, Traced):
        return value.authors[:1] or None
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple):
        return next((author for item in value if (author := first_author(item)) not in (None, TEMPLATE)), None)
    return None
