"""Ways to make another input of a valid one: as bytes, and, for JSON and YAML, as values."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2**31, -(2**31), 2**32 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308)
STRANGE: tuple[Callable[[Random], Any], ...] = (
    lambda draw: draw.choice(NUMBERS),
    lambda draw: draw.choice((float("nan"), float("inf"), -float("inf"))),
    lambda draw: draw.choice((None, True, False, [], {}, "", " ", "\0", "\ud800", "../../etc/passwd", "/dev/zero")),
    lambda draw: str(draw.choice(NUMBERS)),
    lambda draw: "a" * draw.choice((1, 10, 10, 1000, 100_000)),
    lambda draw: [draw.choice(NUMBERS)] * draw.choice((1, 1, 10, 100, 100, 10_000)),
    lambda draw: {str(number): number for number in range(draw.choice((1, 1, 10, 100, 100, 10_000)))},
    lambda draw: nested(draw.choice((10, 100, 900)), list),
    lambda draw: nested(draw.choice((10, 100, 900)), dict),
)
PIECES = (
    b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n", b"\x1f", b"\x7f", b'"', b"'", b"\\",
    b"{", b"}", b"[", b"]", b":", b",", b"#", b"&a ", b"*a", b"<<: ", b"!!int ", b"%", b"- ", b"null", b"NaN", b"1e999",
    b"9" * 5000, b"-", b"[" * 2000, b"{" * 2000, b'{"a":' * 2000, b"\\u0000", b"\\ud800", b"0x", b"..", b"/", b"\t",
)  # fmt: skip


def nested(depth: int, kind: type) -> Any:
    """Lists or objects, one in the other."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def mutate_bytes(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Bits flipped; pieces taken out, put in, repeated, moved, or taken from another seed; the end cut off."""
    begin = draw.randrange(len(data) + 1)
    end = min(len(data), begin + draw.choice((1, 2, 8, 64, 1024)))
    kind = draw.randrange(8)
    if kind == 0 and begin < len(data):
        return data[:begin] + bytes([data[begin] ^ 1 << draw.randrange(8)]) + data[begin + 1 :]
    if kind == 1:
        return data[:begin] + data[end:]
    if kind == 2:
        return data[:begin] + draw.choice(PIECES) + data[begin:]
    if kind == 3:
        return data[:begin] + draw.choice(PIECES) + data[end:]
    if kind == 4:
        return data[:begin] + data[begin:end] * draw.choice((2, 3, 100)) + data[end:]
    if kind == 5:
        other = draw.choice(seeds)
        start = draw.randrange(len(other) + 1)
        return data[:begin] + other[start : start + draw.choice((8, 64, 1024, len(other)))] + data[end:]
    if kind == 6:
        return data[:begin]
    return data[:begin] + draw.randbytes(draw.choice((1, 4, 32))) + data[end:]


def mutate_values(draw: Random, values: Any) -> Any:
    """A copy of nested lists and objects in which one place has changed."""
    values = copy.deepcopy(values)
    places = list(_places(values))
    if not places:
        return draw.choice(STRANGE)(draw)
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, place = draw.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 2 and isinstance(holder, dict):
        holder[str(draw.choice(STRANGE)(draw))[:1000]] = holder[key]
    elif kind == 3 and isinstance(holder, list):
        holder.extend([holder[key]] * draw.choice((1, 100)))
    elif kind == 4 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * draw.choice((-1, 0, 2, 0.5, 10**9)) + draw.choice((-1, 0, 1))
    else:
        holder[key] = draw.choice(STRANGE)(draw)
    return values


def _places(values: Any) -> Any:
    """Every (list or object, index or key) within nested values."""
    if isinstance(values, dict | list):
        for key in list(values) if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from _places(values[key])


def mutate_json(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """JSON with a value changed, or, one time in four, with its bytes changed."""
    try:
        values = json.loads(data) if draw.randrange(4) else None
    except (ValueError, RecursionError):
        values = None
    if values is None:
        return mutate_bytes(draw, data, seeds)
    try:
        return json.dumps(mutate_values(draw, values)).encode()
    except RecursionError:
        return data
