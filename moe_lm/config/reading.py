"""Reads a config: a YAML file, sections in files of their own, overrides, and errors that say what to do.

A section may be written in place, or be the path of a file (relative to the config) that holds it:
`model: ../model/deepseekmoe.yaml`. On the command line `section.key=value` overrides, with the value read as YAML;
`model=configs/model/switch.yaml` takes another file, relative to the working folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from moe_lm.common.errors import UsageError
from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.findings import explain, section_type
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.moved import moved_along
from moe_lm.config.run import FinetuneConfig, ParallelConfig, PretrainConfig
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


class Described(NamedTuple):
    """A kind of config: the keys that only it has, and the verb that reads it."""

    kind: type[Section]
    what: str
    signs: tuple[str, ...]
    verb: str


KINDS = (
    Described(PretrainConfig, "a pretraining config", ("model", "data.sources", "data.shards"), "pretrain"),
    Described(FinetuneConfig, "a fine-tuning config", ("data.train", "lora", "preference"), "finetune"),
    Described(TokenizerRecipe, "the recipe of a tokenizer", ("output", "sources"), "tokenizer train"),
)


def load_config(
    kind: type[ConfigT],
    path: Path,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ConfigT:
    """Read a YAML file, apply `section.key=value` overrides and check everything.

    `complete` adds what the settings leave to `start_from`, if they have one.
    Raises UsageError naming the key, its value and what was expected; for an unknown key the nearest known one.
    """
    values = _read_yaml(path)
    if "train" in kind.model_fields and values and ModelConfig.model_fields.keys() >= values.keys():
        raise UsageError(
            f"{path} is a model, not a run; take it as the model of a run's config: "
            f"configs/pretrain/deepseekmoe-2b.yaml model={path}"
        )
    _read_sections(kind, values, path.parent)
    if path.name == "config.yaml":
        values = moved_along(values, path.parent)
    _forget_length(values, overrides)
    for override in overrides:
        _apply_override(values, override)
        _read_sections(kind, values, Path())
    found, signs = _described(values)
    is_another = found is not None and found.kind is not kind
    if complete is not None and values.get("start_from") is not None and not is_another:
        values = complete(values)
    try:
        return build_config(kind, values, str(path))
    except UsageError as error:
        if found is not None and is_another:
            raise UsageError(
                f"{path} is {found.what} (it has {', '.join(signs)}): moe-lm {found.verb} {path}"
            ) from error
        raise


def kind_of(path: Path) -> type[PretrainConfig] | type[FinetuneConfig]:
    """The kind of run that a config file describes."""
    values = _read_yaml(path)
    _read_sections(PretrainConfig, values, path.parent)
    found, _ = _described(values)
    return FinetuneConfig if found is not None and found.kind is FinetuneConfig else PretrainConfig


def build_config(kind: type[ConfigT], values: dict[str, Any], origin: str) -> ConfigT:
    """Check `values` against a config class; `origin` names the file in error messages."""
    try:
        return kind.model_validate(_without_removed(kind, values))
    except ValidationError as error:
        others = [other.kind for other in KINDS if other.kind is not kind]
        raise UsageError(f"{origin}: {explain(kind, error.errors(), REMOVED, others)}") from error


def dump_config(config: Section) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _described(values: dict[str, Any]) -> tuple[Described | None, list[str]]:
    """The kind of config that these values are, and the keys that tell; None if none does."""
    data = values.get("data")
    keys = {*values, *(f"data.{key}" for key in data)} if isinstance(data, dict) else set(values)
    told = {kind: [sign for sign in kind.signs if sign in keys] for kind in KINDS}
    found = max(KINDS, key=lambda kind: len(told[kind]))
    return (found, told[found]) if told[found] else (None, [])


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        configs = [path / "config.yaml", *sorted(path.glob("*/config.yaml"))]
        there = " or ".join(str(file) for file in configs if file.is_file())
        raise UsageError(f"{path} is a folder; " + (f"its config is {there}" if there else "give a YAML file"))
    try:
        with path.open(encoding="utf-8") as file:  # a pipe too, as in `moe-lm pretrain <(...)`
            text = file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        near = difflib.get_close_matches(path.name, (file.name for file in path.parent.glob("*.yaml")), n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UsageError(f"cannot read the config {path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"cannot read the config {str(path)!r}: {error}") from error
    return parse_section(text, str(path))


def _read_sections(kind: type[BaseModel], values: dict[str, Any], folder: Path) -> None:
    """Put the content of a file where a section names one."""
    for key, value in values.items():
        if isinstance(value, str) and section_type(kind, key) is not None:
            values[key] = _read_yaml(folder / value)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r} is not of the form section.key=value, like train.steps=100")
    *parents, leaf = key.split(".")
    node: Any = values
    for depth, parent in enumerate(parents):
        node = _entry(node, parents[:depth], parent, override)
    if isinstance(node, list):
        _entry(node, parents, leaf, override)
        node[int(leaf)] = parse_yaml(text, f"override {override!r}")
    elif isinstance(node, dict):
        node[leaf] = parse_yaml(text, f"override {override!r}")
    else:
        raise UsageError(f"override {override!r}: {'.'.join(parents)} is not a section")


def _entry(node: Any, path: list[str], name: str, override: str) -> Any:
    """What a section or a list holds under this name or number; a section that is not there is made."""
    if isinstance(node, dict):
        return node.setdefault(name, {})
    place = ".".join(path)
    if not isinstance(node, list):
        raise UsageError(f"override {override!r}: {place} is not a section")
    if not name.isdecimal() or int(name) >= len(node):
        entries = f"from 0 to {len(node) - 1}" if node else "it has none"
        entries += f", as in {place}.0.{name}" if node and not name.isdecimal() else ""
        raise UsageError(f"override {override!r}: {place} is a list; name an entry by its number, {entries}")
    return node[int(name)]


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
        section = section_type(kind, key)
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
