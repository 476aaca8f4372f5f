"""What is wrong with a config, in words: the key, its value, what was expected, and the key that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from moe_lm.config.synonyms import ADVICE, NAMES

SIBLING, ELSEWHERE = 0.75, 0.85  # how like a known key an unknown one must be: a wrong hint is worse than none
MOST_MEANT = 3  # keys that are named in a hint
Removed = Mapping[tuple[type[BaseModel], str], tuple[Any, str]]
# What pydantic calls the wrong value, and what we do. `{like}` is how the value would be written.
EXPECTED = {
    "int_parsing": "is not an integer",
    "int_type": "is not an integer",
    "int_from_float": "is not an integer",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "string_type": "is not text; put it in quotes",
    "path_type": "is not a path",
    "string_pattern_mismatch": "may only have letters, digits, '.', '_' and '-', and begins with a letter or a digit",
}


def explain(kind: type[BaseModel], errors: Sequence[Any], removed: Removed, others: Sequence[type[BaseModel]]) -> str:
    """The findings of pydantic in a config of this kind, in our words.

    `removed` are settings that are gone, with what to do. `others` are kinds of configs that may have a key instead.
    """
    within = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    said = [error for error in errors if error["type"] != "too_short" or error["loc"] not in within]
    return "; ".join(_explain(kind, error, removed, others) for error in said)


def _explain(kind: type[BaseModel], item: Any, removed: Removed, others: Sequence[type[BaseModel]]) -> str:
    location = [part for part in item["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        if (gone := removed.get((_section_of(kind, location), location[-1]))) is not None:
            return f"{key} is not a setting any more; {gone[1]}"
        return f"unknown key {key}; {hint(kind, location, others) or 'remove it'}"
    if item["type"] == "missing":
        few = isinstance(item["loc"][-1], int)  # of a list of fixed length
        return f"{key.rpartition('.')[0]} has too few values" if few else f"{key} is missing; set it"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return _wrong_value(kind, location, key, item, message)


def _wrong_value(kind: type[BaseModel], location: list[str], key: str, item: Any, message: str) -> str:
    value = item["input"]
    section = section_type(_section_of(kind, location), location[-1]) if location else None
    if item["type"] in ("model_type", "model_attributes_type") and section is not None:
        keys = list(section.model_fields)
        if isinstance(item["loc"][-1], int):  # an entry of a list
            return f"{key}={value!r} is not a section; write its keys, like {{{keys[0]}: ..., {keys[1]}: ...}}"
        if value is None:
            return f"{key} is empty; give it keys, like {key}.{keys[0]}, or remove it"
        whole = (
            "" if any(field.is_required() for field in section.model_fields.values()) else f", or {key}={{}} for all"
        )
        return f"{key}={value!r} is one value, and {key} is a section; set its keys, like {key}.{keys[0]}{whole}"
    if value is None:
        return f"{key} is empty; give it a value"
    if item["type"] == "tuple_type":
        return f"{key}={value!r} is not a list; write [{value}]"
    if item["type"] == "too_short":
        return f"{key} is an empty list; name one entry at least"
    if item["type"] in EXPECTED:
        number = _whole_number(value) if item["type"] == "int_parsing" else None
        return f"{key}={value!r} {EXPECTED[item['type']]}" + ("" if number is None else f"; write {number}")
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}"


def _whole_number(text: object) -> int | None:
    """The integer that a text like 1e3 says."""
    try:
        number = float(str(text))
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def hint(kind: type[BaseModel], location: Sequence[str], others: Sequence[type[BaseModel]] = ()) -> str | None:
    """What is meant by an unknown key: what others call a setting, or a slip of the pen; None if nothing is near."""
    told = _synonym(kind, location, others)
    if told is not None:
        return told
    siblings = difflib.get_close_matches(location[-1], _section_of(kind, location).model_fields, n=1, cutoff=SIBLING)
    if siblings:
        return f"did you mean {'.'.join([*location[:-1], siblings[0]])}?"
    leaves: dict[str, list[str]] = {}
    for name in all_keys(kind):
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    found = difflib.get_close_matches(location[-1], leaves, n=1, cutoff=ELSEWHERE)
    return f"did you mean {' or '.join(leaves[found[0]][:MOST_MEANT])}?" if found else None


def _synonym(kind: type[BaseModel], location: Sequence[str], others: Sequence[type[BaseModel]]) -> str | None:
    words = [re.sub(r"[-\s]", "_", part.lower()) for part in location]
    keys, advice = _names()
    ours, theirs = set(all_keys(kind)), {key for other in others for key in all_keys(other)}
    for start in range(len(words)):  # the longest name first, as in optimizer.type
        name = ".".join(words[start:])
        meant = [(key, key.partition("=")[0]) for key in keys.get(name, ())]
        if here := [key for key, setting in meant if setting in ours]:
            return f"it is {' or '.join(here)} here"
        if name in advice:
            return advice[name]
        if there := [key for key, setting in meant if setting in theirs]:
            return f"it is {' or '.join(there)}, which this kind of config does not have; remove it"
    return None


@cache
def _names() -> tuple[dict[str, list[str]], dict[str, str]]:
    """The tables of synonyms by the foreign name."""
    keys: dict[str, list[str]] = {}
    for ours, theirs in NAMES.items():
        for name in theirs.split():
            keys.setdefault(name, []).append(ours)
    return keys, {name: text for names, text in ADVICE.items() for name in names.split()}


def _section_of(kind: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The section that the key at `location` stands in."""
    section = kind
    for part in location[:-1]:
        section = section_type(section, part) or section
    return section


def section_type(kind: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key holds, or each entry of its list; None if it holds values."""
    field = kind.model_fields.get(key)
    return None if field is None else _section_in(field.annotation)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = get_args(annotation) if get_origin(annotation) is not None else ()
    return next((found for part in parts if (found := _section_in(part)) is not None), None)


def all_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a config with its sections: train.optimizer.lr."""
    for name in kind.model_fields:
        yield prefix + name
        section = section_type(kind, name)
        if section is not None:
            yield from all_keys(section, f"{prefix}{name}.")
