"""Where the assistant's turns begin and end in a rendered conversation, whatever the template.

A turn begins where the prompt for it ends, which the template writes for the messages before with
`add_generation_prompt`. It ends with the special token that the template puts after an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat.template import NOBODY, ChatTemplate, Message, Rendering

ASKING: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
ANSWERING = [*ASKING, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "content": "c", "name": "f", "tool_call_id": "abcdefghi"}
CALLING = [*ASKING, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]


class Turns:
    """The assistant's turns as a template writes them. `special_tokens`: what the tokenizer takes for special.

    `eos_token` may follow the token that ends a turn, and then belongs to the turn.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Iterable[str], eos_token: str) -> None:
        self._template = template
        self._special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
        self._eos_token = eos_token

    @cached_property
    def end(self) -> str:
        """The special token that ends an answer.

        Raises UsageError when the template puts none there, so that no model could learn to stop.
        """
        # Of ChatGLM's kind the one that begins the next turn, so the answer is not the last message.
        rendering = self._template.render([*ANSWERING, *ASKING])
        found = [rendering.text[begin:end] for begin, end in self._specials(rendering, *_after(rendering, 1))]
        if not found:
            raise UsageError(
                "the tokenizer's chat template puts no special token after an answer, so that no model would learn to "
                "stop; let it write eos_token there"
            )
        return found[0]

    @property
    def ends(self) -> set[str]:
        """Every special token that ends a turn: that of an answer, and that of a call of tools where it is another."""
        try:
            rendering = self._template.render(CALLING, [TOOL])
        except UsageError:  # not every template knows tools
            return {self.end}
        alone = self._template.render(CALLING[:2], [TOOL])
        place = self._end_token(rendering, *_after(rendering, 1, alone))
        return {self.end} if place is None else {self.end, rendering.text[slice(*place)]}

    def specials(self, rendering: Rendering) -> Iterator[tuple[int, int]]:
        """Where the template's own text spells special tokens: first character, and the one after the last."""
        return self._specials(rendering, 0, len(rendering.text))

    def trained(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], rendering: Rendering
    ) -> NDArray[np.bool_]:
        """The characters that an assistant has to write: its turns with the tokens that end them. [characters]

        Where the template itself says it, with {% generation %}, it is as the template says. A message with
        `train: False` is masked: nothing of its turn is trained on.
        """
        if rendering.generated is not None:
            trained = rendering.generated.copy()
            for number, message in enumerate(messages):
                if _speaks(message) and not _is_trained(message):
                    trained[self._around(messages, tools, rendering, number)] = False
            return trained
        trained = np.zeros(len(rendering.text), np.bool_)
        for number, message in enumerate(messages):
            if _speaks(message) and _is_trained(message):
                begin = self._begin(messages, tools, rendering, number)
                alone = self._alone(messages, tools, number)
                trained[begin : self._end(rendering, number, begin, alone)] = True
        return trained

    def _around(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], rendering: Rendering, number: int
    ) -> slice:
        """All that may be a turn's, whatever the template marks: from the words before it to those that come next.

        Between two turns of the assistant it ends where the prompt of the later one does.
        """
        before, after = messages[:number], messages[number + 1 :]
        if before and _speaks(before[-1]):
            begin = self._begin(messages, tools, rendering, number)
        else:
            begin, _ = _before(rendering, number)
        if after and _speaks(after[0]):
            return slice(begin, self._begin(messages, tools, rendering, number + 1))
        return slice(begin, _after(rendering, number, self._alone(messages, tools, number))[1])

    def _alone(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], number: int) -> Rendering | None:
        """The conversation up to a turn with calls, whose words later messages may repeat; None: nothing does."""
        repeated = messages[number].get("tool_calls") and number + 1 < len(messages)
        return self._template.render(messages[: number + 1], tools) if repeated else None

    def _begin(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], rendering: Rendering, number: int
    ) -> int:
        """The first character of a turn: after as much of its prompt as stands there.

        Compared is what follows the last words before the turn, because templates may write earlier turns, and what
        stands before all, in another way when more turns follow.
        """
        begin, own = _before(rendering, number)
        between = rendering.text[begin:own]
        if number:
            prompt = self._template.render(messages[:number], tools, add_generation_prompt=True)
            return begin + _num_equal(between, _tail(prompt))
        # Of a turn that begins the conversation there is no prompt: it begins with what another question's ends with.
        prompt_end = _tail(self._template.render(ASKING, add_generation_prompt=True))
        known = next((end for start in range(len(prompt_end)) if (end := prompt_end[start:]) in between), None)
        return own if known is None else begin + between.rfind(known) + len(known)

    def _end(self, rendering: Rendering, number: int, begin: int, alone: Rendering | None) -> int:
        """One more than the last character of a turn; `alone` is the conversation up to it."""
        first, last = _after(rendering, number, alone)
        first = max(first, begin)
        place = self._end_token(rendering, first, last)
        if place is None:  # what is written after the words whatever follows
            following = rendering.text[first:last]
            return last if last == len(rendering.text) else first + _num_equal(following, _tail(alone) if alone else "")
        return place[1] + len(self._eos_token) * rendering.text.startswith(self._eos_token, place[1], last)

    def _end_token(self, rendering: Rendering, begin: int, end: int) -> tuple[int, int] | None:
        """The special token that ends a turn, after its words: that of an answer, or else the first."""
        answers_end, places = self.end, list(self._specials(rendering, begin, end))
        found = (place for place in places if rendering.text[slice(*place)] == answers_end)
        return next(found, places[0] if places else None)

    def _specials(self, rendering: Rendering, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Special tokens between two characters, none of which anybody but the template wrote."""
        nobody = np.concatenate([[False], rendering.messages[begin:end] == NOBODY, [False]])
        edges = (np.flatnonzero(nobody[1:] != nobody[:-1]) + begin).tolist()
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            yield from (found.span() for found in self._special.finditer(rendering.text, start, stop))


def _speaks(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _is_trained(message: Message) -> bool:
    return bool(message.get("train", True))


def _before(rendering: Rendering, number: int) -> tuple[int, int]:
    """What the template writes between the words before a message and its own: from and to."""
    later = np.flatnonzero((rendering.messages >= number) & (rendering.messages != NOBODY))
    own = int(later[0]) if len(later) else len(rendering.text)
    return _last(rendering.messages[:own] < number) + 1, own


def _after(rendering: Rendering, number: int, alone: Rendering | None = None) -> tuple[int, int]:
    """What the template writes between the words of a message and those that come next: from and to.

    A later message may have them written once more, as results of tools name the call: not more of them than stand in
    the conversation up to this message, `alone`, are of its turn.
    """
    words = None if alone is None else int((alone.messages == number).sum())
    own = np.flatnonzero(rendering.messages == number)[:words]
    first = int(own[-1]) + 1 if len(own) else 0
    later = np.flatnonzero((rendering.messages[first:] >= number) & (rendering.messages[first:] != NOBODY))
    return first, first + int(later[0]) if len(later) else len(rendering.text)


def _tail(rendering: Rendering) -> str:
    """What the template writes after all words."""
    return rendering.text[_last(rendering.messages != NOBODY) + 1 :]


def _last(where: NDArray[np.bool_]) -> int:
    places = np.flatnonzero(where)
    return int(places[-1]) if len(places) else -1


def _num_equal(one: str, other: str) -> int:
    """With how many equal characters two texts begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
