"""Runs of a parameter's elements as pieces of its logical tensors."""

from __future__ import annotations

import pytest
import torch

from moe_lm.model.moe import logical
from moe_lm.parallel.logical import Piece, assign, flat, gathered, piece_of, pieces_of_run, share_of

STACK = "model.layers.1.mlp.experts.gate_up_proj"
EXPERTS, SHAPE = 6, (2, 3, 8)  # two of six experts


@pytest.mark.parametrize("first_expert", [0, 4])
def test_every_run_of_a_stack_has_its_elements_of_gate_and_up(first_expert: int) -> None:
    parameter = torch.arange(48.0).view(SHAPE)
    elements = parameter.flatten()
    for start in range(49):
        for stop in range(start, 49):
            for name, view in logical(STACK, parameter).items():
                piece = pieces_of_run(STACK, elements[start:stop], start, SHAPE, first_expert, EXPERTS)[name]
                inside = [value for value in view.flatten().tolist() if start <= value < stop]
                assert piece.shape == (EXPERTS, 3, 4)
                assert (flat(piece).tolist() if piece.views else []) == inside
                if inside:
                    assert piece.start == first_expert * 12 + view.flatten().tolist().index(inside[0])


def test_views_are_the_memory_itself() -> None:
    parameter = torch.zeros(SHAPE)
    pieces = pieces_of_run(STACK, parameter.view(-1)[3:45], 3, SHAPE, 0, EXPERTS)
    values = {name: torch.ones(EXPERTS * 12)[piece.start : piece.start + piece.size] for name, piece in pieces.items()}
    assign(pieces, values)
    assert parameter.flatten()[3:45].eq(1).all()
    assert parameter.sum() == 42


@pytest.mark.parametrize("size", [1, 3, 5])
def test_ranks_write_every_element_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.parallel.logical.SMALL", 100)
    for shape in ((7, 9), (4,), ()):
        tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
        shares = [share_of("a", piece_of(tensor), rank, size) for rank in range(size)]
        assert [value for share in shares if share.views for value in flat(share).tolist()] == tensor.flatten().tolist()
        assert sum(bool(share.size) for share in shares) == (size if shape == (7, 9) else 1)


def test_a_cut_of_columns_is_as_that_of_the_elements() -> None:
    columns = torch.arange(60.0).view(5, 12)[:, 3:7]
    for start in range(21):
        for stop in range(start, 21):
            piece = piece_of(columns).cut(start, stop)
            assert piece.size == stop - start
            assert not piece.size or flat(piece).tolist() == columns.flatten()[start:stop].tolist()


def test_pieces_are_put_together() -> None:
    pieces: dict[str, torch.Tensor | Piece] = {"a": Piece((torch.arange(3.0), torch.ones(1)), 0, (2, 2))}
    assert gathered(pieces)["a"].tolist() == [[0, 1], [2, 1]]


def test_counts_that_every_rank_reads_are_written_by_one() -> None:
    """Else each of 512 ranks would open hundreds of files for a number each."""
    count = piece_of(torch.tensor(3.0))
    writers = {rank for rank in range(512) for number in range(20) if share_of(f"step.{number}", count, rank, 512).size}
    assert len(writers) == 1
