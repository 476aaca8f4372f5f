"""Packing: rows and batches by hand, full rows, epochs, shares of sources, and slices for any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.examples import ChatExample, ExampleRows
from moe_lm.data.order import MIX_BLOCK
from moe_lm.data.packing import RowBatches, pack_rows
from moe_lm.objective.training_loss import num_targets
from tests.tiny import positions_of

PAD = 2


def example(first: int, tokens: int, trained: int) -> ChatExample:
    """Tokens that count up from `first`; the last `trained` of them are the assistant's."""
    ids = np.arange(first, first + tokens, dtype=np.int32)
    targets = ids[1:].copy()
    targets[: tokens - 1 - trained] = IGNORE
    return ChatExample(ids[:-1], targets, hash=first)


def random_examples(count: int) -> list[ChatExample]:
    rng = np.random.default_rng(0)
    return [example(1000 * number, int(rng.integers(2, 60)), 1) for number in range(1, count + 1)]


def evaluation(examples: Sequence[ChatExample], length: int, batch_size: int, separate: bool = True) -> list[Batch]:
    return [batch for _, batch in ExampleRows(examples, length, PAD, separate).in_order(batch_size)]


def training(
    examples: Sequence[ChatExample], batch_size: int = 8, seed: int = 1, weights: Sequence[float] | None = None
) -> RowBatches:
    return RowBatches(ExampleRows(examples, 64, PAD, by_source=bool(weights)), batch_size, seed, weights)


def first_tokens(batches: Sequence[Batch]) -> list[int]:
    return [int(batch.input_ids[row, 0]) for batch in batches for row in range(len(batch.input_ids))]


# Nine, five, four and three tokens: 8 + 4 + 3 + 2 inputs, of which the first fills a row of 8.
FOUR = [example(100, 9, 2), example(200, 5, 1), example(300, 4, 3), example(400, 3, 1)]


def test_packing_by_hand() -> None:
    [batch] = evaluation(FOUR, 8, 3)
    assert batch.input_ids.tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 107],
        [200, 201, 202, 203, 300, 301, 302, PAD],
        [400, 401, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.targets.tolist() == [
        [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 107, 108],
        [IGNORE, IGNORE, IGNORE, 204, 301, 302, 303, IGNORE],
        [IGNORE, 402, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert positions_of(batch).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 0, 1, 2, 0],
        [0, 1, 0, 1, 2, 3, 4, 5],
    ]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 15, 16, 18, 24]
    assert (batch.max_seqlen, num_targets(batch)) == (8, 7)


def test_packing_by_hand_with_attention_across_examples() -> None:
    [batch] = evaluation(FOUR, 8, 3, separate=False)
    assert batch.cu_seqlens.tolist() == [0, 8, 15, 16, 18, 24]
    assert positions_of(batch)[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_evaluation_batches_have_one_shape_and_the_last_is_filled_up() -> None:
    batches = evaluation(FOUR, 8, 2)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 8), (2, 8)]
    assert batches[1].input_ids[1].tolist() == [PAD] * 8
    assert num_targets(batches[1]) == 1


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=200))
def test_rows_hold_every_item_once_and_are_not_overfull(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    fill = [sum(lengths[item] for item in row) for row in rows]
    assert max(fill, default=0) <= 50
    # Any two rows would not fit into one, so that on average they are more than half full.
    assert sum(sorted(fill)[:2]) > 50 or len(rows) < 2


def test_every_row_comes_once_an_epoch_in_a_new_order() -> None:
    batches = training(random_examples(100), batch_size=1)
    size = batches.steps_per_epoch
    epochs = [first_tokens([batches.batch(epoch * size + step, range(1)) for step in range(size)]) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(set(epochs[0])) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_an_epoch_trains_on_every_example_whole() -> None:
    items = random_examples(100)
    seen = torch.cat([batch.targets.flatten() for batch in evaluation(items, 64, 8)])
    expected = np.concatenate([item.targets[item.targets != IGNORE] for item in items])
    assert sorted(seen[seen != IGNORE].tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_slices_the_same_global_batch(ranks: int) -> None:
    batches = training(random_examples(100))
    share = 8 // ranks
    for step in (0, 5, 3, 1000):
        whole = batches.batch(step, range(8))
        slices = [batches.batch(step, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        for name in ("input_ids", "targets"):
            assert torch.equal(torch.cat([getattr(item, name) for item in slices]), getattr(whole, name))
        assert torch.equal(torch.cat([positions_of(item) for item in slices]), positions_of(whole))


def from_source(source: int, count: int) -> list[ChatExample]:
    """Examples that fill a row each, and whose tokens tell the source."""
    return [replace(example(1000 * (100 * source + number), 64, 1), source=source) for number in range(1, count + 1)]


def test_weights_are_shares_and_sources_have_their_own_epochs() -> None:
    items = [*from_source(0, 5), *from_source(1, 50)]
    batches = training(items, weights=[3.0, 1.0])
    assert batches.steps_per_epoch == 7
    seen = first_tokens([batches.batch(step, range(8)) for step in range(MIX_BLOCK // 8)])
    first, second = [[token for token in seen if token // 100_000 == source] for source in (0, 1)]
    assert (len(first), len(second)) == (MIX_BLOCK * 3 // 4, MIX_BLOCK // 4)
    for mine, size in ((first, 5), (second, 50)):
        counts = Counter(mine).values()
        assert (len(counts), max(counts) - min(counts)) == (size, 1)
        epochs = [mine[begin : begin + size] for begin in range(0, len(mine), size)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert first_tokens([batches.batch(17, range(3, 5))]) == seen[17 * 8 + 3 : 17 * 8 + 5]
    alone = training(items)
    assert len(set(first_tokens([alone.batch(step, range(8)) for step in range(7)]))) == 55


def test_without_weights_sources_share_rows() -> None:
    small = [replace(item, source=number % 2) for number, item in enumerate(random_examples(100))]
    assert len(ExampleRows(small, 64, PAD)) == len(pack_rows([len(item.input_ids) for item in small], 64))


def test_the_fingerprint_is_that_of_tokens_and_targets_in_their_order() -> None:
    items = random_examples(3)
    ignored = replace(items[0], targets=np.full_like(items[0].targets, IGNORE))
    others = [items[::-1], items[:2], [ignored, *items[1:]], [replace(items[0], source=1), *items[1:]]]
    assert len({training(group).fingerprint for group in [items, *others]}) == 5
    assert training(items).fingerprint == training(random_examples(3)).fingerprint


def test_another_seed_is_another_order() -> None:
    one, two = (first_tokens([training(random_examples(100), seed=seed).batch(0, range(8))]) for seed in (1, 2))
    assert one != two
