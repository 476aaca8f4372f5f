"""Writes docs/config.md and docs/cli.md from the sections' fields and from the verbs' options.

In docs/faults.md it writes the table of symptoms.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from moe_lm.cli.main import app
from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.section import Section
from moe_lm.train.symptoms import SYMPTOMS

DOCS = Path(__file__).parent
CONFIG = """\
# Settings

This page is generated from the code by `python docs/generate.py`.

A run is one YAML file, and every setting in it has a place in one of the sections below. Unknown keys are errors, and
so is a key that stands twice. A section may be the path of a file that holds it (`model: ../model/deepseekmoe.yaml`,
relative to the config). On the command line `train.steps=100` or `--train.steps 100` replaces a setting, with the
value read as YAML, and `model=configs/model/switch.yaml` takes another file; `data.sources.0.weight=2` is the first
entry of a list. `moe-lm config schema > pretrain.schema.json` is this page for editors: a config that begins with `#
yaml-language-server: $schema=pretrain.schema.json` is completed and checked as it is typed. The flags of `sample`,
`chat` and `serve` are in [cli.md](cli.md).
"""
CLI = """\
# Command line

This page is generated from the code by `python docs/generate.py`.

`moe-lm VERB --help` shows the same for one verb. `--debug`, before or after the verb, adds the traceback to an error.
Exit codes: 0 done, 1 failed, 2 wrong use, 75 stopped by a signal or by `train.hours` with everything saved, or with
nothing to save yet, 128+n ended by signal n; see [Stopping and going on](parallelism.md#stopping-and-going-on).
"""
KINDS = {int: "integer", float: "number", str: "text", Path: "path", bool: "true or false", dict: "mapping", Any: "any"}
TABLE, END = "<!-- from the table in the code, by python docs/generate.py -->\n", "<!-- end -->\n"
FIELD = re.compile(r"\{(\w+)[^}]*\}")
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The text of each generated page."""
    return {"config.md": config_page(), "cli.md": cli_page(), "faults.md": faults_page()}


def faults_page() -> str:
    """The page with its table of symptoms; the fields of a sentence stand in it by their names."""
    before, rest = (DOCS / "faults.md").read_text(encoding="utf-8").split(TABLE)
    rows = [(s.name, s.when, FIELD.sub(r"*\1*", s.says), s.cure) for s in SYMPTOMS]
    head = ("symptom", "it shows when", "what is said", "what to do")
    return before + TABLE + table(head, rows) + END + rest.split(END)[1]


def config_page() -> str:
    parts, shown = [CONFIG], set[type[Section]]()
    for verbs, root in ROOTS.items():
        parts.append(f"## {verbs}\n")
        for kind in within(root):
            if kind not in shown:
                parts += section(kind)
                shown.add(kind)
    return "\n".join(parts)


def within(kind: type[Section]) -> Iterator[type[Section]]:
    """A section and all sections in it, in reading order."""
    yield kind
    for field in kind.model_fields.values():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from within(inner)


def section(kind: type[Section]) -> Iterator[str]:
    if kind in PLACES:
        yield f"### `{PLACES[kind]}` ({kind.__name__})\n"
    yield f"{inspect.getdoc(kind)}\n"
    yield table(
        ("key", "type", "default", "meaning"),
        [
            (f"`{key}`", type_of(field.annotation, limits_of(field.metadata)), default_of(field), meaning_of(field))
            for key, field in kind.model_fields.items()
        ],
    )


def places(kind: type[Section], before: str = "") -> Iterator[tuple[type[Section], str]]:
    """Where the sections within a section stand: `train.optimizer`."""
    for key, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield inner, before + key
            yield from places(inner, f"{before}{key}.")


def section_of(annotation: Any) -> type[Section] | None:
    for item in (annotation, *get_args(annotation)):
        if isinstance(item, type) and issubclass(item, Section):
            return item
    return None


def meaning_of(field: FieldInfo) -> str:
    if field.description:
        return field.description
    return str(inspect.getdoc(section_of(field.annotation))).partition("\n")[0].rstrip(".")


def default_of(field: FieldInfo) -> str:
    default = field.get_default()
    if field.is_required():
        return "required"
    return "its defaults" if isinstance(default, Section) else f"`{yaml_of(default)}`"


def limits_of(metadata: Any) -> str:
    return " and ".join(
        f"{words} {getattr(item, name):g}"
        for item in metadata
        for name, words in LIMITS.items()
        if getattr(item, name, None) is not None
    )


def type_of(annotation: Any, limits: str = "") -> str:
    """A type in words: `integer, at least 1` for `int | None` with this limit."""
    origin, arguments = get_origin(annotation), [item for item in get_args(annotation) if item is not NoneType]
    if origin is Annotated:
        return type_of(arguments[0], limits or limits_of(arguments[1:]))
    if origin is Literal:
        return ", ".join(f"`{item}`" for item in arguments)
    if origin in (tuple, list):
        many = arguments[0] if Ellipsis in arguments or origin is list else None
        return f"list: {type_of(many)}" if many else f"{len(arguments)} of: {type_of(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        anchor = f"{PLACES[annotation].replace('.', '')}-{annotation.__name__.lower()}"
        return f"[{annotation.__name__}](#{anchor})"
    if origin is dict:
        return KINDS[dict]
    if origin is not None:  # a union with None
        return type_of(arguments[0], limits)
    return KINDS[annotation] + (f", {limits}" if limits else "")


def yaml_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_of, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def cli_page() -> str:
    group: Any = typer.main.get_command(app)
    return "\n".join([CLI, *verbs(group, typer.Context(group), "moe-lm")])


def verbs(group: Any, context: Any, before: str) -> Iterator[str]:
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])
        if hasattr(command, "commands"):
            yield from verbs(command, typer.Context(command), f"{before} {name}")
            continue
        yield f"## `{before} {name}`\n"
        yield f"{command.help}\n"
        parameters = inspect.signature(command.callback, eval_str=True).parameters
        rows = [row(name, item) for name, item in parameters.items() if get_origin(item.annotation) is Annotated]
        if rows:
            yield table(("argument or option", "type", "default", "meaning"), sorted(filter(None, rows), key=is_option))


def is_option(cells: tuple[str, ...]) -> bool:
    return cells[0].startswith("`-")


def row(name: str, parameter: inspect.Parameter) -> tuple[str, ...] | None:
    kind, info = get_args(parameter.annotation)[:2]
    if info.hidden:
        return None
    if isinstance(info, typer.models.ArgumentInfo):
        shown = f"`{info.metavar}`"
    else:
        declared = [info.default, *(info.param_decls or ())]
        names = [item for item in declared if isinstance(item, str)] or [f"--{name.replace('_', '-')}"]
        flag = kind is bool
        shown = ", ".join(f"`{item}`" for item in names) + ("" if flag or not info.metavar else f" `{info.metavar}`")
    limits = " and ".join(f"{words} {limit:g}" for words, limit in bounds(info) if limit is not None)
    default = parameter.default
    if default is parameter.empty:
        given = "required"
    else:
        given = "on" if default is True else "" if default is None or default is False else f"`{default}`"
    help_text = info.help + (f" Also read from `{info.envvar}`." if info.envvar else "")
    return shown, "flag" if kind is bool else type_of(kind, limits), given, help_text


def bounds(info: Any) -> Iterator[tuple[str, float | None]]:
    yield "at least", info.min
    yield "at most", info.max


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


ROOTS: dict[str, type[Section]] = {
    "`moe-lm pretrain` and `moe-lm prepare`": PretrainConfig,
    "`moe-lm finetune`": FinetuneConfig,
    "`moe-lm tokenizer train`": TokenizerRecipe,
}
PLACES = {kind: place for root in reversed(ROOTS.values()) for kind, place in reversed(list(places(root)))}

if __name__ == "__main__":
    main()
