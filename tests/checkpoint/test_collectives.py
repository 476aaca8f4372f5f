"""What 512 ranks say to one another when they save and load: lines about files, and no tensor. Their group is fake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_lm.checkpoint import read, write
from moe_lm.parallel.logical import Piece

RANKS, RANK, SIZE = 512, 3, 1 << 10  # elements of a tensor on each rank
COLLECTIVES = (
    "all_gather", "gather", "all_reduce", "broadcast", "all_gather_into_tensor", "all_to_all_single", "scatter",
)  # fmt: skip


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that this rank gives to each collective."""
    found: list[int] = []

    def counting(name: str) -> Any:
        real = getattr(c10d, name)

        def collective(*given: Any, **named: Any) -> Any:
            found.append(sum(_bytes(value) for value in (*given, *named.values()) if isinstance(value, Tensor)))
            return real(*given, **named)

        return collective

    for name in COLLECTIVES:
        counted = counting(name)
        monkeypatch.setattr(c10d, name, counted)
        monkeypatch.setattr(dist, name, counted)
    # Rank 0 tells the others how its work went. The fake group brings nothing, which reads as: well.
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: found.append(0))
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def state(tensors: int) -> dict[str, Tensor | Piece]:
    """So many tensors of which every rank has SIZE elements, and a count that all have."""
    pieces = {
        f"{kind}.{number}": Piece((torch.full((SIZE,), 1.0),), RANK * SIZE, (RANKS, SIZE))
        for number in range(tensors)
        for kind in ("model", "exp_avg")
    }
    return {**pieces, "step.0": torch.tensor(7.0)}


def test_a_save_of_512_ranks_sends_no_tensor_and_its_plan_once(ranks: None, sent: list[int], tmp_path: Path) -> None:
    """However many tensors it has, the collectives are as many."""
    plans, counts = write.Plans(), []
    for step, tensors in enumerate((1, 64, 64)):
        sent.clear()
        write.save(tmp_path, step, state(tensors), {}, plans=plans)
        counts.append((len(sent), sum(sent)))
    (few, _), (many, with_plan), (again, known) = counts
    assert few == many == again <= 10
    assert with_plan < 2 * 64 * SIZE * 4 / 50  # of the state's bytes
    assert known < 2000


def test_a_load_of_512_ranks_sends_no_tensor(sent: list[int], tmp_path: Path) -> None:
    whole = {f"{kind}.{n}": torch.rand(RANKS, SIZE) for n in range(2) for kind in ("model", "exp_avg")}
    folder = write.save(tmp_path, 1, {**whole, "step.0": torch.tensor(7.0)}, {})
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    try:
        loaded = state(tensors=2)
        read.load(folder, loaded)
    finally:
        dist.destroy_process_group()
    for name, tensor in whole.items():
        piece = loaded[name]
        assert isinstance(piece, Piece)
        assert torch.equal(piece.views[0], tensor[RANK])
    assert 0 < len(sent) <= 10
    assert sum(sent) < 2000
