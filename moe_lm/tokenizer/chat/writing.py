"""Compiles the templates of a tokenizer and has them write a conversation, each character with its author.

Nothing here limits what a template does: foreign ones come here within the process of `sandbox.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_lm.tokenizer.chat.environment import ENVIRONMENT, to_json
from moe_lm.tokenizer.chat.traced import Traced, concat, traced

# The authors that go into a template, one character each: field f of message i is chr(4 * (i + 1) + f), and the
# descriptions of tools are chr(TOOLS).
CONTENT, REASONING, CALLS = range(3)
TOOLS = 1
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # what templates call it


class Conversation(NamedTuple):
    """What a template gets to see; `names` are the tokens that it may ask for, like bos_token."""

    turns: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    names: Mapping[str, str]


class Templates:
    """Compiled templates by name: `default`, and in some tokenizers `tool_use` for conversations with tools."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._templates = {name: ENVIRONMENT.from_string(text) for name, text in texts.items()}

    def write(self, conversation: Conversation) -> Traced:
        """The conversation as the template writes it. Raises whatever the template raises."""
        turns, tools, add_generation_prompt, names = conversation
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        text = template.render(
            messages=[_traced_message(turn, index) for index, turn in enumerate(turns)],
            tools=traced([dict(tool) for tool in tools], chr(TOOLS)) or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
        return text if isinstance(text, Traced) else Traced(text)


class Arguments(dict[str, Any]):
    """The arguments of a tool call: an object, or its JSON where a template uses them as text."""

    def __str__(self) -> str:
        return to_json(self)

    def __add__(self, other: str) -> str:
        return concat((self, other))

    def __radd__(self, other: str) -> str:
        return concat((other, self))


def _traced_message(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message for the template to see, its strings with their authors."""

    def author(field: int) -> str:
        return chr(4 * (index + 1) + field)

    result = {key: traced(value, author(CONTENT)) for key, value in turn.items()}
    result["role"] = turn["role"]
    if "reasoning_content" in turn:
        result |= dict.fromkeys(REASONING_NAMES, traced(turn["reasoning_content"], author(REASONING)))
    if "tool_calls" in turn:
        calls = traced(turn["tool_calls"], author(CALLS))
        for call in calls:
            call["function"]["arguments"] = Arguments(call["function"]["arguments"])
        result["tool_calls"] = calls
    return result
