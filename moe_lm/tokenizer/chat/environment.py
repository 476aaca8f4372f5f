"""Jinja as `transformers` sets it up for chat templates, in a sandbox, with text that keeps its authors.

Where Jinja would join or change plain strings, this environment goes through `Traced`. Where authors cannot be
followed character by character, as in `'{}'.format(text)`, the whole result belongs to the first author, so that no
text of a message is ever taken for the template's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_lm.tokenizer.chat.traced import TEMPLATE, Traced, authors_of, concat, first_author

GENERATED = 1 << 19  # added to the code of an author inside {% generation %}, which marks what is trained on
# `strftime_now` is always this day, so that a resumed run trains on the same text, and a model is asked as it was
# trained. Llama's templates use the same day where there is no strftime_now.
TODAY = datetime(2024, 7, 26)


class _Generator(CodeGenerator):
    """Compiles `a ~ b` to the environment's `concat`; Jinja's own code joins plain strings."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    concat = staticmethod(concat)
    intercepted_binops = frozenset({"%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return _kept(super().call_binop(context, operator, left, right), left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function. A method of the template's own text, like `'\\n'.join(lines)`, keeps the lines' authors."""
        text = getattr(__obj, "__self__", None)
        if type(text) is str:
            __obj = getattr(Traced(text), __obj.__name__)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Traced) else _kept(result, *args, *kwargs.values())


class _GenerationBlocks(Extension):
    """The tag {% generation %} ... {% endgeneration %}."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], Traced]) -> Traced:
        text = caller()
        return Traced(text, "".join(chr(ord(author) | GENERATED) for author in text.authors))


def _kept(result: Any, *sources: Any) -> Any:
    """A new text in which every character without an author gets the first author of `sources`."""
    author = first_author(sources) if isinstance(result, str) else None
    return result if author is None else Traced(result, authors_of(result).replace(TEMPLATE, author))


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the attributes that tell Jinja which arguments to pass
    def call(*args: Any, **kwargs: Any) -> Any:
        return _kept(function(*args, **kwargs), *args, *kwargs.values())

    return call


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """The JSON of a value, like `transformers` without HTML escapes; all of it by the author of its first string."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
    return Traced(text, (first_author(value) or TEMPLATE) * len(text))


def _join(values: Iterable[Any], separator: str = "", attribute: str | None = None) -> Traced:
    if attribute is not None:
        values = [ENVIRONMENT.getattr(value, attribute) for value in values]
    return Traced(separator).join(str(value) for value in values)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


ENVIRONMENT = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
)
# These filters call methods of Traced, or change nothing; the others may work on plain strings.
FOLLOWED = ("trim", "upper", "lower", "capitalize", "string", "default", "d", "first", "last")
ENVIRONMENT.filters |= {
    **{name: _keeping(function) for name, function in ENVIRONMENT.filters.items() if name not in FOLLOWED},
    "tojson": to_json,
    "join": _join,
    "safe": lambda value: value,
}
ENVIRONMENT.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
