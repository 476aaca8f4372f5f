"""The requests of clients: the bodies of the two endpoints, read strictly.

An unknown field that would change the answer is refused by name. Null counts as not given.
"""

from __future__ import annotations

import json
import secrets
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from moe_lm.config.generation import SEEDS, SamplingConfig
from moe_lm.generate.decode import Settings
from moe_lm.generate.strategies import Sampling

# Fields that change no answer: they are accepted and ignored.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls".split()
)
# Fields that are not supported, with the value that asks for nothing.
NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
MOST_CHOICES = 128
MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_NESTING = 100  # far below what chat templates and encoders can follow
TOO_DEEP = f"lists and objects are nested more than {MOST_NESTING} deep; flatten them"
MOST_BIASES = 1024  # each costs time in every step


def read_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(item, str) for item in stops):
        raise ValueError(f"expected a text or up to {MOST_STOPS} of them")
    if "" in stops:
        raise ValueError("an empty text ends every answer before it begins; leave it out")
    return stops


def read_bias_object(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias, which travel as an object whose keys are ids."""
    if not isinstance(value, dict):
        raise ValueError('expected ids as texts, each with a number, like {"42": -100}')
    if len(value) > MOST_BIASES:
        raise ValueError(f"{len(value)} tokens are named, at most {MOST_BIASES} can be; name fewer")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f'{key!r:.40} is not a token id; expected ids as texts, like {{"42": -100}}')
        if type(bias) not in (int, float) or not -sys.float_info.max <= bias <= sys.float_info.max:
            raise ValueError(f"{bias!r:.40} is not a number to add to the logit of token {key}")
    return tuple({int(key): float(bias) for key, bias in value.items()}.items())


def read_prompt(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, as texts or as token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _ids(value):
            return [value]
        if all(isinstance(item, list) and item and _ids(item) for item in value):
            return value
    raise ValueError("expected a text, a list of texts, token ids or a list of lists of token ids, none of them empty")


def _ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


def check_nesting(value: Any) -> Any:
    level = [value]
    for _ in range(MOST_NESTING + 1):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        return {key: item for key, item in values.items() if item is not None} if isinstance(values, dict) else values


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers on the lengths of chunks; it is never sent


class GenerationRequest(Strict, SamplingConfig):
    """The fields of both endpoints: how tokens are chosen, and how they are sent."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    # Any number of 64 bits, as clients draw them; it counts modulo 2**32.
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Annotated[list[str], PlainValidator(read_stop)] = []
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(read_bias_object)] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    routing: bool = False  # the experts behind every token, beside the text

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless(cls, values: Any) -> Any:
        if not isinstance(check_nesting(values), dict):
            return values
        return {
            key: item
            for key, item in values.items()
            if key not in HARMLESS and not (key in NEUTRAL and item == NEUTRAL[key])
        }

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options belongs to a stream; give stream=true too")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The greatest number of tokens that is asked for."""
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """The number of likeliest tokens whose log-probabilities are asked for; None for no log-probabilities."""

    def settings(self, max_new_tokens: int) -> Settings:
        """The decoder's settings; without a seed, with a random one."""
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS
        return Settings(max_new_tokens, Sampling.of(self), seed, logprobs=self.alternatives, routing=self.routing)


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(read_prompt)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo gives no log-probabilities of a prompt; leave out echo or logprobs")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


def read_content(value: Any) -> Any:
    """A message's text, which may come in parts."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(value):
        raise ValueError("only text is understood; expected a text or parts of type text")
    return "".join(known)


def read_arguments(value: Any) -> Any:
    """The arguments of a call of a tool, which travel as JSON in a text."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"expected a JSON object as text ({error})") from error
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not isinstance(parsed, dict):
        raise ValueError("expected a JSON object as text")
    return check_nesting(parsed)


class Function(Strict):
    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(read_arguments)]


class ToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Strict):
    """A message as clients send it, answers that they got included."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(read_content)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: item for key, item in values.items() if not (key == "annotations" and item == [])}

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        for name, role in (("name", "tool"), ("tool_call_id", "tool"), ("tool_calls", "assistant")):
            if getattr(self, name) and self.role != role:
                raise ValueError(f"{name} means something only in a message of role {role}; leave it out")
        return self

    def for_template(self) -> dict[str, Any]:
        values = self.model_dump(exclude_none=True) | {"content": self.content}
        if self.role == "assistant":
            values["train"] = False  # finding out what would be trained on takes a rendering for each of its messages
        return values | {"role": "system" if self.role == "developer" else self.role}


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs; give logprobs=true too")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
