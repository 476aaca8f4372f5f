"""Held-out batches are made when they are asked for, and by a rank only its own."""

from __future__ import annotations

from functools import partial

from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.data.held_out import HeldOut, one_after_the_other
from moe_lm.parallel.topology import Topology
from tests.tiny import engine_of, tiny_model


def noting(source: BatchSource, made: list[int], number: int) -> Batch:
    made.append(number)
    return source.batch(number, range(2))


def test_a_batch_is_made_when_it_is_asked_for_and_not_kept(ragged: BatchSource) -> None:
    made: list[int] = []
    make = partial(noting, ragged, made)
    both = one_after_the_other([HeldOut(make, range(3)), HeldOut(make, range(10, 12))])
    assert (len(both), len(both[1:4]), bool(one_after_the_other([])), made) == (5, 3, False, [])
    [_, third, _] = both[1:4]
    assert made == [1, 2, 10]
    assert third.input_ids.tolist() == ragged.batch(2, range(2)).input_ids.tolist()
    assert len(list(both)) == 5
    assert made == [1, 2, 10, 0, 1, 2, 10, 11]


def test_a_rank_makes_its_own_batches_and_repeats_the_first_where_it_has_none(ragged: BatchSource) -> None:
    for rank, expected in enumerate([[0, 3], [1, 4], [2, 3]]):
        made: list[int] = []
        engine = engine_of(tiny_model(), TrainConfig(steps=1, global_batch_size=3, precision="float32"))
        engine.topology = Topology(rank, 3)
        shares = list(engine.forward_shares(HeldOut(partial(noting, ragged, made), range(5))))
        assert made == expected
        assert [share.is_own for share in shares] == [True, rank < 2]
        assert [share.units > 0 for share in shares] == [True, rank < 2]
