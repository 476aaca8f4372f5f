"""Rows of a Parquet file, as documents and as conversations."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from moe_lm.config.data import ChatSource, SourceConfig
from moe_lm.data.records import read_dialogues
from moe_lm.text.files import Report
from moe_lm.text.sources import read_documents
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_json

ROWS = [
    {"text": "One.", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"text": "Two \u4e2d.", "messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
]


def prepare(folder: Path) -> Read:
    file = folder / "rows.parquet"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        list(read_dialogues([ChatSource(path=str(file))], Report()))
        list(read_documents(SourceConfig(name="fuzz", path=str(file)), Report()))

    return read


def seeds() -> list[bytes]:
    return [parquet(ROWS, compression) for compression in ("none", "snappy", "gzip", "zstd")]


def parquet(rows: list[object], compression: str) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression=compression)
    return file.getvalue()


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Bytes changed, or a table made of changed rows."""
    if draw.randrange(3):
        return mutate_bytes(draw, data, seeds)
    try:
        return parquet(json.loads(mutate_json(draw, json.dumps(ROWS).encode(), seeds)), draw.choice(("none", "snappy")))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pyarrow.ArrowException):
        return data


READER = Reader("parquet_rows", prepare, seeds, mutate, memory=128 << 20, inputs_in_ci=60)
