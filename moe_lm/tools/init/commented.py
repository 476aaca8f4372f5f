"""YAML with a comment on every setting, which is the description of its field."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml

from moe_lm.config.section import Section

WIDTH = 120


def commented(kind: type[Section], values: Mapping[str, Any], remarks: Mapping[str, str]) -> str:
    """Values of a config as YAML; `remarks`, by path like `train.steps`, stand before the descriptions."""
    return "\n".join(_lines(kind, values, remarks, "", "")) + "\n"


def _lines(
    kind: type[Section], values: Mapping[str, Any], remarks: Mapping[str, str], place: str, indent: str
) -> Iterator[str]:
    for key, value in values.items():
        field = kind.model_fields[key]
        if isinstance(value, Mapping) and (section := section_of(field.annotation)) is not None:
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


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also where it may be null; None for a list of sections, as for any value."""
    kinds = (annotation, *get_args(annotation))
    return next((item for item in kinds if isinstance(item, type) and issubclass(item, Section)), None)


def inline(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
