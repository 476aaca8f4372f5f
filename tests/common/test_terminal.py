"""The progress bar over bytes: there is one as soon as there are bytes."""

from __future__ import annotations

from contextlib import suppress
from io import StringIO

from rich.console import Console

from moe_lm.common.terminal import byte_bar


def test_a_bar_appears_with_the_first_byte_and_none_before_an_error_or_where_others_did_the_work() -> None:
    shown = StringIO()
    console = Console(file=shown, width=100)
    with byte_bar(console, "tokenizing"):
        pass
    with suppress(OSError), byte_bar(console, "tokenizing") as advance:
        advance(0, 5000)
        raise OSError
    assert shown.getvalue() == ""
    with byte_bar(console, "tokenizing") as advance:
        advance(3000, 5000)
        advance(5000, 5000)
    assert "5.0/5.0 kB" in shown.getvalue()
