"""The index of a checkpoint of two ranks, `pieces.json`, and every tensor that it places."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_lm.checkpoint.checkpoint import MODEL
from moe_lm.checkpoint.placement import INDEX, Plan, index_of
from moe_lm.checkpoint.read import CheckpointTensors, check_fits, fill
from moe_lm.checkpoint.safetensors_file import Output, write_file
from moe_lm.parallel.logical import Piece
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_json


def _files(rank: int) -> dict[str, dict[str, Piece]]:
    """What a rank writes: a half of one tensor in each of its two files, a third of another."""
    experts, norm = torch.arange(16.0).chunk(4), torch.arange(6.0).chunk(2)
    return {
        f"shard-{rank}-{number}.safetensors": {
            "model.experts": Piece((experts[2 * rank + number],), 4 * (2 * rank + number), (2, 4, 2)),
            **({"model.norm": Piece((norm[rank],), 3 * rank, (6,))} if number else {}),
        }
        for number in (0, 1)
    }


def prepare(folder: Path) -> Read:
    part = folder / MODEL
    part.mkdir()
    for rank in (0, 1):
        for file, pieces in _files(rank).items():
            outputs = [Output(name, (p.size,), p.dtype, lambda p=p: iter(p.views)) for name, p in pieces.items()]  # type: ignore[misc]
            write_file(part / file, outputs, {})

    def read(data: bytes) -> None:
        (part / INDEX).write_bytes(data)
        source = CheckpointTensors(folder)
        tensors = {"model.experts": torch.zeros(2, 4, 2), "model.norm": torch.zeros(6)}
        check_fits(tensors, source, whole=True)
        fill(tensors, source)

    return read


def seeds() -> list[bytes]:
    return [index_of([Plan.of(_files(rank)) for rank in (0, 1)]).encode()]


READER = Reader("checkpoint-index", prepare, seeds, mutate_json)
