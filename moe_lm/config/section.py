"""A group of settings, and the checks that several groups make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


@dataclass(frozen=True)
class Flag:
    """The placeholder and the environment variable of a field's flag on the command line."""

    metavar: str | None = None
    envvar: str | None = None


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know.

    One declaration serves everywhere: the field is the key in YAML and in `key=value`, the flag of the verbs that take
    the section (cli/options.py), the field of an HTTP request and the line in docs/config.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        if isinstance(value, bool):
            kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{str(value).lower()} is not a number; give one")
        return value

    def is_set(self, name: str) -> bool:
        """Whether a field differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default())

    def refuse_any(self, names: Iterable[str], why: str) -> None:
        """Raise ValueError for the first of these fields that is set: `name=value why`."""
        for name in names:
            if self.is_set(name):
                raise ValueError(f"{name}={getattr(self, name)} {why}")

    def require_all(self, names: Iterable[str], owner: str) -> None:
        """Raise ValueError for the first of these fields that is None: `owner needs name; set it`."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"{owner} needs {name}; set it")

    def require_divisor(self, name: str, divisor: int, other: str) -> None:
        """Raise ValueError unless `name`, whose value is `divisor`, divides the field `other`."""
        whole = getattr(self, other)
        if whole % divisor:
            raise ValueError(f"{name}={divisor} does not divide {other}={whole}; choose a divisor")

    def require_at_most(self, name: str, other: str) -> None:
        """Raise ValueError when the number `name` is greater than the number `other`."""
        value, limit = getattr(self, name), getattr(self, other)
        if value > limit:
            raise ValueError(f"{name}={value} is more than {other}={limit}; choose at most {limit}")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a union consists of, without what annotates them."""
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    if get_origin(annotation) in (tuple, list, dict):
        return
    if not inner:
        yield annotation
    for item in inner:
        yield from _kinds(item)
