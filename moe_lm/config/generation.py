"""The settings of verbs without a YAML file: how tokens are chosen, where weights lie, what a server answers, and more.

Each is a flag of the verbs that take its section; the requests that the server reads inherit `SamplingConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from moe_lm.config.section import Flag, Section

Temperature = Annotated[
    float,
    Field(ge=0, description="sampling temperature; 0: greedy"),
]
Penalty = float
SEEDS = 1 << 32


def read_bias_texts(value: Any) -> Any:
    """Pairs of token id and bias, from texts like `42=-inf`."""
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        return value
    try:
        return tuple((int(token), float(bias)) for token, _, bias in (item.partition("=") for item in value))
    except ValueError as error:
        raise ValueError("expected ID=BIAS, a token's id and a number, like 42=-inf") from error


def check_bias(pairs: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """Raise ValueError for a pair that no logit can take, or an id that is there twice."""
    for token, bias in pairs:
        if token < 0 or math.isnan(bias) or bias == math.inf:
            raise ValueError(f"{token}={bias} is not an id with a number below infinity")
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an id is named twice; give each once")
    return pairs


def split(value: Any) -> tuple[str, ...]:
    """The items of an option that may be repeated, each with commas between several."""
    texts = [value] if isinstance(value, str) else value
    return tuple(name.strip() for text in texts for name in str(text).split(",") if name.strip())


class SamplingConfig(Section):
    """How the next token is chosen: penalties, temperature and filters, in this order, then a draw.

    Without values nothing changes the model's own distribution.
    """

    temperature: Temperature = 1.0
    top_k: int | None = Field(default=None, ge=1, description="keep only the K most likely tokens")
    top_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="nucleus sampling: keep the most likely tokens that hold this probability mass",
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="keep tokens with at least this fraction of the top token's probability"
    )
    typical_p: float | None = Field(
        default=None, ge=0, le=1, description="locally typical sampling: keep this probability mass"
    )
    repetition_penalty: Penalty = Field(
        default=1.0, gt=0, description="above 1 penalises tokens already in the prompt or output"
    )
    presence_penalty: Penalty = Field(
        default=0.0, description="subtract this once from the logit of a token already generated"
    )
    frequency_penalty: Penalty = Field(
        default=0.0, description="subtract this for each time that a token was generated"
    )
    no_repeat_ngram: int | None = Field(
        default=None, ge=1, description="never repeat an n-gram of this length, of prompt or output"
    )
    logit_bias: Annotated[
        tuple[tuple[int, Annotated[float, Field(allow_inf_nan=True)]], ...],
        BeforeValidator(read_bias_texts),
        AfterValidator(check_bias),
        Flag(metavar="ID=BIAS"),
    ] = Field(default=(), description="add BIAS to the logit of token ID; -inf bans it; may be repeated")


class GenerationConfig(SamplingConfig):
    """How `sample` and `chat` choose tokens, and how long a text becomes."""

    temperature: Temperature = 0.8
    seed: int | None = Field(default=None, ge=0, lt=SEEDS, description="same seed, same text; default: random")
    max_new_tokens: int = Field(default=200, ge=1, description="stop after this many tokens")
    min_new_tokens: int = Field(default=0, ge=0, description="do not stop before this many tokens")

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        self.require_at_most("min_new_tokens", "max_new_tokens")
        return self


class SampleConfig(GenerationConfig):
    """The texts that `sample` writes."""

    num: int = Field(default=1, ge=1, description="samples per prompt; with --beams, the best ones")
    greedy: bool = Field(default=False, description="always take the most likely token, as with --temperature 0")
    beams: int | None = Field(default=None, ge=1, description="beam search with this many beams, instead of sampling")
    length_penalty: float = Field(
        default=1.0, description="with --beams: above 0 favours longer texts, below 0 shorter ones"
    )
    stop: tuple[str, ...] = Field(default=(), description="stop before this text; may be repeated")
    logprobs: Annotated[int | None, Flag(metavar="[N]")] = Field(
        default=None, ge=0, description="add the log-probability of each token, and of the N most likely ones"
    )
    show_routing: Annotated[int | None, Flag(metavar="[LAYER]")] = Field(
        default=None,
        ge=-1,
        description="colour tokens by their strongest expert in LAYER, counted from 0; default: the last",
    )

    @model_validator(mode="before")
    @classmethod
    def _greedy_is_temperature_0(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("greedy"):
            return values
        if "temperature" in values:
            raise ValueError(f"temperature={values['temperature']} draws and --greedy never does; give one of them")
        return values | {"temperature": 0.0}

    def is_set(self, name: str) -> bool:
        """Whether a flag was given, be it at its default: no flag is silently ignored."""
        return name in self.model_fields_set

    @model_validator(mode="after")
    def _equal_texts_are_not_asked_for(self) -> Self:
        if self.num > 1 and self.temperature == 0 and self.beams is None:
            raise ValueError(
                f"num={self.num} texts would be equal, as nothing is drawn; leave one out, or give beams too"
            )
        return self

    @model_validator(mode="after")
    def _beams_draw_nothing(self) -> Self:
        if self.beams is None:
            self.refuse_any(["length_penalty"], "belongs to a beam search; give --beams too")
            return self
        drawing = ("top_k", "top_p", "seed", "min_p", "typical_p", "logprobs", "show_routing", "greedy", "temperature")
        self.refuse_any(drawing, "has no meaning with --beams, which draws nothing; leave it out")
        if self.num > self.beams:
            raise ValueError(f"num={self.num} is more than beams={self.beams}, which find one text each; lower it")
        return self


class LoadConfig(Section):
    """The weights that `sample`, `chat` and `serve` use, and where they lie."""

    device: str = Field(default="auto", description="device: auto, cuda, mps or cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype of weights and cache; auto: as stored, if the device is fast in it; bfloat16 takes half the "
        "memory of float32, with slightly different outputs",
    )
    device_map: Literal["auto"] | None = Field(
        default=None, description="spread the weights over devices, host memory and disk"
    )
    max_memory: Annotated[tuple[str, ...], Flag(metavar="DEVICE=SIZE")] = Field(
        default=(), description="with --device-map: memory limit, like cpu=4GiB or 0=20GiB; may be repeated"
    )
    offload_folder: Path | None = Field(
        default=None, description="with --device-map: folder for weights offloaded to disk"
    )
    base: Path | None = Field(default=None, description="path of the adapters' base run, if it has moved")

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        if self.device_map is None:
            for name in ("max_memory", "offload_folder"):
                if self.is_set(name):
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"{flag} belongs to a model on several devices; give --device-map auto too")
        else:
            self.refuse_any(["device"], "names one device and --device-map takes all; give one of them")
        return self


class CompiledLoadConfig(LoadConfig):
    """The same for `sample` and `serve`, which make one decoder; `chat` makes a new one for each answer."""

    compile: bool = Field(
        default=False,
        description="compile decoding (for GPUs; takes tens of seconds at the start)",
    )

    @model_validator(mode="after")
    def _compiled_on_one_device(self) -> Self:
        if self.device_map is not None:
            self.refuse_any(["compile"], "and --device-map do not go together; leave one of them out")
        return self


class ServeConfig(Section):
    """Where `serve` listens, and what it answers at most."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all of this machine's addresses")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    api_key: Annotated[str | None, Flag(envvar="MOE_LM_API_KEY")] = Field(
        default=None, description="key that clients must send as a Bearer token"
    )
    max_concurrent: int = Field(default=32, ge=1, description="maximum batch: texts generated at the same time")
    max_queue: int = Field(default=256, ge=0, description="maximum queue length; more are refused with status 429")
    max_context: int | None = Field(
        default=None, ge=2, description="context length, prompt and answer in tokens; default: the model's"
    )
    max_tokens: int | None = Field(default=None, ge=1, description="limit of new tokens per request")
    timeout: float = Field(default=600.0, ge=0.001, description="time limit of a request, in seconds")
    model_name: str | None = Field(default=None, description="model's name for clients; default: the run folder's name")

    @model_validator(mode="after")
    def _key_fits_a_header(self) -> Self:
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("--api-key is empty or has a character that no header can carry; give printable ASCII")
        return self


class TasksConfig(Section):
    """The tasks that `eval` runs, and how."""

    tasks: Annotated[tuple[str, ...], Flag(metavar="NAME,NAME")] = Field(
        default=(), description="evaluate on these tasks of lm-eval or of eval/tasks, in place of text; may be repeated"
    )
    limit: float | None = Field(
        default=None, gt=0, description="with --tasks: examples per task; below 1, a fraction of them"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="with --tasks: few-shot examples; default: the task's"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="with --tasks: batch size; default: what holds 16,384 tokens"
    )
    apply_chat_template: bool = Field(
        default=False, description="with --tasks: put each question into the chat template"
    )
    task_data: Path | None = Field(
        default=None, description="with --tasks: folder with the files of the tasks in eval/tasks; default: data/tasks"
    )
    output: Path | None = Field(
        default=None, description="with --tasks: file for the results and every example's answers, as JSON"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split(value)

    @model_validator(mode="after")
    def _belong_to_tasks(self) -> Self:
        if not self.tasks:
            self.refuse_any([name for name in type(self).model_fields if name != "tasks"], "belongs to --tasks")
        if self.limit is not None and self.limit >= 1 and self.limit % 1:
            raise ValueError(f"limit={self.limit} is no number of examples; give a whole number, or a share below 1")
        return self


class NeedleConfig(Section):
    """The grid of lengths and depths at which `eval` looks for a fact."""

    needle: bool = Field(
        default=False, description="measure how often the model finds a fact far back in its context, in place of text"
    )
    lengths: Annotated[tuple[int, ...], Flag(metavar="TOKENS,TOKENS")] = Field(
        default=(),
        description="with --needle: tokens of the texts; default: a row of its training, or the model's positions, and "
        "halves of it down to an eighth; may be repeated",
    )
    depths: int = Field(default=5, ge=1, description="with --needle: places of the fact, from beginning to end")
    trials: int = Field(default=16, ge=1, description="with --needle: texts for each length and depth")

    @field_validator("lengths", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return split(value)

    @model_validator(mode="after")
    def _belong_to_the_needle(self) -> Self:
        if not self.needle:
            self.refuse_any(("lengths", "depths", "trials"), "belongs to --needle")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths={','.join(map(str, self.lengths))} has one twice; give each once")
        return self


class UpcycleConfig(Section):
    """How `upcycle` cuts and copies the feed-forward layers of a dense model."""

    experts: int = Field(default=8, ge=1, description="routed experts per layer")
    per_token: int = Field(default=2, ge=1, description="experts per token")
    split: int = Field(default=1, ge=1, description="split each feed-forward layer into N smaller experts; 1: copies")
    shared: int = Field(default=0, ge=0, description="how many of the N of --split become shared experts")
    first_dense: int = Field(default=0, ge=0, description="first layers that stay dense")
    seed: int = Field(default=1234, ge=0, lt=2**63, description="seed of the new router")

    @property
    def pieces(self) -> int:
        """The number of routed experts that together are one copy of a feed-forward layer."""
        return self.split - self.shared

    @property
    def factor(self) -> int:
        """The factor on the last matrices of the routed experts."""
        return 1 if self.shared else self.pieces
