"""The time of a step out of a trace, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_lm.model.size import count_parameters, flops_per_token
from moe_lm.tools.plan.devices import Device, Network
from moe_lm.tools.plan.predict import exchange_seconds, mfu, step_time
from moe_lm.tools.plan.trace import Collective, CollectiveKind, HostSync, Memory, Product, Trace, Work
from tests.tiny import tiny

DEVICE = Device(
    "ours", memory=1e9, peak=1000.0, dense=100.0, grouped=50.0, attention=20.0, single=10.0, copy=1000.0,
    inside=Network("inside", 100.0, 0.5, ""), between=Network("between", 10.0, 2.0, ""), per_node=4,
    launch=0.01, kernel=0.001, sync=3.0,
)  # fmt: skip
DENSE = Product("dense", 1, 1, 1, 1, flops=500, bytes=10, element_size=2)


def trace(work: dict, micro_batches: int = 1, **changes: object) -> Trace:
    empty = Memory(0, 0, 0, 0, 0, 0, 0, "")
    made = Trace(8, 0, "cuda", 16, micro_batches, work, (), (), (), empty)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_products_run_at_their_rate_and_other_kernels_at_the_bandwidth() -> None:
    products = (DENSE, replace(DENSE, kind="grouped", count=2), replace(DENSE, kind="attention", flops=40))
    found = step_time(trace({("forward", "experts"): Work(products, bytes=3000, launches=6)}), DEVICE)
    assert found.by_cause() == pytest.approx(
        {
            "grouped products": 2 * (10 + 0.001),
            "dense products": 5.001,
            "other kernels": 3 + 2 * 0.001,
            "attention": 2.001,
        }
    )
    assert next(iter(found.by_cause())) == "grouped products", "the longest first"
    assert found.by_part() == {"experts": pytest.approx(found.seconds)}


def test_a_thin_product_is_bounded_by_its_bytes_and_a_float32_one_by_its_own_rate() -> None:
    thin, single = replace(DENSE, bytes=8000), replace(DENSE, element_size=4)
    assert step_time(trace({("forward", "head"): Work((thin,), 0, 1)}), DEVICE).seconds == pytest.approx(8.001)
    assert step_time(trace({("forward", "router"): Work((single,), 0, 1)}), DEVICE).seconds == pytest.approx(50.001)


def test_launches_count_where_a_pass_has_more_of_them_than_it_has_work() -> None:
    work = {("forward", "norms"): Work((), bytes=100, launches=300), ("forward", "dense"): Work((), 0, 100)}
    found = step_time(trace(work, micro_batches=2), DEVICE)
    busy = 0.1 + 400 * 0.001
    assert found.seconds == pytest.approx(2 * 400 * 0.01)
    assert found.of["launches", "norms"] == pytest.approx(2 * (4 - busy) * 3 / 4)
    busier = {**work, ("forward", "head"): Work((DENSE,), 0, 1)}
    assert "launches" not in step_time(trace(busier), DEVICE).by_cause()


def test_passes_of_a_micro_batch_count_once_each_and_the_update_once_a_step() -> None:
    work = {("backward", "dense"): Work((DENSE,), 0, 1), ("update", "update"): Work((), 7000, 1)}
    found = step_time(trace(work, micro_batches=3), DEVICE)
    assert found.seconds == pytest.approx(3 * 5.001 + 7.001)


def test_a_wait_of_the_host_counts_every_time() -> None:
    sync = HostSync("dispatch", "forward", "aten._local_scalar_dense", "x.py:1", times=2, expected=True)
    assert step_time(trace({}, micro_batches=5, syncs=(sync,)), DEVICE).seconds == 2 * 5 * 3.0


@pytest.mark.parametrize(
    ("kind", "ranks", "seconds"),
    [
        ("all_to_all", (0, 1, 2, 3), 0.5 + 800 * 3 / 4 / 100),
        ("all_to_all", range(8), 2.0 + 800 * 4 / 8 / 10),
        ("all_reduce", (0, 1, 2, 3), 0.5 + 2 * 800 * 3 / 4 / 100),
        ("all_reduce", range(8), 2.0 + 2 * 800 * 7 / 8 / 40),  # all four devices of a node send at once
        ("reduce_scatter", (0, 4), 2.0 + 800 / 2 / 10),  # the same device of two nodes
        ("all_gather", (0, 1), 0.5 + 800 / 2 / 100),
        ("broadcast", (0, 1), 0.5 + 800 / 100),
        ("all_reduce", (3,), 0.0),
    ],
)
def test_an_exchange_takes_the_network_that_its_ranks_share(
    kind: CollectiveKind, ranks: tuple[int, ...], seconds: float
) -> None:
    collective = Collective(kind, 800, tuple(ranks), "dispatch", "forward", 1)
    assert exchange_seconds(collective, DEVICE) == pytest.approx(seconds)


def test_an_exchange_counts_as_far_as_nothing_hides_it() -> None:
    collective = Collective("all_gather", 800, (0, 1), "dispatch", "forward", times=3, hidden_by=Work((), 2000, 0))
    assert step_time(trace({}, collectives=(collective,)), DEVICE).seconds == pytest.approx(3 * (4.5 - 2))
    hidden = replace(collective, hidden_by=Work((), 5000, 0))
    assert step_time(trace({}, collectives=(hidden,)), DEVICE).seconds == 0


def test_gradients_of_all_groups_share_the_backward_pass_that_hides_them() -> None:
    one = Collective("all_gather", 800, (0, 1), "update", "backward", times=1, hidden_by=Work((), 5000, 0))
    assert step_time(trace({}, collectives=(one, one)), DEVICE).seconds == pytest.approx(2 * 4.5 - 5)
    apart = tuple(replace(one, part="dispatch") for _ in range(2))  # each has its own work beside it
    assert step_time(trace({}, collectives=apart), DEVICE).seconds == 0


def test_mfu_has_the_numerator_of_the_paper_and_the_peak_of_all_devices() -> None:
    model = tiny()
    scores = 3 * model.num_hidden_layers * model.num_attention_heads * 2 * model.head_size * 16
    half, full = (mfu(model, 16, causal, tokens=1000, devices=8, peak=1e9) for causal in (True, False))
    assert half == pytest.approx(1000 * (6 * count_parameters(model).multiplied + scores) / 8e9)
    assert full - half == pytest.approx(1000 * scores / 8e9)
    assert full == 1000 * flops_per_token(model, 16, False) / 8e9
