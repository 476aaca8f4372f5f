"""A tokenizer's chat template: writes a conversation as `transformers` would, and knows who wrote each character."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat.environment import GENERATED
from moe_lm.tokenizer.chat.sandbox import SandboxError, sandbox
from moe_lm.tokenizer.chat.traced import Traced
from moe_lm.tokenizer.chat.writing import CALLS, CONTENT, Conversation, Templates

ROLES = ("system", "user", "assistant", "tool")
BY_TEMPLATE = 1 << 30  # in Rendering.authors; messages are numbered from 0
BY_TOOLS = -1

# {"role": one of ROLES, "content": str} and the fields that `checked` keeps. An assistant's message that is not to be
# trained on has `"train": False`, which no template sees.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    authors: [characters] int64, the number of the message that wrote each character, BY_TEMPLATE or BY_TOOLS.
    fields: (author, field) for everything that was written.
    generated: [characters] bool, what stands in {% generation %} blocks; None when there are none.
    """

    text: str
    authors: NDArray[np.int64]
    fields: frozenset[tuple[int, int]]
    generated: NDArray[np.bool_] | None


class ChatTemplate:
    """A compiled template; `names` are the tokens it may ask for, like bos_token.

    `source` is its text, or, in some tokenizers, several by name: `default`, and `tool_use` for conversations with
    tools. Raises UsageError when it is not a template.
    """

    def __init__(self, source: str | Sequence[Mapping[str, str]], names: Mapping[str, str]) -> None:
        try:
            texts = {"default": source} if isinstance(source, str) else {one["name"]: one["template"] for one in source}
        except (TypeError, KeyError) as error:
            raise UsageError("the tokenizer's chat templates are not a list of names and templates") from error
        if not all(isinstance(text, str) for pair in texts.items() for text in pair):
            raise UsageError("the tokenizer's chat templates are not a list of names and templates")
        self._write = self._compiled(texts)
        if "default" not in texts:
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
            # In a message that only calls tools most templates expect an empty content, but some expect None.
            silent = [turn for turn in turns if "tool_calls" in turn and not turn["content"]]
            for turn in silent:
                turn["content"] = None
            with suppress(UsageError):
                if silent:
                    return self._render(turns, tools, add_generation_prompt)
            raise refusal

    def _compiled(self, texts: Mapping[str, str]) -> Callable[[Conversation], Traced]:
        """What writes a conversation: our own template here, foreign ones in the sandbox."""
        try:
            if texts == {"default": own_template()}:
                return Templates(texts).write
            sandbox().check(texts)
        except (jinja2.TemplateError, SandboxError) as error:
            raise _failed(error) from error
        return lambda conversation: sandbox().write(texts, conversation)

    def _render(
        self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> Rendering:
        try:
            text = self._write(Conversation(turns, tools, add_generation_prompt, self._names))
        except Exception as error:  # our own template raises what Jinja does
            raise _failed(error) from error
        rendering = _read_authors(text)
        _check_whole(turns, bool(tools), rendering)
        return rendering


@functools.cache
def own_template() -> str:
    """The chat template of the tokenizers that this program trains."""
    return resources.files("moe_lm.tokenizer").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The fields of each message that a template may see. Raises UsageError for what is not a conversation."""
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


def _read_authors(text: Traced) -> Rendering:
    codes = np.frombuffer(text.authors.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    generated = codes >= GENERATED
    codes = codes & (GENERATED - 1)
    authors = np.where(codes > 0, codes // 4 - 1, BY_TEMPLATE)
    fields = frozenset((code // 4 - 1, code % 4) for code in np.unique(codes).tolist() if code)
    return Rendering(str.__str__(text), authors, fields, generated if generated.any() else None)


def _check_whole(turns: Sequence[Mapping[str, Any]], with_tools: bool, rendering: Rendering) -> None:
    """Raise UsageError where the template left something out. Earlier reasoning is left out by many, on purpose."""
    for index, turn in enumerate(turns):
        if (turn["content"] or "").strip() and (index, CONTENT) not in rendering.fields:
            raise UsageError(f"the tokenizer's chat template leaves out what the {turn['role']} says")
        if "tool_calls" in turn and (index, CALLS) not in rendering.fields:
            raise UsageError("the tokenizer's chat template leaves out the tool calls")
    if with_tools and not any(author == BY_TOOLS for author, _ in rendering.fields):
        raise UsageError("the tokenizer's chat template leaves out the descriptions of tools")


def _failed(error: Exception) -> UsageError:
    return UsageError(f"the tokenizer's chat template failed: {' '.join(str(error).split())}")
