"""What a checkpoint of 512 ranks costs beside its bytes: the plans of all, made in one process, and what a rank opens.

    python -m eval.studies.checkpoint_of_512_ranks [--model deepseekmoe-16b] [--output FILE.json]

A rank tells rank 0 once in a run what it writes, and rank 0 writes an index. A rank that reads finds there which files
have its elements, and opens these. The tensors are those of a model of configs/model with AdamW's moments and counts of
steps, on the meta device, divided among 512 ranks of which 8 share the experts, as ZeRO 1 and 3 divide them.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor

from moe_lm.checkpoint import placement
from moe_lm.checkpoint.checkpoint import parts_of
from moe_lm.checkpoint.placement import INDEX, Plan, index_of
from moe_lm.checkpoint.safetensors_file import NAMES, Header, Stored
from moe_lm.checkpoint.write import own_pieces
from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel, is_expert
from moe_lm.parallel.logical import Piece, pieces_of_run
from moe_lm.parallel.process_group import Ranks

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
RANKS, EXPERT_PARALLEL = 512, 8
MOMENTS = ("exp_avg", "exp_avg_sq")
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseekmoe-16b", help="a file of configs/model, without .yaml")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    config = ModelConfig(**yaml.safe_load((CONFIGS / f"{arguments.model}.yaml").read_text()))
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in LanguageModel(config).named_parameters()}
    result: dict[str, Any] = {"model": arguments.model, "ranks": RANKS, "parameters": len(shapes)}
    result["zero_3"] = pieces(shapes, zero_3)
    result["zero_1"] = pieces(shapes, zero_1)
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def pieces(shapes: Shapes, divide: Callable[[Shapes, int], Iterator[tuple[str, int, int]]]) -> dict[str, Any]:
    """Seconds and bytes of the plans of all ranks, of the indices, and of what a rank opens that reads its pieces."""
    plans: dict[str, list[Plan]] = {"model": [], "optimizer": []}
    headers: dict[str, dict[str, Header]] = {part: {} for part in plans}
    slowest, sent = 0.0, []
    for rank in range(RANKS):
        state = state_of(shapes, rank, divide)
        with patch.object(Ranks, "rank", rank), patch.object(Ranks, "size", RANKS):
            started = time.perf_counter()
            own = own_pieces(state, Ranks())
        mine = {}
        for part, tensors in parts_of(own).items():
            name = f"shard-{rank + 1:05d}.safetensors"
            mine[part] = Plan.of({name: {key: piece for key, piece in tensors.items() if piece.size}})
            headers[part][name] = header_of(Path(part) / name, tensors)
        slowest = max(slowest, time.perf_counter() - started)
        sent.append(len(pickle.dumps(mine)))
        for part, plan in mine.items():
            plans[part].append(plan)
    started = time.perf_counter()
    indices = {part: index_of(listed) for part, listed in plans.items()}
    indexing = time.perf_counter() - started
    return {
        "seconds_of_a_rank": round(slowest, 3),
        "bytes_a_rank_sends_once": {"most": max(sent), "all": sum(sent)},
        "seconds_of_rank_0": round(indexing, 2),
        "index_bytes": {part: len(text) for part, text in indices.items()},
        "pieces": sum(len(plan.lines) for listed in plans.values() for plan in listed),
        "files": sum(len(plan.files) for listed in plans.values() for plan in listed),
        "reading": {name: reading(shapes, indices, headers, other) for name, other in READERS.items()},
    }


def reading(
    shapes: Shapes,
    indices: dict[str, str],
    headers: dict[str, dict[str, Header]],
    divide: Callable[[Shapes, int], Iterator[tuple[str, int, int]]],
) -> dict[str, Any]:
    """What rank 100 opens and reads that loads its pieces in some layout."""
    opened: set[str] = set()

    def read_header(path: Path) -> Header:
        opened.add(f"{path.parent.name}/{path.name}")
        return headers[path.parent.name][path.name]

    spans = 0
    with TemporaryDirectory() as folder, patch.object(placement, "read_header", read_header):
        started = time.perf_counter()
        for part, tensors in parts_of(state_of(shapes, 100, divide)).items():
            (Path(folder) / part).mkdir()
            (Path(folder) / part / INDEX).write_text(indices[part])
            places = placement.Placement(Path(folder) / part)
            for name, piece in tensors.items():
                start, size = (piece.start, piece.size) if isinstance(piece, Piece) else (0, piece.numel())
                spans += sum(1 for _ in places.spans(name, start, start + size))
        seconds = time.perf_counter() - started
    return {"files_opened": len(opened), "reads": spans, "seconds_of_looking_up": round(seconds, 2)}


def header_of(file: Path, tensors: dict[str, Piece]) -> Header:
    stored = {
        name: Stored(file, name, NAMES[piece.dtype], (piece.size,), 0) for name, piece in tensors.items() if piece.size
    }
    return Header(stored, {})


def state_of(
    shapes: Shapes, rank: int, divide: Callable[[Shapes, int], Iterator[tuple[str, int, int]]]
) -> dict[str, Tensor | Piece]:
    state: dict[str, Tensor | Piece] = {}
    expert = rank % EXPERT_PARALLEL
    for name, start, length in divide(shapes, rank):
        shape = shapes[name]
        run = torch.empty(length, device="meta")
        experts = shape[0]
        local = (experts // EXPERT_PARALLEL, *shape[1:]) if is_expert(name) else shape
        found = pieces_of_run(name, run, start, local, expert * local[0], experts)
        for kind in ("model", *MOMENTS):
            state |= {
                f"{kind}.{part}": piece if piece.views else Piece((run[:0],), 0, piece.shape)
                for part, piece in found.items()
            }
        state |= {f"step.{part}": torch.zeros(()) for part in found}
    return state


def local_size(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // (EXPERT_PARALLEL if is_expert(name) else 1)


def zero_3(shapes: Shapes, rank: int) -> Iterator[tuple[str, int, int]]:
    """Of every parameter an equal part."""
    for name, shape in shapes.items():
        ranks, number = (RANKS // EXPERT_PARALLEL, rank // EXPERT_PARALLEL) if is_expert(name) else (RANKS, rank)
        total = local_size(name, shape)
        size = -(-total // ranks)
        start = min(number * size, total)
        yield name, start, min(size, total - start)


def zero_1(shapes: Shapes, rank: int) -> Iterator[tuple[str, int, int]]:
    """Of all parameters, one behind the other, an equal part."""
    for expert in (False, True):
        ranks, number = (RANKS // EXPERT_PARALLEL, rank // EXPERT_PARALLEL) if expert else (RANKS, rank)
        sizes = {name: local_size(name, shape) for name, shape in shapes.items() if is_expert(name) == expert}
        share, offset = -(-sum(sizes.values()) // ranks), 0
        for name, size in sizes.items():
            first = min(max(number * share - offset, 0), size)
            last = min(max((number + 1) * share - offset, 0), size)
            yield name, first, last - first
            offset += size


READERS = {"by the same ranks in ZeRO 3": zero_3, "by the same ranks in ZeRO 1": zero_1}


if __name__ == "__main__":
    main()
