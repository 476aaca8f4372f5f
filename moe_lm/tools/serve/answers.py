"""The bodies of answers, whole or in chunks, as OpenAI's endpoints shape them.

A choice also has `routing` when the request asks for it: the experts that predicted every token, by MoE layer.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_lm.generate.decode import Step
from moe_lm.generate.text import Delta

LEAST_LOGPROB = -9999.0  # OpenAI's for a token that is all but impossible; JSON has no -inf
Name = Callable[[int], str]  # from a token's id to its text


class Shape(Protocol):
    """How one of the endpoints writes the choices of its answers."""

    object: str  # of a whole answer
    chunk_object: str
    prefix: str  # of its id

    def whole(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]: ...
    def chunk(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]: ...
    def logprobs(self, deltas: Sequence[Delta], name: Name) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    shape: Shape
    model: str
    name: Name
    prompt_tokens: int
    logprobs: bool
    routing: bool
    include_usage: bool = False  # in a stream
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, deltas: Sequence[Delta]) -> str:
        """The whole answer as JSON. It is encoded a choice at a time, as the encoder lets no other thread run."""
        choices = ",".join(dumps(self._choice(self.shape.whole, part)) for part in _by_row(deltas))
        around = self._around(self.shape.object, []) | {"usage": self.usage(written(deltas))}
        del around["choices"]
        return f'{dumps(around)[:-1]},"choices":[{choices}]}}'

    def chunks(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """A chunk for each row that has something new."""
        parts = [part for part in _by_row(deltas) if self._says_something(part)]
        return [self.chunk([self._choice(self.shape.chunk, part)]) for part in parts]

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._around(self.shape.chunk_object, choices) | ({"usage": None} if self.include_usage else {})

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def usage_chunk(self, tokens: int) -> dict[str, Any]:
        return self.chunk([]) | {"usage": self.usage(tokens)}

    def _around(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        number = f"{self.shape.prefix}-{self.number}"
        return {"id": number, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}

    def _choice(self, write: Callable[[str, str | None, Any], dict[str, Any]], part: Sequence[Delta]) -> dict[str, Any]:
        # OpenAI has no word for a text whose penalties leave no token: it has ended.
        finish = "stop" if part[-1].finish == "exhausted" else part[-1].finish
        chosen = [delta for delta in part if delta.step.token is not None]
        logprobs = self.shape.logprobs(chosen, self.name) if self.logprobs else None
        choice = {"index": part[0].row} | write("".join(delta.text for delta in part), finish, logprobs)
        return choice | ({"routing": [delta.step.experts for delta in chosen]} if self.routing else {})

    def _says_something(self, part: Sequence[Delta]) -> bool:
        """Whether there is anything to send: half a character, or the beginning of a stop string, is not sent yet."""
        return bool(self.logprobs or self.routing or part[-1].finish or any(delta.text for delta in part))


class CompletionShape:
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs, "finish_reason": finish}

    chunk = whole

    def logprobs(self, deltas: Sequence[Delta], name: Name) -> dict[str, Any]:
        return {
            "tokens": [name(_token(delta.step)) for delta in deltas],
            "token_logprobs": [_finite(delta.step.logprob) for delta in deltas],
            "top_logprobs": [self._likeliest(delta.step, name) for delta in deltas],
            "text_offset": [delta.start for delta in deltas],
        }

    def _likeliest(self, step: Step, name: Name) -> dict[str, float]:
        """Log-probabilities by text, of equal texts the likeliest; the token itself is among them."""
        found: dict[str, float] = {}
        for token, logprob in [*step.alternatives, (_token(step), step.logprob)]:
            found.setdefault(name(token), _finite(logprob))
        return found


class ChatShape:
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """The first choice of a stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, deltas: Sequence[Delta], name: Name) -> dict[str, Any]:
        content = []
        for delta in deltas:
            best = [self._probable(token, logprob, name) for token, logprob in delta.step.alternatives]
            own = self._probable(_token(delta.step), delta.step.logprob, name)
            content.append(own | {"top_logprobs": best})
        return {"content": content, "refusal": None}

    def _probable(self, token: int, logprob: float | None, name: Name) -> dict[str, Any]:
        text = name(token)
        # U+FFFD stands for bytes that are not a whole character.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": as_bytes}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def written(deltas: Sequence[Delta]) -> int:
    """The number of tokens in them."""
    return sum(delta.step.token is not None for delta in deltas)


def _by_row(deltas: Sequence[Delta]) -> list[list[Delta]]:
    rows: dict[int, list[Delta]] = {}
    for delta in deltas:
        rows.setdefault(delta.row, []).append(delta)
    return [rows[row] for row in sorted(rows)]


def _token(step: Step) -> int:
    assert step.token is not None
    return step.token


def _finite(logprob: float | None) -> float:
    assert logprob is not None
    return max(logprob, LEAST_LOGPROB)
