"""Batches: packing by hand and against a token-by-token reference, epochs, mixtures, ranks, cut files, evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_lm.common.errors import UsageError
from moe_lm.config.data import Phase
from moe_lm.data.batches import IGNORE, Batch, EvaluationBatches, PackedBatches
from moe_lm.data.marks import Marks
from moe_lm.data.shards import LeftOut, TokenShards
from moe_lm.data.stream import TokenStream
from moe_lm.objective.training_loss import num_targets
from tests.tiny import positions_of

LENGTH = 8
MARKS = Marks(0, 1)


def make_shards(
    documents: Sequence[Sequence[int]], tokens_a_file: int | None = None, marks: Marks = MARKS
) -> TokenShards:
    stream = np.array([token for document in documents for token in document], np.uint16)
    size = tokens_a_file or max(1, len(stream))
    files = tuple(stream[start : start + size] for start in range(0, len(stream), size))
    return TokenShards(Path("in-memory"), "train", files, marks, "in-memory")


def numbered(tokens: int, first: int = 0) -> TokenShards:
    """One document whose tokens count up, so that a window shows where it came from."""
    return make_shards([list(range(first, first + tokens))])


def train(
    shards: list[TokenShards], batch_size: int = 4, weights: Sequence[float] = (), separate: bool = True, seed: int = 1
) -> PackedBatches:
    phase = Phase(0, batch_size, LENGTH, tuple(weights or [1.0] * len(shards)))
    return PackedBatches(shards, [phase], batch_size, seed, separate)


def first_tokens(batches: PackedBatches, steps: int, batch_size: int) -> torch.Tensor:
    return torch.cat([batches.batch(step, range(batch_size)).input_ids[:, 0] for step in range(steps)])


def evaluation_batches(shards: TokenShards, batch_size: int, separate: bool) -> list[Batch]:
    batches = EvaluationBatches(shards, LENGTH, batch_size, separate)
    return [batches.batch(step, range(batch_size)) for step in range(batches.steps_per_epoch)]


def assert_same(left: Batch, right: Batch) -> None:
    for name in ("input_ids", "targets", "cu_seqlens"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.max_seqlen == right.max_seqlen


DOCUMENTS = [[0, 10, 11, 1], [0, 20, 21, 22, 23, 24, 25, 1], [0, 30, 31, 1], [0, 40, 41, 42, 43, 44, 45, 46, 1]]


def test_packing_by_hand_without_attention_across_documents() -> None:
    """Three windows of 8 over documents of 4, 8, 4 and 9 tokens; 25 tokens, so that the last is a target only."""
    [batch] = evaluation_batches(make_shards(DOCUMENTS), 3, separate=True)
    assert batch.input_ids.tolist() == [
        [0, 10, 11, 1, 0, 20, 21, 22],
        [23, 24, 25, 1, 0, 30, 31, 1],
        [0, 40, 41, 42, 43, 44, 45, 46],
    ]
    assert batch.targets.tolist() == [
        [10, 11, 1, IGNORE, 20, 21, 22, 23],
        [24, 25, 1, IGNORE, 30, 31, 1, IGNORE],
        [40, 41, 42, 43, 44, 45, 46, 1],
    ]
    assert positions_of(batch).tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3],
        [0, 1, 2, 3, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12, 16, 24]
    assert batch.max_seqlen == 8
    assert num_targets(batch) == 21


def test_packing_by_hand_with_attention_across_documents() -> None:
    [batch] = evaluation_batches(make_shards(DOCUMENTS), 3, separate=False)
    assert batch.targets[0].tolist() == [10, 11, 1, 0, 20, 21, 22, 23]
    assert positions_of(batch).tolist() == [list(range(8))] * 3
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 24]
    assert num_targets(batch) == 24


def packed_one_by_one(stream: list[int], starts: set[int], length: int) -> list[list[list[int]]]:
    """Every window of a stream, token by token: inputs, targets, positions, and the number of each one's segment."""
    windows = []
    position = segment = 0
    for first in range(0, len(stream) - length, length):
        window = []
        for place in range(first, first + length):
            if place == first or place in starts:
                position, segment = 0, segment + 1
            target = IGNORE if place + 1 in starts else stream[place + 1]
            window.append((stream[place], target, position, segment))
            position += 1
        windows.append([list(column) for column in zip(*window, strict=True)])
    return windows


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 12) | st.just(0), min_size=1, max_size=30),
    length=st.integers(2, 12),
    marks=st.sampled_from([Marks(0, 1), Marks(1, 0), Marks(0, 0), Marks(5, 5), Marks(None, 1), Marks(None, 0)]),
)
def test_packing_is_that_of_a_token_by_token_reference(sizes: list[int], length: int, marks: Marks) -> None:
    """The reference knows where the documents begin; the batches see the tokens of a window alone."""
    if marks.bos == marks.eos:  # an empty document is two equal marks; a window of nothing but marks tells nothing
        assume(not any(a == b == 0 for a, b in itertools.pairwise(sizes)) and (sizes[-1] > 0 or marks.eos == 5))
        length = max(length, 6)
    first = 0 if marks.bos is None else 1
    text = itertools.count(10)
    documents = [[*([marks.bos] * first), *itertools.islice(text, max(size, 1 - first)), marks.eos] for size in sizes]
    starts = {sum(map(len, documents[:number])) for number in range(len(documents))}
    stream = [token for document in documents for token in document]
    batches = EvaluationBatches(make_shards(documents, marks=marks), length, 1, separate_documents=True)
    expected = packed_one_by_one(stream, starts, length)
    for row, (inputs, targets, positions, segments) in enumerate(expected):
        batch = batches.batch(row, range(1))
        assert batch.input_ids.tolist() == [inputs]
        assert batch.targets.tolist() == [targets]
        assert positions_of(batch).tolist() == [positions]
        assert np.diff(batch.cu_seqlens).tolist() == np.unique(segments, return_counts=True)[1].tolist()


def test_types_are_those_the_model_takes() -> None:
    batch = train([numbered(100)]).batch(0, range(4))
    assert batch.input_ids.dtype == batch.targets.dtype == batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.is_contiguous()
    assert batch.targets.is_contiguous()


@pytest.mark.parametrize("windows", [1, 4, 37])
def test_every_window_is_seen_exactly_once_an_epoch(windows: int) -> None:
    batches = train([numbered(windows * LENGTH + 3)], batch_size=1)
    assert batches.steps_per_epoch == windows
    orders = []
    for epoch in range(3):
        steps = range(epoch * windows, (epoch + 1) * windows)
        first_tokens = [int(batches.batch(step, range(1)).input_ids[0, 0]) for step in steps]
        assert sorted(first_tokens) == [window * LENGTH for window in range(windows)]
        orders.append(first_tokens)
    assert windows < 37 or orders[0] != orders[1] != orders[2]


@settings(deadline=None, max_examples=50)
@given(ranks=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 10**6), separate=st.booleans(), mixed=st.booleans())
def test_any_number_of_ranks_slices_the_same_global_batch(ranks: int, step: int, separate: bool, mixed: bool) -> None:
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, 4000), 299, replace=False))
    one = make_shards(np.split(rng.integers(0, 60000, 4000, np.uint16), cuts))
    batches = train([one, one] if mixed else [one], batch_size=8, separate=separate)
    whole = batches.batch(step, range(8))
    share = 8 // ranks
    parts = [batches.batch(step, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    for name in ("input_ids", "targets"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([positions_of(part) for part in parts]), positions_of(whole))
    bounds = [part.cu_seqlens[1:] + rank * share * LENGTH for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(bounds), whole.cu_seqlens[1:])
    assert max(part.max_seqlen for part in parts) == whole.max_seqlen


def test_a_step_is_the_same_in_whatever_order_steps_are_asked_for() -> None:
    shards = [numbered(5000), numbered(1000, first=10_000)]
    steps = [9000, 3, 2048, 3, 0, 77, 4095, 0]
    jumping = train(shards)
    for step in steps:
        assert_same(jumping.batch(step, range(4)), train(shards).batch(step, range(4)))


def test_another_seed_is_another_order() -> None:
    shards = [numbered(5000)]
    one, two = (train(shards, seed=seed).batch(0, range(4)).input_ids for seed in (1, 2))
    assert not torch.equal(one, two)


def test_targets_are_the_next_tokens() -> None:
    batch = train([numbered(1000)], batch_size=16).batch(2, range(16))
    assert torch.equal(batch.targets, batch.input_ids + 1)


def test_sources_are_mixed_by_weight() -> None:
    shards = [numbered(2000), numbered(2000, first=5000)]
    rows = first_tokens(train(shards, batch_size=64, weights=[3, 1]), 64, 64)
    assert int((rows < 5000).sum()) == 3072  # exactly three quarters of the block of 4096
    assert 160 < int((rows[:256] < 5000).sum()) < 224


def test_a_mixed_source_too_is_seen_window_by_window() -> None:
    """Half of 4096 sequences from a source of 128 windows: 16 whole epochs of it."""
    shards = [numbered(128 * LENGTH + 1), numbered(2000, first=5000)]
    rows = first_tokens(train(shards, batch_size=64), 64, 64)
    assert torch.bincount(rows[rows < 5000] // LENGTH).tolist() == [16] * 128


def test_an_epoch_of_every_source_of_a_mix_is_exact() -> None:
    """A third of the rows from each of three sources: of each the first epoch has every window once."""
    sizes = (312, 171, 50)
    shards = [numbered(size * LENGTH + 1, first=10_000 * source) for source, size in enumerate(sizes)]
    rows = first_tokens(train(shards, batch_size=64), 32, 64)
    for source, size in enumerate(sizes):
        own = rows[rows // 10_000 == source] % 10_000 // LENGTH
        assert sorted(own[:size].tolist()) == list(range(size))


def test_a_source_with_a_tiny_weight_is_not_forgotten() -> None:
    shards = [numbered(2000), numbered(100, first=5000)]
    rows = first_tokens(train(shards, batch_size=4096, weights=[1.0, 1e-9]), 1, 4096)
    assert int((rows >= 5000).sum()) == 1


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 40), length=st.integers(1, 12), starts=st.lists(st.integers(0, 80), max_size=8))
def test_windows_are_the_same_however_the_stream_is_cut_into_files(size: int, length: int, starts: list[int]) -> None:
    stream = np.arange(100, dtype=np.uint16)
    cut = TokenStream([stream[first : first + size] for first in range(0, 100, size)])
    expected = [stream[start : start + length].tolist() for start in starts]
    assert cut.windows(np.array(starts, np.int64), length).tolist() == expected
    assert [cut.tokens(start, start + length).tolist() for start in starts] == expected


def test_windows_leave_no_document_boundary_out_when_files_are_cut() -> None:
    documents = [[0, *range(2, 2 + size), 1] for size in (3, 1, 17, 5, 9, 30, 2, 2, 2, 40)]
    whole = train([make_shards(documents)]).batch(0, range(4))
    cut = train([make_shards(documents, tokens_a_file=7)]).batch(0, range(4))
    assert_same(whole, cut)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 33, 49, 50])
def test_evaluation_predicts_every_token_once_and_pads_the_rest(tokens: int, separate: bool) -> None:
    shards = numbered(tokens, first=100)
    batches = evaluation_batches(shards, 2, separate)
    assert all(batch.input_ids.shape == (2, LENGTH) for batch in batches)
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets[targets != IGNORE].tolist() == list(range(101, 100 + tokens))
    assert not torch.cat([batch.input_ids.flatten() for batch in batches])[tokens:].any()


def test_padding_attends_to_itself_alone() -> None:
    [batch] = evaluation_batches(numbered(12, first=100), 3, separate=False)
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16, 24]


def test_ranks_slice_evaluation_batches_as_they_do_training_batches() -> None:
    batches = EvaluationBatches(make_shards(DOCUMENTS), LENGTH, 4, separate_documents=True)
    whole = batches.batch(0, range(4))
    parts = [batches.batch(0, range(row, row + 1)) for row in range(4)]
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_an_empty_split_has_no_evaluation_batches() -> None:
    assert evaluation_batches(make_shards([]), 2, separate=True) == []


def test_a_source_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match="8 train tokens, sequence_length=8 needs at least 9"):
        train([numbered(8)])


def test_a_source_of_which_too_little_is_left_names_the_shards_that_are_lost(tmp_path: Path) -> None:
    lost = LeftOut(tmp_path, "train", {"train-00000": "shard train-00000.bin is missing"}, 90, 2, 98)
    with pytest.raises(UsageError) as raised:
        train([replace(numbered(8), folder=tmp_path, left_out=lost)])
    assert str(raised.value) == (
        f"{tmp_path} has 8 train tokens left, sequence_length=8 needs at least 9: {lost}; delete {tmp_path} and run "
        "moe-lm prepare, or take the source out"
    )
