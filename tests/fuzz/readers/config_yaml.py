"""A config in YAML, with the sections in it, and an override."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from moe_lm.config.reading import kind_of, load_config
from moe_lm.config.run import PretrainConfig
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_values

ROOT = Path(__file__).parents[3]
FILES = ("configs/pretrain/quickstart.yaml", "configs/finetune/quickstart.yaml")
MODEL = yaml.safe_load((ROOT / "configs/model/quickstart.yaml").read_text(encoding="utf-8"))
ALIASES = b"""a: &a [x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]
"""


def prepare(folder: Path) -> Read:
    file = folder / "config.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        kind = kind_of(file)
        load_config(kind, file, (), with_model if kind is PretrainConfig else None)

    return read


def with_model(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with what would come from the model that they start from."""
    data, given = values.get("data"), values.get("model")
    if "start_from" in values and isinstance(given, dict):
        named = {name: value for name, value in given.items() if name != "rope_parameters"}
        values = values | {"model": MODEL | {"num_attention_heads": 16, "head_dim": 16} | named}
    return {"model": MODEL} | values | {"data": {"tokenizer": "tokenizer/x"} | data if isinstance(data, dict) else data}


def seeds() -> list[bytes]:
    """The recipes, with their sections written out."""
    found = []
    for path in sorted((ROOT / "configs").glob("*tune/*.yaml")) + sorted((ROOT / "configs").glob("pretrain/*.yaml")):
        values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            if isinstance(value, str) and value.endswith(".yaml"):
                values[key] = yaml.safe_load((path.parent / value).read_text(encoding="utf-8"))
        found += [path.read_bytes()] if "model: ../" not in path.read_text() else []
        found.append(yaml.safe_dump(values, sort_keys=False).encode())
    return found


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    kind = draw.randrange(3)
    if kind == 0:
        return mutate_bytes(draw, data, seeds)
    if kind == 1 and not draw.randrange(4):
        place = data.find(b"\n", draw.randrange(len(data) + 1)) + 1
        return data[:place] + ALIASES * draw.choice((1, 1, 2)) + data[place:]
    try:
        values = yaml.load(data, Loader=yaml.CSafeLoader)
        return yaml.dump(mutate_values(draw, values), Dumper=yaml.CSafeDumper, allow_unicode=True).encode(
            errors="surrogatepass"
        )
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError):
        return mutate_bytes(draw, data, seeds)


READER = Reader("config", prepare, seeds, mutate, seconds_per_megabyte=50, inputs_in_ci=15)
