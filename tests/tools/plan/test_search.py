"""The layouts of a number of devices, out of real traces of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig, PretrainConfig, RunConfig
from moe_lm.tools.plan.devices import OF_MEMORY, find_device
from moe_lm.tools.plan.plan import tracer_of
from moe_lm.tools.plan.report import settings
from moe_lm.tools.plan.search import (
    Layout,
    Tracer,
    _micro_batches,
    between,
    estimate,
    expert_parallel_sizes,
    nearest,
    search,
    with_own,
)
from moe_lm.tools.plan.trace import Trace
from tests.tiny import tiny

SETTINGS = (
    "run_dir=run", "train.precision=bfloat16", "train.global_batch_size=16", "model.n_routed_experts=2",
    "model.num_experts_per_tok=1", "train.balance.bias_update_rate=0",
)  # fmt: skip


GIB = 1 << 30


@pytest.fixture(scope="module")
def config(tiny_pretrain: Path) -> PretrainConfig:
    return load_config(PretrainConfig, tiny_pretrain, SETTINGS)


@pytest.fixture(scope="module")
def trace(config: PretrainConfig) -> Tracer:
    """Traces each layout once in this file."""
    return tracer_of(config.model, "cuda")


def test_a_larger_micro_batch_lies_on_the_line_through_two_smaller_ones(config: PretrainConfig, trace: Tracer) -> None:
    one, two, four = (trace(Layout(2, 2, 1, rows, "none").applied(config), 2) for rows in (1, 2, 4))
    found = between(one, two, four.tokens)
    assert (found.micro_batches, found.tokens) == (four.micro_batches, four.tokens)
    assert found.step.flops() == pytest.approx(four.step.flops(), rel=1e-3)
    assert found.step.bytes == pytest.approx(four.step.bytes, rel=0.02)
    assert found.memory.peak - found.memory.resident == pytest.approx(four.memory.peak - four.memory.resident, rel=0.05)
    for ours, theirs in zip(found.collectives, four.collectives, strict=True):
        assert (ours.kind, ours.times) == (theirs.kind, theirs.times)
        assert ours.bytes == pytest.approx(theirs.bytes, rel=0.02)


def test_a_micro_batch_with_other_exchanges_is_traced_itself(config: PretrainConfig, trace: Tracer) -> None:
    """Such as one exchange fewer: two that take the same are counted as one."""
    asked: list[int] = []

    def uneven(config: RunConfig, devices: int) -> Trace:
        rows = config.train.rows_at_once(devices)
        found = trace(config, devices)
        asked.append(rows)
        return replace(found, collectives=found.collectives[: -1 if rows == 2 else None])

    group = Layout(2, 2, 1, 1, "none")
    found = list(_micro_batches(config, group, find_device("h100"), uneven))
    assert [item.layout.rows for item in found] == [1, 2, 4, 8]
    assert set(asked) == {1, 2, 4, 8}


@pytest.mark.slow
def test_the_fastest_layout_that_fits_comes_first_and_the_nearest_to_fitting_next(tiny_pretrain: Path) -> None:
    config = load_config(PretrainConfig, tiny_pretrain, [*SETTINGS, "train.global_batch_size=4"])
    trace, device = tracer_of(config.model, "cuda"), find_device("h100")
    found = search(config, config.model, 1, device, trace)
    assert len({item.layout for item in found}) == len(found)
    assert {(item.layout.rows, item.layout.zero) for item in found} == {(1, 0), (2, 0), (4, 0)}
    assert {item.layout.recompute for item in found} == {"none", "selective", "full"}
    assert all(item.fits for item in found)
    assert [item.seconds for item in found] == sorted(item.seconds for item in found)

    tight = replace(device, memory=sorted(item.peak for item in found)[len(found) // 2] / OF_MEMORY)
    judged = search(config, config.model, 1, tight, trace)
    fits = [item.fits for item in judged]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    assert judged[-1].reason.endswith(f"GiB of {tight.usable / GIB:.1f}")

    own = max(found, key=lambda item: item.peak)
    asked = own.layout.applied(config)
    other = nearest(asked, judged)
    assert other is not None
    assert other.fits
    fewest = min(len(item.layout.changes(asked)) for item in judged if item.fits)
    assert len(other.layout.changes(asked)) == fewest
    assert nearest(asked, search(config, config.model, 1, replace(device, memory=1), trace)) is None


def test_where_nothing_fits_higher_stages_are_tried_and_then_host_memory(tiny_pretrain: Path) -> None:
    config = load_config(
        PretrainConfig, tiny_pretrain, [*SETTINGS, "train.global_batch_size=2", "train.micro_batch_size=1"]
    )
    trace, device = tracer_of(config.model, "cuda"), find_device("h100")
    found = search(config, config.model, 2, replace(device, memory=1), trace)
    kinds = {(item.layout.expert_parallel, item.layout.zero, item.layout.offload) for item in found}
    assert kinds == {(1, 0, False), *((size, stage, off) for size in (1, 2) for stage in (1, 2, 3) for off in (0, 1))}
    by_layout = {item.layout: item for item in found}
    for moved in (item for item in found if item.layout.offload):
        kept = by_layout[replace(moved.layout, offload=False)]
        assert moved.peak == kept.peak - kept.trace.memory.optimizer
        assert moved.trace.memory.optimizer == 0
        assert moved.time.by_cause()["offload"] > 0


def test_a_layout_applied_is_the_layout_of_the_config(config: PretrainConfig, trace: Tracer) -> None:
    shared = config.model_copy(update={"parallel": ParallelConfig(sequence_parallel_size=2)})
    assert Layout.of(Layout(4, 2, 3, 4, "full").applied(shared), 4) == Layout(4, 2, 3, 4, "full")
    assert Layout(4, 2, 3, 4, "full").applied(shared).parallel.sequence_parallel_size == 2
    for layout in (
        Layout(2, 2, 3, 2, "full"),
        Layout(2, 1, 0, 4, "none"),
        Layout(2, 2, 1, 1, "selective", offload=True),
    ):
        assert Layout.of(layout.applied(config), 2) == layout
    kernel = config.parallel.model_copy(update={"attention_kernel": "flash_attn_3"})
    moved = Layout(2, 2, 1, 1, "none").applied(config.model_copy(update={"parallel": kernel}))
    assert moved.parallel.attention_kernel == "flash_attn_3"
    own = Layout(2, 2, 1, 1, "none")
    assert estimate(own.applied(config), 2, find_device("h100"), trace).layout == own


@pytest.mark.parametrize(
    "own",
    [
        ("parallel.engine=torch", "train.compile=true"),
        ("parallel.engine=deepspeed", "parallel.expert_parallel_size=2", "parallel.offload_optimizer=true"),
        ("parallel.engine=deepspeed", "parallel.zero_stage=3", "train.activation_checkpointing=full"),
    ],
)
def test_the_changes_of_a_layout_typed_behind_a_config_ask_for_it(tiny_pretrain: Path, own: tuple[str, ...]) -> None:
    """Settings are taken back with it that the layout does not have, such as compilation under ZeRO 3."""
    config = load_config(PretrainConfig, tiny_pretrain, [*SETTINGS, *own])
    assert Layout.of(config, 2).changes(config) == {}
    for layout in (Layout(2, 2, 3, 2, "none"), Layout(2, 1, 0, 4, "selective"), Layout(2, 1, 1, 1, "full", True)):
        changes = settings(layout.changes(config)).split()
        asked = load_config(PretrainConfig, tiny_pretrain, [*SETTINGS, *own, *changes])
        assert Layout.of(asked, 2) == layout
        assert asked.train.compile is (config.train.compile and layout.zero != 3)


@pytest.mark.slow
def test_the_configs_own_layout_and_the_fastest_are_traced_not_taken_from_a_line(
    config: PretrainConfig, trace: Tracer
) -> None:
    device = find_device("h100")
    found = search(config, config.model, 2, device, trace)
    own = estimate(Layout(2, 2, 2, 4, "selective").applied(config), 2, device, trace)
    settled = with_own(own, found, lambda layout: estimate(layout.applied(config), 2, device, trace))
    assert next(item for item in settled if item.layout == own.layout) is own
    assert {item.layout for item in settled} == {item.layout for item in found} | {own.layout}
    assert settled[0].peak == trace(settled[0].layout.applied(config), 2).memory.peak
    assert [item.seconds for item in settled] == sorted(item.seconds for item in settled)


def test_what_does_not_divide_is_left_out_or_refused(config: PretrainConfig, trace: Tracer) -> None:
    assert expert_parallel_sizes(tiny(n_routed_experts=63, num_experts_per_tok=7), 8, 8) == [1]
    assert expert_parallel_sizes(tiny(n_routed_experts=64), 512, 8) == [1, 8, 16, 64]
    assert expert_parallel_sizes(tiny(n_routed_experts=0), 8, 8) == [1]
    with pytest.raises(
        UsageError, match="is not divisible by the 5 devices; choose a multiple of 5, or another --gpus"
    ):
        search(config, config.model, 5, find_device("h100"), trace)
