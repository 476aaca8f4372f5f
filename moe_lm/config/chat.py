"""The settings of what fine-tuning reads: conversations and preference pairs, from files and data sets."""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, SerializerFunctionWrapHandler, model_serializer, model_validator

from moe_lm.config.section import Section

ChatFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference"]

# What a row of each format holds. `system` and `tools` may stand in any row.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output", "history"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}
COMMON_FIELDS = ("system", "tools")
ASKS_IN_ONE_TEXT = ("alpaca", "prompt_completion", "preference")


class ChatSource(Section):
    """One set of conversations or pairs; a plain string in its place is a `path`.

    Question and answer under other names are `fields: {prompt: question, completion: answer}`.
    """

    path: str | None = Field(default=None, description="file or glob: .json .jsonl .parquet, also .gz .xz .zst")
    dataset: str | None = Field(default=None, description="anything `datasets.load_dataset` takes")
    subset: str | None = Field(default=None, description="the data set's configuration name")
    split: str = "train"
    format: ChatFormat = Field(default="auto", description="auto: each row tells by its fields")
    fields: dict[str, str] = Field(default={}, description="a format's name of a field: the name that it has here")
    prompt_template: str | None = Field(default=None, description="the user's text, like 'Translate: {prompt}'")
    system: str | None = Field(default=None, description="system prompt of conversations that bring none")
    weight: float | None = Field(default=None, gt=0, description="share of the training rows, relative to the others")

    @model_validator(mode="wrap")
    @classmethod
    def _from_path(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return handler({"path": str(value)} if isinstance(value, str | Path) else value)

    @model_serializer(mode="wrap")
    def _to_path(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.path if self.path is not None and self == ChatSource(path=self.path) else handler(self)

    @property
    def origin(self) -> str:
        """What is read, in words for messages."""
        return self.path or self.dataset or ""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a source needs exactly one of path, dataset")
        if self.dataset is None and (self.subset is not None or self.split != "train"):
            raise ValueError(f"{self.origin}: subset and split belong to a dataset; remove them")
        return self

    @model_validator(mode="after")
    def _fields_belong_to_the_format(self) -> Self:
        known = FIELDS.get(self.format) or tuple(dict.fromkeys(name for names in FIELDS.values() for name in names))
        for name in self.fields:
            if name not in known + COMMON_FIELDS:
                raise ValueError(
                    f"{self.origin}: fields.{name} is no field of format={self.format}; it has "
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
    """What fine-tuning reads: conversations, prompts with targets, or (with `preference`) pairs."""

    train: tuple[ChatSource, ...] = Field(min_length=1)
    validation: tuple[ChatSource, ...] = ()
    validation_fraction: float = Field(default=0.0, ge=0, lt=1, description="held out of `train`, by hash")
    sequence_length: int = Field(default=512, gt=1)
    truncate: Literal["skip", "left"] = Field(
        default="skip", description="too long: skip it, or drop its oldest turns; no answer is ever cut"
    )
    separate_documents: bool = Field(default=True, description="no attention across conversations in a packed row")

    @property
    def weights(self) -> list[float] | None:
        """The shares of the sources, None when every row comes once an epoch."""
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
    """The fields that a prompt template names. Raises ValueError for one that is not like `{name}`."""
    names = set()
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"prompt_template={template!r}: a field is written {{name}}, a brace {{{{ or }}}}")
            names.add(name)
    return names
