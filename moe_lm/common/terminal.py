"""The terminal: progress bars, colours, typed text, and control characters in the text of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from moe_lm.common.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def byte_bar(console: Console, title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar over bytes; yields a function that takes the bytes done and, where known, those in all.

    It appears with the first byte: before an error, and where others did the work, there is nothing to show.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    task = progress.add_task(title, total=None)

    def advance(done: int, total: int | None) -> None:
        progress.update(task, completed=done, total=total)
        if done:
            progress.start()

    try:
        yield advance
        progress.update(task, total=progress.tasks[0].completed)
    finally:
        if progress.live.is_started:
            progress.stop()


def colours(file: TextIO) -> bool:
    """Whether to write colours: on a terminal that has them, unless NO_COLOR is set (https://no-color.org)."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def check_typed(name: str, text: str) -> None:
    """Raise UsageError for bytes that are not UTF-8, which Python keeps as halves of surrogate pairs (PEP 383)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not UTF-8 text at character {error.start}; type it in UTF-8") from error


PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """A model's text with control characters replaced by pictures, so that it cannot steer the terminal."""
    return text.translate(PICTURES)
