"""The layouts of a number of devices, out of real traces of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.tools.plan.devices import find_device
from moe_lm.tools.plan.plan import tracer_of
from moe_lm.tools.plan.search import Layout, between, estimate, expert_parallel_sizes, nearest, search
from tests.tiny import tiny

BFLOAT16 = ("train.precision=bfloat16", "parallel.device=auto")


@pytest.fixture
def config(tiny_pretrain: Path) -> PretrainConfig:
    return load_config(PretrainConfig, tiny_pretrain, ["run_dir=run", "train.global_batch_size=32", *BFLOAT16])


def test_a_larger_micro_batch_lies_on_the_line_through_two_smaller_ones(config: PretrainConfig) -> None:
    trace = tracer_of(config.model, "cuda")
    one, two, four = (
        trace(Layout(4, 2, 1, rows, "none").applied(config), 4) for rows in (1, 2, 4)
    )
    found = between(one, two, four.tokens)
    assert (found.micro_batches, found.tokens) == (four.micro_batches, four.tokens)
    assert found.step.flops() == pytest.approx(four.step.flops(), rel=1e-3)
    assert found.step.bytes == pytest.approx(four.step.bytes, rel=0.02)
    assert found.memory.peak == pytest.approx(four.memory.peak, rel=0.02)
    for ours, theirs in zip(found.collectives, four.collectives, strict=True):
        assert (ours.kind, ours.times) == (theirs.kind, theirs.times)
        assert ours.bytes == pytest.approx(theirs.bytes, rel=0.02)


def test_every_layout_that_divides_is_there_once_and_the_fastest_that_fits_comes_first(config: PretrainConfig) -> None:
    device = find_device("h100")
    found = search(config, config.model, 4, device, tracer_of(config.model, "cuda"))
    layouts = [item.layout for item in found]
    assert len(set(layouts)) == len(layouts)
    assert {layout.expert_parallel for layout in layouts} == {1, 2, 4}
    assert {layout.rows for layout in layouts} == {1, 2, 4, 8}
    assert {layout.zero for layout in layouts} == {0, 1, 2, 3}
    assert all(item.fits for item in found)
    assert [item.seconds for item in found] == sorted(item.seconds for item in found)
    tight = replace(device, memory=sorted(item.peak for item in found)[len(found) // 2])
    judged = search(config, config.model, 4, tight, tracer_of(config.model, "cuda"))
    fits = [item.fits for item in judged]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    assert "GiB of" in judged[-1].reason


def test_the_nearest_layout_that_fits_changes_as_little_as_can_be(config: PretrainConfig) -> None:
    trace, device = tracer_of(config.model, "cuda"), find_device("h100")
    own = estimate(config, 4, device, trace)
    smaller = replace(device, memory=own.peak - 1)
    other = nearest(own.layout, search(config, config.model, 4, smaller, trace))
    assert other is not None
    assert other.peak < own.peak
    assert len(other.layout.changes(own.layout)) == 1
    assert nearest(own.layout, search(config, config.model, 4, replace(device, memory=1), trace)) is None


def test_optimizer_state_lies_in_host_memory_only_where_nothing_fits_otherwise(config: PretrainConfig) -> None:
    trace, device = tracer_of(config.model, "cuda"), find_device("h100")
    found = search(config, config.model, 4, device, trace)
    assert not any(item.layout.offload for item in found)
    least = min(item.peak for item in found)
    judged = search(config, config.model, 4, replace(device, memory=(least - 1) / 0.92), trace)
    moved = [item for item in judged if item.layout.offload]
    assert moved
    assert all(item.trace.memory.optimizer == 0 and item.time.by_cause()["offload"] > 0 for item in moved)


def test_a_layout_applied_is_the_layout_of_the_config(config: PretrainConfig) -> None:
    for layout in (Layout(4, 2, 3, 2, "full"), Layout(4, 1, 0, 8, "none"), Layout(4, 4, 1, 1, "none", offload=True)):
        assert Layout.of(layout.applied(config), 4) == layout


def test_what_does_not_divide_is_left_out_or_refused(config: PretrainConfig) -> None:
    assert expert_parallel_sizes(tiny(n_routed_experts=63, num_experts_per_tok=7), 8) == [1]
    assert expert_parallel_sizes(tiny(n_routed_experts=64), 512) == [1, 2, 4, 8, 16, 32, 64]
    assert expert_parallel_sizes(tiny(n_routed_experts=0), 8) == [1]
    with pytest.raises(UsageError, match="train.global_batch_size=32 is not divisible by the 5 devices"):
        search(config, config.model, 5, find_device("h100"), tracer_of(config.model, "cuda"))
