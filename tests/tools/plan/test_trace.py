from __future__ import annotations

from moe_lm.tools.plan.trace import Memory, Product, Trace, Work

MEMORY = Memory(1, 2, 3, 4, 5, 6, 21, "forward, layer 0, experts")


def test_a_step_has_every_pass_as_often_as_it_has_micro_batches_and_one_update() -> None:
    product = Product("dense", rows=2, columns=3, inner=4, groups=1, flops=48, bytes=52, element_size=2)
    forward, update = Work((product,), bytes=10, launches=2), Work(bytes=7, launches=1)
    work = {
        ("forward", "attention"): forward,
        ("backward", "attention"): forward.times(2),
        ("update", "update"): update,
    }
    trace = Trace(8, 0, "cuda", 64, 5, work, (), (), (), MEMORY)
    assert trace.of(passes=["forward", "backward"]).flops() == 3 * 48
    assert trace.step.flops("dense") == 5 * 3 * 48
    assert trace.step.flops("grouped") == 0
    assert (trace.step.bytes, trace.step.launches) == (5 * 3 * 10 + 7, 5 * 3 * 2 + 1)


def test_resident_memory_is_all_but_what_a_pass_keeps() -> None:
    assert MEMORY.resident == 15
