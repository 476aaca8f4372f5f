"""The header of a safetensors file, and a row of each tensor that it describes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from moe_lm.checkpoint.safetensors_file import DTYPES, read_header
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_values

SHARDING = json.dumps({"model.a": {"saved_offsets": [0, 2]}})
HEADERS: tuple[dict[str, Any], ...] = (
    {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
    {
        "__metadata__": {"format": "pt", "DCP_SHARDING_INFO": SHARDING},
        "model.a": {"dtype": "BF16", "shape": [4, 2, 2], "data_offsets": [0, 32]},
        "model.b": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
        "model.c": {"dtype": "BOOL", "shape": [0, 5], "data_offsets": [40, 40]},
        "model.d": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [40, 48]},
    },
)


def prepare(folder: Path) -> Read:
    file = folder / "model.safetensors"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for stored in read_header(file).tensors.values():
            if stored.dtype_name in DTYPES and (not stored.shape or stored.shape[0]):
                stored.rows(0, 1)

    return read


def seeds() -> list[bytes]:
    return [_file(header, bytes(48 if len(header) > 1 else 24)) for header in HEADERS]


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length]) if draw.randrange(4) else None
        if isinstance(header, dict):
            return _file(mutate_values(draw, header), data[8 + length :])
    except (ValueError, RecursionError):
        pass
    if not draw.randrange(4):
        lengths = (0, 1, length - 1, length + 1, len(data), 1 << 20, 100_000_000, 1 << 31, 1 << 63, 2**64 - 1)
        return (draw.choice(lengths) % 2**64).to_bytes(8, "little") + data[8:]
    return mutate_bytes(draw, data, seeds)


def _file(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


READER = Reader("safetensors", prepare, seeds, mutate)
