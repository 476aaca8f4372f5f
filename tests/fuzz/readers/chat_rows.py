"""Rows of conversations and preference pairs in JSON lines or one JSON array, for fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from moe_lm.config.data import ChatSource
from moe_lm.data.records import nothing_usable, read_dialogues, read_preferences
from moe_lm.text.files import Report
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_json

ROWS = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "system": "Be brief."},
    {"instruction": "Add.", "input": "2 + 2", "output": "4", "history": [["1 + 1?", "2"]]},
    {"prompt": "2 + 2?", "completion": "4"},
    {"prompt": "Name a colour.", "chosen": "Green.", "rejected": "No."},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": '{"city": "Oslo"}'}}]},
            {"role": "tool", "content": "sun", "name": "w"},
            {"role": "assistant", "content": "No.", "reasoning": "It is sunny."},
        ],
        "tools": [{"type": "function", "function": {"name": "w"}}],
    },
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
]  # fmt: skip


def prepare(folder: Path) -> Read:
    def read(data: bytes) -> None:
        file = folder / ("rows.json" if data.lstrip().startswith(b"[") else "rows.jsonl")
        file.write_bytes(data)
        sources, report = [ChatSource(path=str(file))], Report()
        usable = sum(1 for rows in (read_dialogues, read_preferences) for _ in rows(sources, report))
        if not usable:
            raise nothing_usable(sources, "row", report)

    return read


def seeds() -> list[bytes]:
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    return [b"".join(lines), *lines, json.dumps(ROWS).encode()]


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    lines = data.splitlines(keepends=True)
    if not lines or not draw.randrange(4):
        return mutate_bytes(draw, data, seeds)
    number = draw.randrange(len(lines))
    lines[number] = mutate_json(draw, lines[number], seeds) + b"\n"
    return b"".join(lines)


READER = Reader("chat_rows", prepare, seeds, mutate, inputs_in_ci=100)
