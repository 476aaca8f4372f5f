"""The JSON schema of configs takes every config of the project, and nothing that the program refuses by its form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from moe_lm.config.schema import KINDS, schema_of
from tests.config.test_run import FINETUNE, PRETRAIN, changed
from tests.conftest import MoeLm
from tests.processes import ROOT

TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
         "null": type(None)}  # fmt: skip
SCHEMAS = {name: schema_of(kind) for name, kind in KINDS.items()}
FOLDERS = {"pretrain": "configs/pretrain", "finetune": "configs/finetune", "tokenizer": "tokenizer"}
FILES = [(kind, file) for kind, folder in FOLDERS.items() for file in sorted((ROOT / folder).glob("*.yaml"))]


def complaints(value: Any, schema: dict[str, Any], whole: dict[str, Any], place: str = "") -> Iterator[str]:
    """What an editor would underline; of JSON schema, what our schemas have."""
    if "$ref" in schema:
        yield from complaints(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole, place)
    if "anyOf" in schema:
        found = [list(complaints(value, one, whole, place)) for one in schema["anyOf"]]
        if all(found):  # of the right type first
            yield from min(found, key=lambda said: said[0].startswith(f"{place} is no "))
    wanted = TYPES[schema["type"]] if "type" in schema else object
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, object)):
        yield f"{place} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is not in {schema['enum']}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{place} is too small"
    if isinstance(value, dict):
        for key, item in value.items():
            if key in schema.get("properties", {}):
                yield from complaints(item, schema["properties"][key], whole, f"{place}.{key}")
            elif schema.get("additionalProperties") is False:
                yield f"{place} has no {key}"
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from complaints(item, schema.get("items", {}), whole, f"{place}.{number}")


@pytest.mark.parametrize(("kind", "file"), FILES, ids=lambda value: getattr(value, "name", value))
def test_schema_takes_every_config_of_the_project(kind: str, file: Any) -> None:
    config = json.loads(json.dumps(yaml.safe_load(file.read_text(encoding="utf-8")), default=float))
    config = {key: float(item) if item == "3e-4" else item for key, item in config.items()}
    assert list(complaints(config, SCHEMAS[kind], SCHEMAS[kind])) == []


@pytest.mark.parametrize(
    ("kind", "key", "value", "said"),
    [
        ("pretrain", "train.stepps", 3, ".train has no stepps"),
        ("pretrain", "train.steps", "many", ".train.steps is no integer"),
        ("pretrain", "train.global_batch_size", 0, ".train.global_batch_size is too small"),
        ("pretrain", "train.optimizer", {"name": "sgd"}, ".train.optimizer.name is not in"),
        ("pretrain", "data.sources", [{"nam": "x"}], ".data.sources.0 has no nam"),
        ("finetune", "lora", {"r": 8}, ".lora has no r"),
        ("finetune", "model", "x.yaml", " has no model"),
    ],
)
def test_schema_complains_where_the_program_does(kind: str, key: str, value: Any, said: str) -> None:
    whole = PRETRAIN if kind == "pretrain" else FINETUNE
    found = list(complaints(changed(whole, key, value), SCHEMAS[kind], SCHEMAS[kind]))
    assert len(found) == 1
    assert said in found[0]


def test_the_verb_prints_it_and_the_line_for_the_config(moe_lm: MoeLm) -> None:
    done = moe_lm("config", "schema", "finetune")
    assert json.loads(done.out) == SCHEMAS["finetune"]
    assert done.err.rstrip().endswith("# yaml-language-server: $schema=finetune.schema.json")
