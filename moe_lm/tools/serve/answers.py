"""The bodies of answers, whole or in chunks, as OpenAI's endpoints shape them.

A choice also has `routing` when the request asks for it: the experts that predicted every token, by MoE layer.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

from moe_lm.generate.decode import Step
from moe_lm.generate.text import Delta
from moe_lm.tools.serve.requests import GenerationRequest

LEAST_LOGPROB = -9999.0  # OpenAI's for a token that is all but impossible; JSON has no -inf
Name = Callable[[int], str]  # from a token's id to its text
Json = dict[str, Any]


class Answer(ABC):
    """The answer to one request; its subclasses are the shapes of the two endpoints."""

    object: str  # of a whole answer
    chunk_object: str
    prefix: str  # of its id

    def __init__(self, body: GenerationRequest, model: str, name: Name, prompt_tokens: int) -> None:
        self.name, self.prompt_tokens = name, prompt_tokens
        self.logprobs, self.routing = body.alternatives is not None, body.routing
        self.include_usage = body.stream_options.include_usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, deltas: Sequence[Delta]) -> str:
        """The whole answer as JSON. It is encoded a choice at a time, as the encoder lets no other thread run."""
        choices = ",".join(dumps(self._choice(self.message, part)) for part in _by_row(deltas))
        around = self._head | {"object": self.object, "usage": self.usage(written(deltas))}
        return f'{dumps(around)[:-1]},"choices":[{choices}]}}'

    def opening(self, rows: int) -> list[Json]:
        """The chunks that begin a stream."""
        return []

    def chunks(self, deltas: Sequence[Delta]) -> list[Json]:
        """A chunk for each row that has something new."""
        return [self._chunk([self._choice(self.delta, part)]) for part in _by_row(deltas) if self._says_something(part)]

    def usage_chunk(self, tokens: int) -> Json:
        """The chunk that ends a stream of `tokens` tokens."""
        return self._chunk([]) | {"usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    @abstractmethod
    def message(self, text: str) -> Json:
        """The text in a choice of a whole answer."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """The text in a choice of a chunk."""

    @abstractmethod
    def log_probabilities(self, steps: Sequence[Step], starts: Sequence[int]) -> Json:
        """The log-probabilities of tokens and of the likeliest ones beside each; `starts` are offsets in the text."""

    def _chunk(self, choices: list[Json]) -> Json:
        usage: Json = {"usage": None} if self.include_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | usage

    def _choice(self, shape: Callable[[str], Json], part: Sequence[Delta]) -> Json:
        # OpenAI has no word for a text whose penalties leave no token: it has ended.
        finish = "stop" if part[-1].finish == "exhausted" else part[-1].finish
        chosen = [delta for delta in part if delta.step.token is not None]
        steps, starts = [delta.step for delta in chosen], [delta.start for delta in chosen]
        logprobs = self.log_probabilities(steps, starts) if self.logprobs else None
        choice: Json = {"index": part[0].row} | shape("".join(delta.text for delta in part))
        choice |= {"logprobs": logprobs, "finish_reason": finish}
        return choice | ({"routing": [step.experts for step in steps]} if self.routing else {})

    def _says_something(self, part: Sequence[Delta]) -> bool:
        """Whether there is anything to send: half a character, or the beginning of a stop string, is not sent yet."""
        return bool(self.logprobs or self.routing or part[-1].finish or any(delta.text for delta in part))


class CompletionAnswer(Answer):
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def message(self, text: str) -> Json:
        return {"text": text}

    delta = message

    def log_probabilities(self, steps: Sequence[Step], starts: Sequence[int]) -> Json:
        return {
            "tokens": [self.name(_token(step)) for step in steps],
            "token_logprobs": [_finite(step.logprob) for step in steps],
            "top_logprobs": [self._likeliest(step) for step in steps],
            "text_offset": list(starts),
        }

    def _likeliest(self, step: Step) -> dict[str, float]:
        """Log-probabilities by text, of equal texts the likeliest; the token itself is among them."""
        found: dict[str, float] = {}
        for token, logprob in [*step.alternatives, (_token(step), step.logprob)]:
            found.setdefault(self.name(token), _finite(logprob))
        return found


class ChatAnswer(Answer):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, rows: int) -> list[Json]:
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": row} | start]) for row in range(rows)]

    def message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def log_probabilities(self, steps: Sequence[Step], starts: Sequence[int]) -> Json:
        content = []
        for step in steps:
            best = [self._probable(token, logprob) for token, logprob in step.alternatives]
            content.append(self._probable(_token(step), step.logprob) | {"top_logprobs": best})
        return {"content": content, "refusal": None}

    def _probable(self, token: int, logprob: float | None) -> Json:
        text = self.name(token)
        # U+FFFD stands for bytes that are not a whole character.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": as_bytes}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def written(deltas: Sequence[Delta]) -> int:
    """The number of tokens in them."""
    return sum(delta.step.token is not None for delta in deltas)


def _by_row(deltas: Sequence[Delta]) -> list[list[Delta]]:
    row = attrgetter("row")
    return [list(part) for _, part in groupby(sorted(deltas, key=row), row)]


def _token(step: Step) -> int:
    assert step.token is not None
    return step.token


def _finite(logprob: float | None) -> float:
    assert logprob is not None
    return max(logprob, LEAST_LOGPROB)
