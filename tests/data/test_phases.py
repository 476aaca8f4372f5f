"""Phases: the mix and the length of every step are those of its phase, and a source goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.config.data import Phase
from moe_lm.data.batches import PackedBatches
from moe_lm.data.order import data_step
from tests.data.test_batches import assert_same, make_shards, numbered

APART = 20_000  # tokens of one source are numbered from a multiple of it
ROWS, LENGTH = 64, 8  # of a global batch
SIZES = (3100, 1900, 517)


def batches_in(phases: Sequence[Phase], sizes: Sequence[int] = SIZES, seed: int = 1) -> PackedBatches:
    shards = [numbered(size, first=APART * place) for place, size in enumerate(sizes)]
    return PackedBatches(shards, phases, ROWS, seed, separate_documents=False)


def phase(first_step: int, length: int, *weights: float) -> Phase:
    return Phase(first_step, ROWS * LENGTH // length, length, weights)


def rows_of(batches: PackedBatches, steps: range) -> Iterator[torch.Tensor]:
    for step in steps:
        yield from batches.batch(step, range(ROWS)).input_ids


MIXED = [phase(0, 8, 3, 1, 0), phase(64, 8, 0, 1, 1), phase(128, 16, 1, 0, 0), phase(192, 4, 1, 1, 2)]


def test_every_phase_has_its_mix_and_its_length_in_steps_of_as_many_tokens() -> None:
    batches = batches_in(MIXED)
    for begun, shares in zip(MIXED, ((0.75, 0.25, 0), (0, 0.5, 0.5), (1, 0, 0), (0.25, 0.25, 0.5)), strict=True):
        rows = torch.stack(list(rows_of(batches, range(begun.first_step, begun.first_step + 64))))
        assert rows.shape == (64 * begun.rows, begun.sequence_length)
        found = np.bincount(rows[:, 0] // APART, minlength=3) / len(rows)
        assert found.tolist() == pytest.approx(shares, abs=0 if len(rows) % 4096 == 0 else 0.02)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.sampled_from([2, 4, 8, 16]), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(40, 4000), st.integers(40, 900)),
    weights=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=4, max_size=4),
    steps=st.integers(1, 6),
    seed=st.integers(0, 2**62),
)
def test_no_token_comes_twice_in_an_epoch_and_few_are_left_out(
    lengths: list[int], sizes: tuple[int, int], weights: list[tuple[int, int]], steps: int, seed: int
) -> None:
    """Of one length, none: an epoch is every window once. At a change of length, at most the rest of a chunk."""
    phases = [
        phase(number * steps, length, weights[number][0] if number else 1, weights[number][1])
        for number, length in enumerate(lengths)
    ]
    rows = list(rows_of(batches_in(phases, sizes, seed), range(len(phases) * steps)))
    for place, size in enumerate(sizes):
        own = [row - APART * place for row in rows if row[0] // APART == place]
        read = {begun.sequence_length for begun in phases if begun.weights[place]}
        unit = max(read)
        whole = (size - 1) // unit
        seen, changes, before = np.zeros(size, bool), 0, len(own[0])
        for row in own:
            changes += len(row) != before
            before = len(row)
            if seen[row].any():
                chunk = unit * max(1, whole // 16)
                assert whole * unit - seen.sum() <= changes * chunk
                seen[:], changes = False, int(len(read) > 1)  # the change may fall between two epochs
            seen[row] = True


def test_a_source_that_goes_on_in_one_length_is_read_as_without_phases() -> None:
    """Its own windows come in the same order, whatever is read beside it."""
    plain, mixed = (
        batches_in(phases, SIZES[: len(phases[0].weights)])
        for phases in ([phase(0, 8, 1)], [phase(0, 8, 1, 1), phase(5, 8, 1, 3)])
    )
    own = [[int(row[0]) for row in rows_of(batches, range(20)) if row[0] < APART] for batches in (plain, mixed)]
    assert own[1] == own[0][: len(own[1])]
    assert len(own[1]) > 3100 // 8


def test_a_step_in_a_phase_is_the_same_in_whatever_order_and_for_any_number_of_ranks() -> None:
    jumping = batches_in(MIXED)
    for step in (191, 64, 0, 63, 128, 1000, 192, 127):
        whole = batches_in(MIXED).batch(step, range(ROWS))
        assert_same(jumping.batch(step, range(ROWS)), whole)
        for ranks in (2, 4, 32):
            share = ROWS // ranks
            parts = [jumping.batch(step, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
            assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)


def test_a_run_whose_first_phase_is_all_of_it_reads_as_one_without_phases() -> None:
    later = [phase(0, 8, 3, 1, 2), phase(9, 8, 0, 1, 1)]
    for step in range(9):
        assert_same(batches_in(later).batch(step, range(ROWS)), batches_in(later[:1]).batch(step, range(ROWS)))


def test_epochs_add_up_over_phases() -> None:
    batches = batches_in(MIXED)
    rows = torch.cat(list(rows_of(batches, range(256))))
    for place, (size, epochs) in enumerate(zip(SIZES, batches.epochs(256), strict=True)):
        assert epochs == pytest.approx(int((rows // APART == place).sum()) / size, rel=0.04)


def test_a_source_too_short_for_a_phase_that_does_not_read_it_is_no_error() -> None:
    shards = [numbered(100), make_shards([range(9)])]
    phases = [phase(0, 8, 1, 1), phase(1, 16, 1, 0)]
    assert PackedBatches(shards, phases, ROWS, 1, True).batch(1, range(ROWS)).input_ids.shape == (32, 16)


# Rollbacks


def after(
    windows: list[tuple[int, int]], phases: Sequence[Phase], steps: range, sizes: Sequence[int] = SIZES
) -> list[torch.Tensor]:
    """The rows of training steps when rollbacks have left these windows out."""
    batches = batches_in(phases, sizes)
    batches.leave_out(windows)
    return [batches.batch(data_step(step, windows), range(ROWS)).input_ids for step in steps]


def test_after_a_rollback_every_training_step_has_the_rows_of_its_phase() -> None:
    shapes = [tuple(rows.shape) for rows in after([(10, 20), (150, 163)], MIXED, range(256))]
    assert shapes == [(begun.rows, begun.sequence_length) for begun in MIXED for _ in range(64)]


@pytest.mark.parametrize("windows", [[(3, 5)], [(3, 9)], [(3, 9), (9, 14)], [(6, 9)]])
def test_data_that_is_left_out_is_read_in_no_later_phase_either(windows: list[tuple[int, int]]) -> None:
    """A phase begins with step 6, and the last source is read in it alone."""
    phases, sizes = [phase(0, 8, 3, 1, 0), phase(6, 8, 3, 1, 1)], [19_000] * 3  # less than an epoch
    to = windows[0][0]
    read = after([], phases, range(windows[0][1]), sizes)
    for start, stop in windows[1:]:
        read += after(windows[:1], phases, range(to, to + stop - start), sizes)
    left_out = set(torch.cat(read[to:])[:, 0].tolist())
    found = torch.cat([*read[:to], *after(windows, phases, range(to, 12), sizes)])[:, 0].tolist()
    assert left_out.isdisjoint(found)
    assert len(found) == len(set(found)) == 12 * ROWS
