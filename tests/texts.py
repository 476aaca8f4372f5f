"""A text as a session writes it, in one piece."""

from __future__ import annotations

from collections.abc import Iterable

from moe_lm.generate.text import Delta


def text_of(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas)
