"""YAML with a comment on every setting, which is the description of its field."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from moe_lm.config.findings import section_type

WIDTH = 120


def commented(kind: type[BaseModel], values: Mapping[str, Any], remarks: Mapping[str, str]) -> str:
    """Values of a config as YAML; `remarks`, by path like `train.steps`, stand before the descriptions."""
    return "\n".join(_lines(kind, values, remarks, "", "")) + "\n"


def _lines(
    kind: type[BaseModel], values: Mapping[str, Any], remarks: Mapping[str, str], place: str, indent: str
) -> Iterator[str]:
    for key, value in values.items():
        field = kind.model_fields[key]
        if isinstance(value, Mapping) and (section := section_type(kind, key)) is not None:
            yield f"{indent}{key}:"
            yield from _lines(section, value, remarks, f"{place}{key}.", f"{indent}  ")
            continue
        comment = "; ".join(filter(None, [remarks.get(f"{place}{key}"), field.description]))
        line = f"{indent}{key}: {inline(value)}"
        if len(line) + len(comment) + 4 <= WIDTH:
            yield f"{line:<30}  # {comment}"
        else:
            yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            yield line


def inline(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
