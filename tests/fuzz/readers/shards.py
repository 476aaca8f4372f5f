"""The manifest of a folder of shards, and the index of a shard, whose checksum is made to fit.

An input is the manifest, SEPARATOR and the index.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from xxhash import xxh3_128_hexdigest

from moe_lm.config.data import DataConfig, Phase
from moe_lm.data import prepare as preparing
from moe_lm.data.batches import EvaluationBatches, PackedBatches
from moe_lm.data.shards import TokenShards
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_json

ROOT = Path(__file__).parents[3]
SEPARATOR = b"\n--- index\n"


def make_shards(folder: Path) -> Path:
    """The folder of one source with ten documents."""
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"Document number {number}. " * (number + 1), encoding="utf-8")
    values = {
        "sources": [{"name": "corpus", "path": str(folder / "*.txt")}],
        "tokenizer": ROOT / "tokenizer" / "tiny", "shards": folder / "shards", "workers": 1,
    }  # fmt: skip
    preparing.prepare(DataConfig.model_validate(values))
    return folder / "shards" / "corpus"


def prepare(folder: Path) -> Read:
    shards, tokenizer = make_shards(folder), Tokenizer.load(ROOT / "tokenizer" / "tiny")

    def read(data: bytes) -> None:
        manifest, _, index = data.partition(SEPARATOR)
        (shards / "train-00000.index").write_bytes(index)
        (shards / "manifest.json").write_bytes(signed(manifest, index))
        train = TokenShards.open(shards, "train", tokenizer=tokenizer)
        for separate in (True, False):
            PackedBatches([train], [Phase(0, 4, 16, (1.0,))], 4, 1, separate).batch(0, range(4))
            EvaluationBatches(train, 16, 2, separate).batch(0, range(2))

    return read


def signed(manifest: bytes, index: bytes) -> bytes:
    """The manifest with the index's checksum, if it is still of that form."""
    try:
        values = json.loads(manifest)
        values["train"][0]["index_xxh3_128"] = xxh3_128_hexdigest(index)
        return json.dumps(values).encode()
    except (ValueError, TypeError, LookupError, RecursionError):
        return manifest


def seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        return [(shards / "manifest.json").read_bytes() + SEPARATOR + (shards / "train-00000.index").read_bytes()]


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    manifest, _, index = data.partition(SEPARATOR)
    if draw.randrange(2):
        return mutate_json(draw, manifest, seeds) + SEPARATOR + index
    return manifest + SEPARATOR + mutate_bytes(draw, index, [index])


READER = Reader("shards", prepare, seeds, mutate, inputs_in_ci=100)
