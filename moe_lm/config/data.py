"""The settings of what is read: documents, token shards, conversations and preference pairs."""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from moe_lm.common.errors import UsageError
from moe_lm.common.storage import text_of
from moe_lm.config.section import Section

ChatFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference"]
OnDamage = Literal["stop", "leave_out"]

# The fields of a row in each format. `system` and `tools` may stand in any row.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output", "history"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}
COMMON_FIELDS = ("system", "tools")
ASKS_IN_ONE_TEXT = ("alpaca", "prompt_completion", "preference")


class TokenFiles(Section):
    """Files of token ids that another program wrote; they are read where they are."""

    path: str = Field(
        description="file, folder or glob: Megatron's .bin with .idx, OLMo's .npy, nanoGPT's and llm.c's .bin, "
        "datatrove's .ds"
    )
    dtype: Literal["uint16", "uint32"] | None = Field(
        default=None, description="type of an id in files that do not say it; null: the smaller that holds every id"
    )
    validation: str | None = Field(
        default=None,
        description="file, folder or glob of held-out tokens; null: val.bin beside train.bin, else the last "
        "data.validation_fraction of the tokens",
    )


class SourceConfig(Section):
    """Documents: local files (`path`), a `datasets` data set (`dataset`), Python's standard library (`stdlib`), or
    files that are tokens already (`tokens`).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in reports, and of its shards' folder")
    path: str | None = Field(
        default=None,
        description="file, folder or glob, also s3://bucket/x/*.jsonl.zst: .txt .md .py .jsonl .json .parquet",
    )
    dataset: str | None = Field(default=None, description="anything that `datasets.load_dataset` takes")
    subset: str | None = Field(default=None, description="the data set's configuration name")
    split: str = Field(default="train", description="the data set's split")
    text_field: str = Field(default="text", description="field of a row that holds the text")
    stdlib: bool = Field(default=False, description="read the source of the running Python's standard library")
    tokens: TokenFiles | None = Field(default=None, description="token files that another program wrote")
    weight: float = Field(default=1.0, gt=0, description="share of the training sequences, relative to other sources")
    max_bytes: int | None = Field(default=None, gt=0, description="bytes of text to stop after; null: read everything")
    piece_bytes: int = Field(
        default=64 << 10,
        ge=256,
        description="bytes after which a longer text file is cut, at a blank line, into pieces, each held out or not",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = (self.path is not None, self.dataset is not None, self.stdlib, self.tokens is not None)
        if sum(origins) != 1:
            raise ValueError(f"source {self.name!r} needs exactly one of path, dataset, stdlib, tokens")
        if self.tokens is not None:
            self.refuse_any(
                ("text_field", "max_bytes", "piece_bytes"), f"is for text, and source {self.name!r} is token files"
            )
        if self.dataset is None and (self.is_set("subset") or self.is_set("split")):
            raise ValueError(f"source {self.name!r}: subset and split belong to a dataset; remove them")
        return self


class TokenizerRecipe(Section):
    """A byte-level BPE tokenizer and the text that `tokenizer train` learns it from."""

    output: Path = Field(description="folder for tokenizer.json, tokenizer_config.json and the chat template")
    vocab_size: int = Field(gt=262, description="ids in all: special tokens, 256 bytes and merges")
    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="text to learn from")
    validation_fraction: float = Field(default=0, ge=0, lt=1, description="share of documents to leave out, by hash")

    @model_validator(mode="after")
    def _all_is_text(self) -> Self:
        for source in self.sources:
            if source.tokens is not None:
                raise ValueError(f"source {source.name!r} is token files, which hold no text to learn from; remove it")
        return self


class PhaseConfig(Section):
    """A share of the run with its own mix of sources and row length. A step has as many tokens in every phase."""

    share: float = Field(gt=0, le=1, description="share of the run's steps; those of all phases add up to 1")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="by source, shares of the training sequences; a source that is left out, or has 0, is not read; "
        "empty: those of the sources",
    )
    sequence_length: int | None = Field(
        default=None, gt=1, description="tokens of a row; null: data.sequence_length, which evaluations always use"
    )


class Phase(NamedTuple):
    """A phase of a run, from its first step (counted from 0) on."""

    first_step: int
    rows: int  # of the global batch
    sequence_length: int
    weights: tuple[float, ...]  # of the sources, in their order


class DataConfig(Section):
    """Documents that `prepare` turns into token shards, and the rows that pretraining reads from them."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="text to train on")
    tokenizer: Path = Field(
        description="folder of the tokenizer, or a name of the hub, like Qwen/Qwen3-0.6B; may be left out with "
        "start_from"
    )
    shards: Annotated[Path, PlainSerializer(text_of, when_used="json")] = Field(
        description="folder of token shards, one subfolder a source; of training also a URL, like s3://bucket/shards"
    )
    cache_bytes: int = Field(
        default=100 << 30,
        ge=0,
        description="bytes of local disk for the shards of a URL; those that do not fit are read by ranges",
    )
    validation_fraction: float = Field(default=0.01, ge=0, lt=1, description="share of documents held out, by hash")
    sequence_length: int = Field(default=512, gt=1, description="tokens of a row")
    separate_documents: bool = Field(default=True, description="no attention across documents packed into one row")
    phases: tuple[PhaseConfig, ...] = Field(
        default=(), description="mixes and row lengths at shares of the run, one after the other; none: one for all"
    )
    on_damage: OnDamage = Field(
        default="stop",
        description="what becomes of a damaged shard: the run stops and names it, or goes on without its tokens",
    )
    verify: bool = Field(
        default=False,
        description="check every shard's contents at the start of training, each rank its share; else only sizes",
    )
    drop_duplicates: bool = Field(
        default=False,
        description="leave out documents whose text came before, in the source or in those before it; `prepare` then "
        "reads all text twice",
    )
    workers: int | None = Field(default=None, gt=0, description="processes of `prepare` a host; null: one a core")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        return self

    @model_validator(mode="after")
    def _phases_add_up(self) -> Self:
        if not self.phases:
            return self
        total, names = sum(phase.share for phase in self.phases), [source.name for source in self.sources]
        if abs(total - 1) > 1e-6:
            raise ValueError(f"phases: their shares add up to {total:g}, expected 1; change one of them")
        for number, phase in enumerate(self.phases, 1):
            if strange := [name for name in phase.weights if name not in names]:
                raise ValueError(f"phases: phase {number} reads {strange[0]!r}; the sources are {', '.join(names)}")
            if not any(self._weights_in(phase)):
                raise ValueError(f"phases: phase {number} reads no source; give one of its weights more than 0")
            if self.longest % (length := self._length_in(phase)):
                raise ValueError(
                    f"phases: sequence_length={length} of phase {number} does not divide that of the longest phase, "
                    f"{self.longest}; choose a divisor"
                )
        for name, weights in zip(names, zip(*map(self._weights_in, self.phases), strict=True), strict=True):
            if not any(weights):
                raise ValueError(f"phases: none reads source {name!r}; give it a weight, or remove it from sources")
        return self

    @property
    def longest(self) -> int:
        """Tokens of a row to train on in the phase with the longest rows."""
        return max(map(self._length_in, self.phases), default=self.sequence_length)

    @property
    def lengths(self) -> set[int]:
        """Tokens of the rows in all phases and in evaluations."""
        return {self.sequence_length, *map(self._length_in, self.phases)}

    def phases_over(self, steps: int, rows: int) -> tuple[Phase, ...]:
        """The phases of a run of so many steps, of `rows` of `sequence_length` or as many tokens; one without `phases`.

        Raises UsageError for a phase without a step.
        """
        phases = self.phases or (PhaseConfig(share=1),)
        bounds = [round(steps * sum(phase.share for phase in phases[:number])) for number in range(len(phases))]
        for number, (first, end) in enumerate(zip(bounds, [*bounds[1:], steps], strict=True), 1):
            if first >= end:
                raise UsageError(
                    f"phase {number} of data.phases has no step: its share of train.steps={steps} is "
                    f"{phases[number - 1].share}; give it a larger share"
                )
        return tuple(
            Phase(first, rows * self.sequence_length // self._length_in(phase), self._length_in(phase), weights)
            for first, phase, weights in zip(bounds, phases, map(self._weights_in, phases), strict=True)
        )

    def _length_in(self, phase: PhaseConfig) -> int:
        return phase.sequence_length or self.sequence_length

    def _weights_in(self, phase: PhaseConfig) -> tuple[float, ...]:
        return tuple(phase.weights.get(s.name, 0.0) if phase.weights else s.weight for s in self.sources)


class ChatSource(Section):
    """One set of conversations or pairs; a plain string in its place is a `path`.

    Question and answer under other names are `fields: {prompt: question, completion: answer}`.
    """

    path: str | None = Field(
        default=None, description="file or glob, here or in a store: .json .jsonl .parquet, also .gz .xz .zst"
    )
    dataset: str | None = Field(default=None, description="anything that `datasets.load_dataset` takes")
    subset: str | None = Field(default=None, description="the data set's configuration name")
    split: str = Field(default="train", description="the data set's split")
    format: ChatFormat = Field(default="auto", description="form of a row; auto: told by each row's fields")
    fields: dict[str, str] = Field(default={}, description="names that the format's fields have in this source")
    prompt_template: str | None = Field(default=None, description="the user's text, like 'Translate: {prompt}'")
    system: str | None = Field(default=None, description="system prompt of conversations that have none")
    weight: float | None = Field(default=None, gt=0, description="share of the training rows, relative to others")

    @model_validator(mode="wrap")
    @classmethod
    def _from_path(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return handler({"path": str(value)} if isinstance(value, str | Path) else value)

    @model_serializer(mode="wrap")
    def _to_path(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.path if self.path is not None and self == ChatSource(path=self.path) else handler(self)

    @property
    def origin(self) -> str:
        """The path or the data set, for messages."""
        return self.path or self.dataset or ""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a source needs exactly one of path, dataset")
        if self.dataset is None and (self.is_set("subset") or self.is_set("split")):
            raise ValueError(f"{self.origin}: subset and split belong to a dataset; remove them")
        return self

    @model_validator(mode="after")
    def _fields_belong_to_the_format(self) -> Self:
        known = FIELDS.get(self.format) or tuple(dict.fromkeys(name for names in FIELDS.values() for name in names))
        for name in self.fields:
            if name not in known + COMMON_FIELDS:
                raise ValueError(
                    f"{self.origin}: fields.{name} is not a field of format={self.format}; it has "
                    f"{', '.join(known + COMMON_FIELDS)}"
                )
        return self

    @model_validator(mode="after")
    def _template_can_be_filled(self) -> Self:
        if self.prompt_template is None:
            return self
        if self.format not in ASKS_IN_ONE_TEXT:
            raise ValueError(
                f"{self.origin}: prompt_template needs format={' or '.join(ASKS_IN_ONE_TEXT)}, where the user asks in "
                f"one text; set it, or take prompt_template away from format={self.format}"
            )
        if not template_fields(self.prompt_template):
            raise ValueError(
                f"{self.origin}: prompt_template={self.prompt_template!r} has no field; write one, like {{prompt}}"
            )
        return self


class ChatDataConfig(Section):
    """Conversations, prompts with answers, or (with `preference`) pairs of answers that fine-tuning reads."""

    train: tuple[ChatSource, ...] = Field(min_length=1, description="rows to train on")
    validation: tuple[ChatSource, ...] = Field(default=(), description="rows to evaluate on")
    validation_fraction: float = Field(default=0.0, ge=0, lt=1, description="share of `train` held out, by hash")
    sequence_length: int = Field(
        default=512, gt=1, description="tokens of a row; with pairs, of each side: prompt plus answer"
    )
    truncate: Literal["skip", "left"] = Field(
        default="skip",
        description="what becomes of a conversation that is too long: it is skipped, or loses its oldest turns; an "
        "answer is never cut",
    )
    separate_documents: bool = Field(default=True, description="no attention across conversations packed into one row")

    @property
    def weights(self) -> list[float] | None:
        """The shares of the sources; None when every row comes once an epoch."""
        weights = [source.weight for source in self.train if source.weight is not None]
        return weights or None

    @model_validator(mode="after")
    def _weights_have_a_use(self) -> Self:
        given = [source.weight is not None for source in self.train]
        if any(given) and not all(given):
            lacking = self.train[given.index(False)].origin
            raise ValueError(
                f"train: {lacking} has no weight and another source has one; give all of them one, or none"
            )
        for source in self.validation:
            if source.weight is not None:
                raise ValueError(f"validation: {source.origin} has a weight, but all of it is read; remove the weight")
        return self


def template_fields(template: str) -> set[str]:
    """The fields that a prompt template names. Raises ValueError for a field that is not written like `{name}`."""
    names = set()
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"prompt_template={template!r}: a field is written {{name}}, a brace {{{{ or }}}}")
            names.add(name)
    return names
