"""Makes the options of a verb out of config sections, and reads the settings of a config off the command line.

A field of a section is an option with the field's name, description, default and limits. Sections are pydantic models,
which are imported only for the verb that runs, so that `moe-lm --help` stays fast.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from moe_lm.common.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from moe_lm.config.section import Section

FIRST = ("quickstart", "init", "doctor", "config", "tokenizer")
# Options whose number may be left out, and what it is then.
ALONE = {"--preview": "3", "--logprobs": "0", "--show-routing": "-1"}
# What other programs call a verb.
ELSEWHERE = {
    "train": "pretrain or finetune", "sft": "finetune", "dpo": "finetune", "launch": "pretrain CONFIG --gpus all",
    "tokenize": "prepare", "preprocess": "prepare", "generate": "sample", "inference": "sample", "evaluate": "eval",
    "convert": "import or export",
}  # fmt: skip
# What the help calls a value.
CALLED = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", bool: ""}
DOTTED = re.compile(r"--(\w+(?:\.\w+)+)(=.*)?", re.DOTALL)


class Walk(TyperGroup):
    """Lists the verbs in the order of the walk, and completes the one that is called with its sections' options."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(self.callback, super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda verb: verb not in FIRST)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE:
            raise UsageError(f"there is no verb {args[0]}; did you mean {ELSEWHERE[args[0]]}?")
        name, command, rest = super().resolve_command(ctx, args)
        complete = getattr(getattr(command, "callback", None), "complete", None)
        return name, complete(name) if complete else command, rest


class Verb(TyperCommand):
    """A verb whose help calls its values N, TEXT and PATH, where Typer would show the types of Python."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(self.callback, super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = (item for item in self.get_params(ctx) if item.param_type_name == "argument")
        return [self.options_metavar or "", *(item.metavar for item in arguments)]


def _plain(callback: Callable[..., Any] | None, parameters: list[Any]) -> list[Any]:
    kinds = inspect.signature(callback, eval_str=True).parameters if callback else {}
    for item in parameters:
        if item.param_type_name == "argument":  # its name says what it is
            item.display_type_rich = lambda ctx: ""
        elif item.metavar is None:
            item.metavar = _called(kinds[item.name].annotation) if item.name in kinds else ""
    return parameters


def _called(annotation: Any) -> str | None:
    """What the help calls a value of this type: `N` for `int | None`, `auto|cpu` for a choice."""
    origin, inner = get_origin(annotation), [item for item in get_args(annotation) if item is not NoneType]
    if origin is Literal:
        return "|".join(map(str, inner))
    return _called(inner[0]) if inner else CALLED.get(annotation)


class ConfigCommand(Verb):
    """A verb with a config: takes `--train.steps 100` and `--train.steps=100` like `train.steps=100`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, list(_overrides(args)))
        except Exception as error:
            if (option := getattr(error, "option_name", None)) is not None and (told := _told(option)) is not None:
                raise UsageError(f"there is no option {option}; {told}") from error
            raise


def _told(option: str) -> str | None:
    """What is meant by an option that other programs have: `--learning-rate` is a setting here."""
    from moe_lm.config.findings import hint
    from moe_lm.config.run import FinetuneConfig, PretrainConfig

    key = option.lstrip("-").replace("-", "_")
    return hint(PretrainConfig, [key], [FinetuneConfig])


def _overrides(arguments: list[str]) -> Iterator[str]:
    rest = iter(arguments)
    for item in rest:
        dotted = DOTTED.fullmatch(item)
        if dotted is None:
            yield item
        elif dotted[2] is not None:
            yield dotted[1] + dotted[2]
        elif (value := next(rest, None)) is not None:
            yield f"{dotted[1]}={value}"
        else:
            raise UsageError(f"{item} has no value; give one, like {item} 100")


def with_numbers(arguments: list[str]) -> list[str]:
    """The arguments, with the numbers that options of `ALONE` were given without: Typer's options take a value."""
    kept = []
    for place, item in enumerate(arguments, 1):
        alone = item in ALONE and not "".join(arguments[place : place + 1]).isdigit()
        kept += [item, ALONE[item]] if alone else [item]
    return kept


def takes(**sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make parameters of a verb sections of config/generation.py, each field an option: `@takes(load="LoadConfig")`."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, locals=dict.fromkeys(sections.values()), eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name not in sections]

        def bare(**values: Any) -> None:
            raise AssertionError("a verb runs after it was completed")

        def complete(name: str) -> Any:
            from moe_lm.config import generation

            kinds = {parameter: getattr(generation, kind) for parameter, kind in sections.items()}
            app = typer.Typer(add_completion=False)
            app.command(name, cls=Verb)(_completed(verb, own, kinds))
            return typer.main.get_command(app)

        functools.update_wrapper(bare, verb)
        _set_signature(bare, own)
        bare.complete = complete  # type: ignore[attr-defined]
        return bare

    return decorate


def _completed(
    verb: Callable[..., None], own: list[inspect.Parameter], kinds: dict[str, type[Section]]
) -> Callable[..., None]:
    """The verb with an option for each field of its sections in place of the sections."""

    def run(context: typer.Context, **values: Any) -> None:
        for parameter, kind in kinds.items():
            fields = {name: values.pop(name) for name in kind.model_fields}
            given = {name: value for name, value in fields.items() if _is_given(context, name)}
            values[parameter] = _section(kind, given)
        verb(**values)

    functools.update_wrapper(run, verb)
    options = [_option(name, field) for kind in kinds.values() for name, field in kind.model_fields.items()]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    _set_signature(run, [context, *own, *options])
    return run


def _set_signature(function: Any, parameters: list[inspect.Parameter]) -> None:
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del function.__wrapped__


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    from moe_lm.config.section import Flag

    flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
    bounds = {"ge": "min", "le": "max"}
    limits = {bounds[name]: getattr(item, name) for item in field.metadata for name in bounds if hasattr(item, name)}
    description = field.description or name
    many = get_origin(field.annotation) is tuple
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{description[0].upper()}{description[1:]}.",
        metavar=flag.metavar,
        envvar=flag.envvar,
        **limits,
    )
    kind = list[str] | None if many else field.annotation
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if many else field.get_default(),
        annotation=Annotated[kind, option],
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _section(kind: type[Section], given: dict[str, Any]) -> Section:
    from pydantic import ValidationError

    try:
        return kind(**given)
    except ValidationError as error:
        raise UsageError("; ".join(_said(kind, item) for item in error.errors())) from error


def _said(kind: type[Section], item: Any) -> str:
    """One of pydantic's findings, with flags in place of fields: `--top-k 3` for `top_k=3`."""
    message = item["msg"].removeprefix("Value error, ")
    if item["loc"]:
        value = item["input"]
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        message = f"{item['loc'][0]}={shown}: {message[0].lower()}{message[1:]}"

    def flag(match: re.Match[str]) -> str:
        if match[1] not in kind.model_fields:
            return match[0]
        option = f"--{match[1].replace('_', '-')}"
        return option if match[2] in ("True", ALONE.get(option)) else f"{option} {match[2]}"

    return re.sub(r"\b(\w+)=(\S*)", flag, message)
