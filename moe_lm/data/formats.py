"""A row of a file -> the messages of a conversation, or the prompt and the two answers of a preference.

Whatever names a row uses, here its messages become `{"role": ..., "content": ...}`, with `tool_calls`,
`reasoning_content`, `tool_call_id` and `name` where the row has them. In a conversation an answer that the row masks
also gets `"train": False`; a preference ignores masks, because its two answers are what is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_lm.config.data import ChatSource, template_fields
from moe_lm.text.files import text_problem
from moe_lm.tokenizer.chat.template import ROLES

Message = dict[str, Any]

OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
MASKS = ("weight", "train", "loss")  # OpenAI's name, where 0 masks an answer, and other names, where false does


class Unusable(Exception):  # noqa: N818 (a reason to skip a row, not a failure)
    """The reason why a row cannot be trained on, worded alike for all such rows so that they can be counted."""


@dataclass(frozen=True)
class Dialogue:
    """The messages of a row, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Preference:
    """A conversation that ends with the user, and two answers, of which `chosen` is preferred."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def dialogue_of(row: dict[str, Any], source: ChatSource) -> Dialogue:
    """The conversation of a row. Raises Unusable when it has none that can be trained on."""
    row = _renamed(row, source)
    kind = source.format if source.format != "auto" else _conversation_format(row)
    if kind == "preference":
        raise Unusable("a preference pair, which needs the section preference")
    if kind in ("messages", "sharegpt"):
        messages = _messages(_required(row, "messages" if kind == "messages" else "conversations", source))
    elif kind == "alpaca":
        messages = _history(row.get("history"))
        messages += [_said("user", _asked(row, source)), _said("assistant", _required(row, "output", source))]
    else:
        messages = _prompt(row, source) + _answer(_required(row, "completion", source))
    messages = [_masked(message) for message in messages]
    dialogue = Dialogue(_with_system(messages, row, source), _tools(row.get("tools")))
    _check(dialogue.messages, dialogue.tools)
    _check_answers(dialogue.messages)
    return dialogue


def preference_of(row: dict[str, Any], source: ChatSource) -> Preference:
    """The preference of a row, whose answers are strings, single messages or lists of messages.

    The prompt is `prompt`, `messages`, `conversations` or an instruction with its input. Both answers may repeat it,
    or be the only place where it is. Raises Unusable when there is no such preference.
    """
    row = _renamed(row, source)
    if source.format not in ("auto", "preference"):
        raise Unusable(f"format={source.format} is not a preference pair")
    chosen, rejected = (_unmarked(_answer(_required(row, name, source))) for name in ("chosen", "rejected"))
    whole = bool(chosen and rejected) and chosen[0]["role"] != "assistant"
    if whole:  # both are whole conversations, and the messages that they share are the prompt
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt = _unmarked(_prompt(row, source))
    preference = Preference(_with_system(prompt, row, source), chosen, rejected, _tools(row.get("tools")))
    if not any(message["role"] == "user" for message in preference.prompt):
        raise Unusable("a preference pair whose sides share no question")
    _check(preference.prompt, preference.tools)
    for answer in (chosen, rejected):
        _check(answer)
        _check_answers(answer)
        if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise Unusable("a side of a preference pair that is not an assistant's answer")
    if chosen == rejected:
        raise Unusable("a preference pair with equal sides")
    return preference


def _renamed(row: dict[str, Any], source: ChatSource) -> dict[str, Any]:
    return row | {name: row.get(theirs) for name, theirs in source.fields.items()}


def _conversation_format(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "messages"
    if "conversations" in row and "chosen" not in row:
        return "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "chosen" in row and "rejected" in row:
        return "preference"
    raise Unusable("no messages, conversations, instruction with output, or prompt with completion")


def _required(row: dict[str, Any], name: str, source: ChatSource) -> Any:
    if name not in row or (name in source.fields and row[name] is None):
        raise Unusable(f"no field {source.fields.get(name, name)!r}")
    return row[name]


def _prompt(row: dict[str, Any], source: ChatSource) -> list[Message]:
    """The messages before the target: the user's one text, or all that the row has."""
    if source.prompt_template is not None:
        return [*_history(row.get("history")), _said("user", _filled(source.prompt_template, row))]
    for name in ("prompt", "messages", "conversations"):
        if isinstance(row.get(name), list):
            return _messages(row[name])
    before = _history(row.get("history"))
    if "prompt" not in row and "instruction" in row:
        return [*before, _said("user", _asked(row, source))]
    return [*before, _said("user", _required(row, "prompt", source))]


def _asked(row: dict[str, Any], source: ChatSource) -> Any:
    """The user's text in a row with an instruction and perhaps an input."""
    if source.prompt_template is not None:
        return _filled(source.prompt_template, row)
    parts = [_required(row, "instruction", source), *([row["input"]] if row.get("input") else [])]
    return "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None


def _history(turns: Any) -> list[Message]:
    """The messages of the questions and answers before an instruction."""
    turns = turns or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise Unusable("a history that is not a list of [question, answer]")
    return [_said(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def _filled(template: str, row: dict[str, Any]) -> str:
    for name in sorted(template_fields(template)):
        if not isinstance(row.get(name), str):
            raise Unusable(f"no text in field {name!r}, which prompt_template needs")
    return template.format_map(row)


def _answer(value: Any) -> list[Message]:
    """The messages of a target: the assistant's text, one message, or a list."""
    if isinstance(value, list):
        return _messages(value)
    return [_message(value) if isinstance(value, dict) else _said("assistant", value)]


def _with_system(messages: list[Message], row: dict[str, Any], source: ChatSource) -> list[Message]:
    """The messages with a system prompt: their own, else the row's, else the source's."""
    system = row.get("system") or source.system
    if system is None or any(message["role"] == "system" for message in messages):
        return messages
    return [_said("system", system), *messages]


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _messages(values: Any) -> list[Message]:
    if not isinstance(values, list):
        raise Unusable("messages that are not a list")
    return [_message(value) for value in values]


def _message(value: Any) -> Message:
    """One message under our names, with its masks as the row has them. Content of None stays None."""
    if not isinstance(value, dict):
        raise Unusable("a message that is not an object")
    name = value.get("role", value.get("from"))
    role = OTHER_NAMES.get(name, name) if isinstance(name, str) else None
    if role not in ROLES:
        raise Unusable(f"a message whose role is not one of {', '.join(ROLES)}")
    content = _text(value.get("content", value.get("value")))
    masks = {key: value[key] for key in MASKS if role == "assistant" and value.get(key) is not None}
    if name == "function_call":
        return {"role": role, "content": None, "tool_calls": _tool_calls(_parsed(content)), **masks}
    message: Message = {"role": role, "content": content, **masks}
    if role == "assistant" and value.get("tool_calls"):
        message["tool_calls"] = _tool_calls(value["tool_calls"])
    reasoning = next((value[key] for key in REASONING if value.get(key)), None) if role == "assistant" else None
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if role == "tool" and value.get(key):
            message[key] = value[key]
    return message


def _masked(message: Message) -> Message:
    """The message with `"train": False` where its masks say so."""
    masks = {key: message[key] for key in MASKS if message.get(key) is not None}
    for key, value in masks.items():
        if key == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise Unusable("a message whose weight is neither 0 nor 1")
        if key != "weight" and not isinstance(value, bool):
            raise Unusable(f"a message whose {key} is neither true nor false")
    if len({bool(value) for value in masks.values()}) > 1:
        raise Unusable(f"a message whose {' and '.join(masks)} contradict each other")
    [plain] = _unmarked([message])
    return plain if all(masks.values()) else plain | {"train": False}


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key not in MASKS} for message in messages]


def _text(content: Any) -> Any:
    """The text of a content, which multimodal data sets write as a list of parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content


def _tool_calls(values: Any) -> list[dict[str, Any]]:
    calls = []
    for value in values if isinstance(values, list) else [values]:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("a tool call without the name of a function")
        arguments = function.get("arguments")
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise Unusable("a tool call whose arguments are not a JSON object")
        call: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(value.get("id"), str):
            call["id"] = value["id"]
        calls.append(call)
    return calls


def _tools(value: Any) -> list[dict[str, Any]]:
    tools = _parsed(value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools that are not a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _parsed(text: Any) -> Any:
    """The value of a JSON text, or None, which no caller accepts, when it is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _check(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
    if not messages:
        raise Unusable("no messages")
    for message in messages:
        if not isinstance(message["content"], str) and not (message["content"] is None and "tool_calls" in message):
            raise Unusable("a message whose content is not text")
    for text in _texts([*messages, *tools]):
        problem = text_problem(text)
        if problem is not None:
            raise Unusable(problem)


def _check_answers(messages: Sequence[Message]) -> None:
    """Raise Unusable for an answer without text, which would teach the model to end at once, and without a target."""
    answers = [message for message in messages if message["role"] == "assistant"]
    spoken = [bool(message.get("tool_calls") or message["content"].strip()) for message in answers]
    if not any(spoken):
        raise Unusable("no assistant message with text")
    if not all(spoken):
        raise Unusable("an assistant message without text")
    if not any(message.get("train", True) for message in answers):
        raise Unusable("every assistant message is masked by weight, train or loss")


def _texts(value: Any) -> Iterator[str]:
    """Every string in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
