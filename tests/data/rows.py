"""Rows of fine-tuning data and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def said(*turns: str) -> dict[str, Any]:
    """A row of `messages`: user and assistant in turns."""
    return {"messages": [(user, assistant)[number % 2](turn) for number, turn in enumerate(turns)]}


def write(path: Path, rows: Iterable[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
