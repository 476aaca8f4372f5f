"""Decides what of a conversation is trained on: where the assistant's turns begin and end, under any template.

A turn begins where its generation prompt ends, which is what the template adds to the messages before the turn when
asked with `add_generation_prompt`. It ends with the special token that the template writes after an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat.template import BY_TEMPLATE, ChatTemplate, Message, Rendering

# Conversations that show how a template ends an answer and a tool call.
ASKING: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
ANSWERING = [*ASKING, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "content": "c", "name": "f", "tool_call_id": "abcdefghi"}
CALLING = [*ASKING, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]


class Rendered(NamedTuple):
    """A conversation as the model reads it.

    authors: [characters] int64, the number of the message that wrote each character, BY_TEMPLATE or BY_TOOLS.
    trained: [characters] bool, whether the assistant has to learn to write it.
    specials: the first character, and the one after the last, of each special token that the template itself wrote.
    """

    text: str
    authors: NDArray[np.int64]
    trained: NDArray[np.bool_]
    specials: list[tuple[int, int]]


class ChatFormat:
    """The way a model writes conversations: its template, and the special tokens of its tokenizer.

    `eos_token` may follow the token that ends a turn, and then belongs to the turn.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Iterable[str], eos_token: str) -> None:
        self.template = template
        self.eos_token = eos_token
        self._special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = False
    ) -> Rendered:
        """Write a conversation.

        Trained are the assistant's turns with the tokens that end them, without messages that have `train: False`.
        Where the template marks itself what is trained, with {% generation %}, it decides. Raises UsageError when the
        template refuses the conversation, leaves out some of it, or puts no special token after an answer.
        """
        rendering = self.template.render(messages, tools, add_generation_prompt)
        trained = Turns(self, messages, tools, rendering).trained()
        return Rendered(rendering.text, rendering.authors, trained, list(self.specials(rendering)))

    @cached_property
    def end(self) -> str:
        """The special token that ends an answer. Raises UsageError when the template puts none there."""
        # In ChatGLM's templates it is the token that begins the next turn, so the answer is not the last message.
        rendering = self.template.render([*ANSWERING, *ASKING])
        found = [rendering.text[begin:end] for begin, end in self.specials(rendering, *_gap_after(rendering, 1))]
        if not found:
            raise UsageError(
                "the tokenizer's chat template puts no special token after an answer, so that no model would learn to "
                "stop; let it write eos_token there"
            )
        return found[0]

    @property
    def ends(self) -> set[str]:
        """Every special token that ends a turn: after an answer, and after a tool call where that is another one."""
        try:
            rendering = self.template.render(CALLING, [TOOL])
        except UsageError:  # not every template knows tools
            return {self.end}
        turns = Turns(self, CALLING, [TOOL], rendering)
        place = turns.end_token(*_gap_after(rendering, 1, turns.up_to(1)))
        return {self.end} if place is None else {self.end, rendering.text[slice(*place)]}

    def specials(self, rendering: Rendering, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The places of the special tokens from `begin` to `end` all of whose characters the template wrote."""
        by_template = rendering.authors[begin:end] == BY_TEMPLATE
        edges = (np.flatnonzero(np.diff(by_template, prepend=False, append=False)) + begin).tolist()
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            yield from (found.span() for found in self._special.finditer(rendering.text, start, stop))


class Turns:
    """The assistant's turns in one rendered conversation, by the numbers of their messages.

    The template's text between the characters of one message and those of the next is called a gap.
    """

    def __init__(
        self, chat: ChatFormat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], rendering: Rendering
    ) -> None:
        self._chat = chat
        self._messages = messages
        self._tools = tools
        self._rendering = rendering

    def trained(self) -> NDArray[np.bool_]:
        """The characters that the assistant has to learn to write. [characters]"""
        generated = self._rendering.generated
        trained = np.zeros(len(self._rendering.text), np.bool_) if generated is None else generated.copy()
        for number, message in enumerate(self._messages):
            if message["role"] == "assistant":
                if generated is None and message.get("train", True):
                    trained[self._span(number)] = True
                if generated is not None and not message.get("train", True):
                    trained[self._widest_span(number)] = False
        return trained

    def _span(self, number: int) -> slice:
        """The characters of a turn, with the token that ends it."""
        begin = self._begin(number)
        return slice(begin, self._end(number, begin))

    def _widest_span(self, number: int) -> slice:
        """The characters of a turn with the gaps around it, whatever a template may have marked there.

        Between two turns of the assistant the gap is divided where the prompt of the second one ends.
        """
        before, after = self._messages[:number], self._messages[number + 1 :]
        if before and before[-1]["role"] == "assistant":
            begin = self._begin(number)
        else:
            begin, _ = _gap_before(self._rendering, number)
        if after and after[0]["role"] == "assistant":
            return slice(begin, self._begin(number + 1))
        return slice(begin, _gap_after(self._rendering, number, self.up_to(number))[1])

    def _begin(self, number: int) -> int:
        """The first character of a turn: the end of its generation prompt in the gap before it.

        A rendering with the prompt is compared only from its last message on, because templates may write earlier turns
        and what stands before all turns differently when more turns follow. A turn may share the end of the prompt,
        when it opens with the same characters; as much of the prompt counts as stands in the gap.
        """
        start, stop = _gap_before(self._rendering, number)
        gap = self._rendering.text[start:stop]
        if number:
            prompt = self._chat.template.render(self._messages[:number], self._tools, add_generation_prompt=True)
            return start + _common_prefix(gap, _tail(prompt))
        # The first message has no prompt before it, so look in the gap for the longest ending of another one's prompt.
        prompt_end = _tail(self._chat.template.render(ASKING, add_generation_prompt=True))
        known = next((ending for cut in range(len(prompt_end)) if (ending := prompt_end[cut:]) in gap), None)
        return stop if known is None else start + gap.rfind(known) + len(known)

    def _end(self, number: int, begin: int) -> int:
        """The character after the last one of a turn that starts at `begin`."""
        shorter = self.up_to(number)
        start, stop = _gap_after(self._rendering, number, shorter)
        start = max(start, begin)
        text, eos = self._rendering.text, self._chat.eos_token
        place = self.end_token(start, stop)
        if place is not None:
            return place[1] + len(eos) * text.startswith(eos, place[1], stop)
        if stop == len(text):
            return stop
        # Without a special token, the turn ends after the text that the template also writes when nothing follows.
        return start + _common_prefix(text[start:stop], _tail(shorter) if shorter else "")

    def up_to(self, number: int) -> Rendering | None:
        """The conversation up to a turn whose calls later text may repeat; None for other turns and the last one."""
        repeatable = self._messages[number].get("tool_calls") and number + 1 < len(self._messages)
        return self._chat.template.render(self._messages[: number + 1], self._tools) if repeatable else None

    def end_token(self, start: int, stop: int) -> tuple[int, int] | None:
        """The place of the special token that ends a turn, in the gap after it: that of an answer, else the first."""
        end, places = self._chat.end, list(self._chat.specials(self._rendering, start, stop))
        found = (place for place in places if self._rendering.text[slice(*place)] == end)
        return next(found, places[0] if places else None)


def _gap_before(rendering: Rendering, number: int) -> tuple[int, int]:
    """The start and end of the template's text between earlier messages and message `number`."""
    authors = rendering.authors
    own = np.flatnonzero((authors >= number) & (authors != BY_TEMPLATE))
    stop = int(own[0]) if len(own) else len(authors)
    return _last(authors[:stop] < number) + 1, stop


def _gap_after(rendering: Rendering, number: int, shorter: Rendering | None = None) -> tuple[int, int]:
    """The start and end of the template's text between message `number` and later messages.

    A template may repeat the name of a call beside the tool's result, and those characters are marked as message
    `number` too. The turn ends before them: it has as many characters of the message as `shorter`, which ends with it.
    """
    authors = rendering.authors
    count = None if shorter is None else int((shorter.authors == number).sum())
    own = np.flatnonzero(authors == number)[:count]
    start = int(own[-1]) + 1 if len(own) else 0
    later = np.flatnonzero((authors[start:] >= number) & (authors[start:] != BY_TEMPLATE))
    return start, start + int(later[0]) if len(later) else len(authors)


def _tail(rendering: Rendering) -> str:
    """The template's text after the last message."""
    return rendering.text[_last(rendering.authors != BY_TEMPLATE) + 1 :]


def _last(where: NDArray[np.bool_]) -> int:
    """The index of the last True, -1 when there is none."""
    places = np.flatnonzero(where)
    return int(places[-1]) if len(places) else -1


def _common_prefix(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
