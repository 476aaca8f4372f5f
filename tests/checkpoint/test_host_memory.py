"""The copy of a state in the host's memory, of which a save in the background writes."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lm.checkpoint import host_memory
from moe_lm.checkpoint.host_memory import HostMemory
from moe_lm.parallel.logical import Piece, flat, piece_of, pieces_of_run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def pieces_on(device: str) -> dict[str, Piece]:
    """Whole ones, a transposed one, a scalar, one of rows that lie apart, and one that this rank has nothing of."""
    run = torch.randn(1000, device=device)
    whole = {
        "matrix": torch.randn(30, 20, device=device),
        "transposed": torch.randn(30, 20, device=device).T,
        "half": torch.randn(77, device=device).bfloat16(),
        "step": torch.tensor(3, device=device),
        "random": torch.arange(50, dtype=torch.uint8),
    }
    stack = pieces_of_run("layers.0.mlp.experts.gate_up_proj", run, 37, (4, 16, 20), first_expert=4, experts=8)
    return {name: piece_of(tensor) for name, tensor in whole.items()} | stack | {"nothing": Piece((), 0, (5,))}


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_what_was_there_wherever_the_chunks_end(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CHUNK", 256)
    pieces = pieces_on(device)
    expected = {name: flat(piece) for name, piece in pieces.items() if piece.size}
    memory = HostMemory()
    for _ in range(2):
        copies = memory.copy(pieces)
        assert {name: (piece.start, piece.shape) for name, piece in copies.items()} == {
            name: (piece.start, piece.shape) for name, piece in pieces.items()
        }
        assert [name for name, piece in expected.items() if not torch.equal(flat(copies[name]), piece)] == []
    for piece in pieces.values():
        for view in piece.views:
            view.zero_()
    assert all(torch.equal(flat(copies[name]), piece) for name, piece in expected.items())
    assert any(len(piece.views) > 1 for piece in copies.values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_takes_no_more_than_a_chunk_beyond_its_bytes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU's the same chunks are used for the next copy; others are left to the copy alone."""
    monkeypatch.setattr(host_memory, "CHUNK", 4096)
    made: list[torch.Tensor] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **how: made.append(empty(*sizes, **how)) or made[-1])
    pieces = {"weights": piece_of(torch.randn(5000, device=device)), "moments": piece_of(torch.randn(5000))}
    memory = HostMemory()
    memory.copy(pieces)
    chunks = [chunk for chunk in made if len(chunk)]
    assert sum(chunk.nbytes for chunk in chunks) == math.ceil(2 * 20_000 / 4096) * 4096
    memory.copy(pieces)
    assert len([chunk for chunk in made if len(chunk)]) == len(chunks) * (1 if device == "cuda" else 2)
    assert len(memory._pinned) == (len(chunks) if device == "cuda" else 0)
