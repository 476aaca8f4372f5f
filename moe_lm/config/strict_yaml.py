"""YAML that means what it says: no key twice, no aliases that multiply, no number that overflows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from moe_lm.common.errors import UsageError

MOST_CHARACTERS = 1 << 19  # the parser, which is Python because the one in C crashes on deep nesting, takes 15 s
MOST_VALUES = 100_000  # of a file, once its aliases are written out


class _Loader(yaml.SafeLoader):
    """The safe loader, with integers of at most 64 bits."""

    def construct_yaml_int(self, node: ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if not -(1 << 63) <= value < 1 << 64:
            raise yaml.YAMLError(f"the integer in line {_line(node)} has more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, origin: str) -> Any:
    """The values of a YAML text; `origin` names it in errors.

    Raises UsageError for what is not YAML, for a key that is set twice (with the line of both), and for aliases that
    contain themselves or stand for more than MOST_VALUES values.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"{origin} has more than {MOST_CHARACTERS} characters; is it a config?")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, origin)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"{origin}: lists and sections are nested too deep; flatten them") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the last three: a value unlike its tag
        raise UsageError(f"{origin} is not valid YAML: {_problem(error, text)}") from error


def parse_section(text: str, origin: str) -> dict[str, Any]:
    """The `key: value` lines of a YAML text. Raises UsageError as `parse_yaml`, and for a text of another kind."""
    values = parse_yaml(text, origin)
    if not isinstance(values, dict):
        held = {type(None): "is empty", str: "holds text", list: "holds a list"}
        found = held.get(type(values), f"holds {values!r}")
        raise UsageError(f"{origin} {found}, expected `key: value` lines")
    if (key := next((key for key in values if not isinstance(key, str)), None)) is not None:
        raise UsageError(f"{origin}: the key {key!r} is not a word; write the name of a setting")
    return values


def _check(root: Node, origin: str) -> None:
    """Raise UsageError for a key that is set twice, and for aliases that stand for too much."""
    sizes: dict[int, int] = {}  # of a node with all that is in it, by the node's id; 0 while it is being counted

    def size(node: Node, place: str) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            _check_keys(node, place, origin)
            sizes[id(node)] = 1 + sum(size(child, f"{place}{name}") for child, name in _children(node))
        elif not sizes[id(node)]:
            raise UsageError(f"{origin}: the alias of line {_line(node)} contains itself; write it out")
        if sizes[id(node)] > MOST_VALUES:
            raise UsageError(
                f"{origin} stands for more than {MOST_VALUES} values, most of them by aliases; write them out"
            )
        return sizes[id(node)]

    size(root, "")


def _children(node: Node) -> Iterator[tuple[Node, str]]:
    """The nodes in a node, and what each adds to the name of a key within it."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key, ""
            yield value, f"{key.value}." if isinstance(key, ScalarNode) else ""
    elif not isinstance(node, ScalarNode):
        yield from ((child, "") for child in node.value)


def _check_keys(node: Node, place: str, origin: str) -> None:
    seen: dict[tuple[str, str], Node] = {}
    for key, _ in node.value if isinstance(node, MappingNode) else ():
        if not isinstance(key, ScalarNode):
            continue
        first = seen.setdefault((key.tag, key.value), key)
        if first is not key:
            raise UsageError(
                f"{origin}: {place}{key.value} is set twice, in line {_line(first)} and in line {_line(key)}; "
                "remove one of them"
            )


def _problem(error: Exception, text: str) -> str:
    """What the parser found, with the line; often it is the line before that lacks a colon, a space or an indent."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    said = " ".join(str(getattr(error, "problem", None) or getattr(error, "context", "")).split())
    if isinstance(error, ConstructorError):
        return f"{said} in line {mark.line + 1}"
    lines = text.splitlines()
    shown = f" ({lines[mark.line].strip()!r})" if mark.line < len(lines) else ""
    begun = getattr(error, "context_mark", None)
    where = f"line {begun.line + 1}, which begins what does not end" if begun is not None else "the line before"
    tab = "indent with spaces" if "\\t" in said else f"look there and at {where}, for a colon, space or quote"
    return f"{said} in line {mark.line + 1}{shown}; {tab}"


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
