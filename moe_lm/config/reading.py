"""Reads a config: a YAML file, sections in files of their own, overrides, and errors that say what to do.

A section may be written in place, or be the path of a file (relative to the config) that holds it:
`model: ../model/deepseekmoe.yaml`. On the command line `section.key=value` overrides, with the value read as YAML;
`model=configs/model/switch.yaml` takes another file, relative to the working folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from moe_lm.common.errors import UsageError
from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.section import Section
from moe_lm.config.strict_yaml import MOST_CHARACTERS, parse_section, parse_yaml
from moe_lm.config.training import LENGTHS

ConfigT = TypeVar("ConfigT", bound=Section)


# Settings that are gone: the value that changed nothing, which configs of older versions hold, and what to do instead.
REMOVED: dict[tuple[type[BaseModel], str], tuple[Any, str]] = {
    (ModelConfig, "moe_layer_freq"): (1, "remove it, and name the dense layers in mlp_only_layers"),
    (LoraConfig, "rank_stabilised"): (False, "remove it, and multiply alpha by the root of rank"),
    (TokenizerRecipe, "max_token_bytes"): (16, "remove it; tokens have at most 16 bytes"),
    (ParallelConfig, "deepspeed"): (
        {},
        "remove it, and set zero_stage and offload_optimizer, from which DeepSpeed's JSON follows",
    ),
}


def load_config(kind: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `section.key=value` overrides and check everything.

    Raises UsageError naming the key, its value and what was expected; for an unknown key the nearest known one.
    """
    values = _read_yaml(path)
    if "train" in kind.model_fields and values and ModelConfig.model_fields.keys() >= values.keys():
        raise UsageError(
            f"{path} is a model, not a run; take it as the model of a run's config: "
            f"configs/pretrain/deepseekmoe-2b.yaml model={path}"
        )
    _read_sections(kind, values, path.parent)
    _forget_length(values, overrides)
    for override in overrides:
        _apply_override(values, override)
        _read_sections(kind, values, Path())
    return build_config(kind, values, str(path))


def has_key(path: Path, key: str) -> bool:
    """Whether a config file sets `key`, which tells what kind of run it describes."""
    return key in _read_yaml(path)


def build_config(kind: type[ConfigT], values: dict[str, Any], origin: str) -> ConfigT:
    """Check `values` against a config class; `origin` names the file in error messages."""
    try:
        return kind.model_validate(_without_removed(kind, values))
    except ValidationError as error:
        raise UsageError(f"{origin}: " + "; ".join(_explain(kind, item) for item in error.errors())) from error


def dump_config(config: Section) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:  # a pipe too, as in `moe-lm pretrain <(...)`
            text = file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"cannot read the config {str(path)!r}: {error}") from error
    return parse_section(text, str(path))


def _read_sections(kind: type[BaseModel], values: dict[str, Any], folder: Path) -> None:
    """Put the content of a file where a section names one."""
    for key, value in values.items():
        if isinstance(value, str) and _section_type(kind, key) is not None:
            values[key] = _read_yaml(folder / value)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r} is not of the form section.key=value, like train.steps=100")
    *parents, leaf = key.split(".")
    node: Any = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UsageError(f"override {override!r}: {parent} is not a section")
    node[leaf] = parse_yaml(text, f"override {override!r}")


def _forget_length(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Where the command line says how long the run is, the file does not, in whatever unit."""
    train = values.get("train")
    said = {override.partition("=")[0] for override in overrides}
    if isinstance(train, dict) and said.intersection(f"train.{name}" for name in LENGTHS):
        for name in LENGTHS:
            train.pop(name, None)


def _without_removed(kind: type[BaseModel], values: Any) -> Any:
    """The same settings without those in REMOVED, where these changed nothing or others can say the same."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, item in values.items():
        section = _section_type(kind, key)
        if (kind, key) not in REMOVED or item != REMOVED[kind, key][0]:
            kept[key] = item if section is None else _without_removed(section, item)
    if kind is ModelConfig and isinstance(kept.get("moe_layer_freq"), int) and kept["moe_layer_freq"] > 1:
        every = kept.pop("moe_layer_freq")
        model = ModelConfig.model_validate(kept)
        dense = (layer for layer in range(model.num_hidden_layers) if layer % every)
        kept["mlp_only_layers"] = sorted({*model.mlp_only_layers, *dense})
    if kind is LoraConfig and kept.get("rank_stabilised") is True:
        del kept["rank_stabilised"]
        lora = LoraConfig.model_validate(kept)
        kept["alpha"] = lora.alpha * math.sqrt(lora.rank)
    return kept


def _explain(kind: type[BaseModel], item: Any) -> str:
    location = [part for part in item["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        if (removed := REMOVED.get((_section_of(kind, location), location[-1]))) is not None:
            return f"{key} is not a setting any more; {removed[1]}"
        near = _nearest(kind, location)
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else "; remove it")
    if item["type"] == "missing":
        return f"{key} is missing; set it"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest(kind: type[BaseModel], location: list[str]) -> str | None:
    """The known key most like an unknown key: first among its siblings, then in the whole config."""
    siblings = difflib.get_close_matches(location[-1], _section_of(kind, location).model_fields, n=1, cutoff=0.6)
    if siblings:
        return ".".join([*location[:-1], siblings[0]])
    everywhere = {name.rsplit(".", 1)[-1]: name for name in _all_keys(kind)}
    found = difflib.get_close_matches(location[-1], everywhere, n=1, cutoff=0.6)
    return everywhere[found[0]] if found else None


def _section_of(kind: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The section that the key at `location` stands in."""
    section = kind
    for part in location[:-1]:
        section = _section_type(section, part) or section
    return section


def _section_type(kind: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = kind.model_fields.get(key)
    if field is None:
        return None
    candidates = [field.annotation, *get_args(field.annotation)]
    sections = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
    return sections[0] if sections else None


def _all_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in kind.model_fields:
        yield prefix + name
        section = _section_type(kind, name)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")
