"""A tokenizer's chat template, as `transformers` runs it, giving text that knows who wrote each character.

Templates come from others: they run in Jinja's sandbox. Their `strftime_now` is always the same day, so that a resumed
run trains on what it would have trained on, and a model is asked as it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any, ClassVar

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat.traced import TEMPLATE, Traced, authors_of, concat, first_author, traced

ROLES = ("system", "user", "assistant", "tool")
CONTENT, REASONING, CALLS = range(3)  # the parts of a message, of which each has an author of its own
TOOLS = 1  # the author of the tools' descriptions; message i has 4 * (i + 1) and the number of the part
GENERATED = 1 << 19  # added to authors inside {% generation %}, which marks what the assistant is trained on

# {"role": one of ROLES, "content": str}, what `checked` lets through, and of an assistant's message that is not to be
# trained on `"train": False`, which no template sees.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    messages: [characters] int64, the number of the message that wrote a character; NOBODY for the template, and less
    than any message for the tools. generated: [characters] bool, None when the template does not say.
    """

    text: str
    messages: NDArray[np.int64]
    parts: frozenset[tuple[int, int]]  # (message, part) of all that is there
    generated: NDArray[np.bool_] | None


NOBODY = 1 << 30
OF_TOOLS = -1
TODAY = datetime(2024, 7, 26)  # where there is no strftime_now, Llama's templates say that it is this day


class ChatTemplate:
    """A compiled template; `names` are the tokens it may ask for, like bos_token.

    `source` is its text, or, as some tokenizers have it, several by name: `default`, and `tool_use` for conversations
    with tools. Raises UsageError when it is no template.
    """

    def __init__(self, source: str | Sequence[Mapping[str, str]], names: Mapping[str, str]) -> None:
        texts = {"default": source} if isinstance(source, str) else {item["name"]: item["template"] for item in source}
        try:
            self._templates = {name: ENVIRONMENT.from_string(text) for name, text in texts.items()}
        except jinja2.TemplateError as error:
            raise UsageError(f"the tokenizer's chat template failed: {_one_line(error)}") from error
        if "default" not in self._templates:
            raise UsageError(f"the tokenizer has chat templates {', '.join(texts)}, but none named default; add one")
        self._names = dict(names)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = False
    ) -> Rendering:
        """Write a conversation. Raises UsageError when the template refuses it or leaves out some of it."""
        turns = checked(messages)
        try:
            return self._render(turns, tools, add_generation_prompt)
        except UsageError as refusal:
            # Most templates expect that calls without words have empty words, some that they have none.
            silent = [turn for turn in turns if "tool_calls" in turn and not turn["content"]]
            for turn in silent:
                turn["content"] = None
            with suppress(UsageError):
                if silent:
                    return self._render(turns, tools, add_generation_prompt)
            raise refusal

    def _render(
        self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> Rendering:
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        try:
            text = template.render(
                messages=[_written(turn, index) for index, turn in enumerate(turns)],
                tools=traced([dict(tool) for tool in tools], chr(TOOLS)) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except Exception as error:  # what a template may raise is up to it
            raise UsageError(f"the tokenizer's chat template failed: {_one_line(error)}") from error
        rendering = _read_authors(text)
        _check_whole(turns, bool(tools), rendering)
        return rendering


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The parts of each message that a template may see. Raises UsageError for what is no conversation."""
    if not messages:
        raise UsageError("the conversation is empty; expected at least one message")
    turns = []
    for number, message in enumerate(messages):
        role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
        if role not in ROLES:
            raise UsageError(f"message {number}: role {role!r} is unknown; expected {', '.join(ROLES)}")
        if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
            raise UsageError(f"message {number} ({role}): content is {content!r:.40}; expected text")
        turn = {"role": role, "content": content or ""}
        if role == "assistant":
            turn |= {key: message[key] for key in ("reasoning_content", "tool_calls") if message.get(key)}
        if role == "tool":
            turn |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
        turns.append(turn)
    return turns


class Arguments(dict[str, Any]):
    """The arguments of a tool call: an object, and its JSON where a template takes them for text."""

    def __str__(self) -> str:
        return _to_json(self)

    def __add__(self, other: str) -> str:
        return concat((self, other))

    def __radd__(self, other: str) -> str:
        return concat((other, self))


def _written(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as the template sees it, every string by its author."""

    def author(part: int) -> str:
        return chr(4 * (index + 1) + part)

    result = {key: traced(value, author(CONTENT)) for key, value in turn.items()}
    result["role"] = turn["role"]
    if "reasoning_content" in turn:
        # The names that templates have for it.
        result |= dict.fromkeys(REASONING_NAMES, traced(turn["reasoning_content"], author(REASONING)))
    if "tool_calls" in turn:
        calls = traced(turn["tool_calls"], author(CALLS))
        for call in calls:
            call["function"]["arguments"] = Arguments(call["function"]["arguments"])
        result["tool_calls"] = calls
    return result


REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


def _read_authors(text: str) -> Rendering:
    authors = text.authors if isinstance(text, Traced) else TEMPLATE * len(text)
    codes = np.frombuffer(authors.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    generated = codes >= GENERATED
    codes = codes & (GENERATED - 1)
    messages = np.where(codes > 0, codes // 4 - 1, NOBODY)
    parts = frozenset((code // 4 - 1, code % 4) for code in np.unique(codes).tolist() if code)
    return Rendering(str.__str__(text), messages, parts, generated if generated.any() else None)


def _check_whole(turns: Sequence[Mapping[str, Any]], with_tools: bool, rendering: Rendering) -> None:
    """Some templates pass over what they have no place for; earlier reasoning many leave out on purpose."""
    for index, turn in enumerate(turns):
        if (turn["content"] or "").strip() and (index, CONTENT) not in rendering.parts:
            raise UsageError(f"the tokenizer's chat template leaves out what the {turn['role']} says")
        if "tool_calls" in turn and (index, CALLS) not in rendering.parts:
            raise UsageError("the tokenizer's chat template leaves out the calls of tools")
    if with_tools and not any(message == OF_TOOLS for message, _ in rendering.parts):
        raise UsageError("the tokenizer's chat template leaves out the descriptions of tools")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# Jinja, so that it keeps track


class _Generator(CodeGenerator):
    """`a ~ b` through the environment's concat; Jinja's own joins plain strings."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """What cannot follow its authors, like `'{}'.format(text)`, is by the first: no text gives special tokens."""

    code_generator_class = _Generator
    concat = staticmethod(concat)
    intercepted_binops = frozenset({"%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return _kept(super().call_binop(context, operator, left, right), left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Methods of the template's own strings, like `'\\n'.join(lines)`, keep the authors of their arguments."""
        text = getattr(__obj, "__self__", None)
        if type(text) is str:
            __obj = getattr(Traced(text), __obj.__name__)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Traced) else _kept(result, *args, *kwargs.values())


class _GenerationBlocks(Extension):
    """{% generation %} ... {% endgeneration %}"""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], Traced]) -> Traced:
        text = caller()
        return Traced(text, "".join(chr(ord(author) | GENERATED) for author in text.authors))


def _kept(result: Any, *sources: Any) -> Any:
    """A new text whose characters, as far as they have no author, are by the first of what it was made from."""
    author = first_author(sources) if isinstance(result, str) else None
    return result if author is None else Traced(result, authors_of(result).replace(TEMPLATE, author))


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with the marks by which Jinja knows what to pass
    def call(*args: Any, **kwargs: Any) -> Any:
        return _kept(function(*args, **kwargs), *args, *kwargs.values())

    return call


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As `transformers` has it, without HTML's escapes; written whole by whoever wrote the first string in it."""
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
# These leave it to the methods of Traced, or to nothing; the others may join plain strings.
FOLLOWED = ("trim", "upper", "lower", "capitalize", "string", "default", "d", "first", "last")
ENVIRONMENT.filters |= {
    **{name: _keeping(function) for name, function in ENVIRONMENT.filters.items() if name not in FOLLOWED},
    "tojson": _to_json,
    "join": _join,
    "safe": lambda value: value,
}
ENVIRONMENT.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
