"""The dispatcher of expert parallelism in a group of one rank: its order of events, and what it leaves differentiable.

Groups of several ranks are in tests/distributed/test_experts_of_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from moe_lm.kernels.kernels import EXPERTS
from moe_lm.model.moe import MoE
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.expert_parallel import AllToAllDispatcher
from tests.tiny import random, tiny

Change = Callable[[MoE, Tensor], object]
CYCLES = 20_000_000  # of a GPU's clock: about 10 ms


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of one rank: this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def layer(group: dist.ProcessGroup | None = None, kernel: str = "plain") -> MoE:
    """A layer with random weights, whose tokens travel within the group if there is one."""
    moe = MoE(tiny())
    for seed, parameter in enumerate(moe.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=seed) * 0.3)
    moe.gate.e_score_correction_bias.zero_()
    moe.experts.grouped_mm = EXPERTS[kernel]
    if group is not None:
        moe.dispatcher = AllToAllDispatcher(group, Exchange(torch.device("cpu")))
    return moe


def computed(
    moe: MoE, change: Change | None = None, repeated: bool = False, device: str = "cpu", rows: int = 2
) -> dict[str, Tensor]:
    """The layer's output for some tokens, and every gradient."""
    x_BSD = random(rows, 7, 32, seed=9).to(device).requires_grad_()
    if change is not None:
        change(moe, x_BSD)
    out: Tensor = checkpoint(lambda x: moe(x)[0], x_BSD, use_reentrant=False) if repeated else moe(x_BSD)[0]
    out.backward(random(rows, 7, 32, seed=10).to(device))
    named = {"x": x_BSD, **dict(moe.named_parameters())}
    return {"out": out.detach()} | {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


CHANGES: dict[str, Change] = {
    "all trained": lambda moe, x: None,
    "frozen experts": lambda moe, x: moe.experts.requires_grad_(False),
    "frozen router and input": lambda moe, x: (moe.gate.requires_grad_(False), x.requires_grad_(False)),
    "frozen input": lambda moe, x: x.requires_grad_(False),
}


@pytest.mark.parametrize("repeated", [False, True], ids=["", "repeated"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_results_and_gradients_are_those_of_the_local_dispatcher(
    group: dist.ProcessGroup, change: Change, repeated: bool
) -> None:
    """Also when the forward pass is repeated in the backward pass."""
    expected, found = computed(layer(), change), computed(layer(group), change, repeated)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_tokens_travel_while_the_shared_experts_are_computed(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which a pass is issued; the host reads the counts once, as late as it can."""
    events: list[str] = []
    moe = layer(group)
    assert moe.shared_experts is not None
    record_exchanges(events, monkeypatch)
    for module, name in (
        (moe.shared_experts.gate_proj, "shared gate"), (moe.shared_experts.up_proj, "shared up"),
        (moe.shared_experts.down_proj, "shared down"), (moe.experts, "experts"),
    ):  # fmt: skip
        module.register_forward_hook(lambda *_, name=name: events.append(name))
        next(module.parameters()).register_hook(lambda _, name=name: events.append(name))
    x_BSD = random(2, 7, 32).requires_grad_()
    out, _ = moe(x_BSD)
    shape, choices = "14 x 32 float32", "14 x 8 float32"
    assert events == [
        "send 1 x 2 int64", "shared up", "shared gate", "wait for 1 x 2 int64",
        f"send {shape}", f"send {choices}", f"wait for {shape}", f"wait for {choices}",
        "experts",
        f"send {shape}", "shared down", f"wait for {shape}",
    ]  # fmt: skip
    events.clear()
    out.sum().backward()
    assert [event for event in events if event != "experts"] == [
        f"send {shape}", "shared down", f"wait for {shape}",
        f"send {shape}", f"send {choices}", "shared gate", "shared up", f"wait for {shape}", f"wait for {choices}",
    ]  # fmt: skip
    assert events.index(f"wait for {shape}") < events.index("experts") < len(events) - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("late", ["counts", "rows"])
@pytest.mark.parametrize("repeated", [False, True], ids=["", "repeated"])
def test_a_late_side_stream_changes_no_number(monkeypatch: pytest.MonkeyPatch, repeated: bool, late: str) -> None:
    """Nothing is read before it is there, and no memory is taken before it has been read."""
    fetch, beside = Exchange.fetch, Exchange.beside

    def fetch_late(self: Exchange, *arguments: Any) -> Callable[[], Tensor]:
        with beside(self):
            torch.cuda._sleep(CYCLES)
        return fetch(self, *arguments)

    @contextmanager
    def beside_late(self: Exchange, *arguments: Any) -> Iterator[None]:
        with beside(self, *arguments):
            torch.cuda._sleep(CYCLES)
            yield

    here = torch.device("cuda", torch.cuda.current_device())
    expected = computed(layer().to(here), device="cuda", rows=300)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        monkeypatch.setattr(Exchange, *(("fetch", fetch_late) if late == "counts" else ("beside", beside_late)))
        moe = layer().to(here)
        moe.dispatcher = AllToAllDispatcher(dist.group.WORLD, Exchange(here))
        for _ in range(3):  # memory of one pass is taken by the next
            moe.zero_grad()
            found = computed(moe, repeated=repeated, device="cuda", rows=300)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    finally:
        dist.destroy_process_group()


def test_compilation_stops_at_the_exchanges_alone(group: dist.ProcessGroup) -> None:
    """What lies between them is compiled, once for any number of tokens."""
    compiler = CompileCounter()
    moe, plain = layer(group, "bucketed"), layer()
    moe.compile(backend=compiler, dynamic=True)
    for tokens in (7, 9, 4):
        x_BSD = random(2, tokens, 32, seed=tokens)
        torch.testing.assert_close(moe(x_BSD)[0], plain(x_BSD)[0], rtol=1e-5, atol=1e-6)
    assert compiler.frame_count == 7
    torch._dynamo.reset()


def record_exchanges(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note each exchange when it is issued and when it is waited for."""
    exchange = dist.all_to_all_single

    def recorded(output: Tensor, tensor: Tensor, *splits: Any, **options: Any) -> Any:
        what = f"{len(tensor)} x {tensor.shape[1]} {str(tensor.dtype).removeprefix('torch.')}"
        events.append(f"send {what}")
        work = exchange(output, tensor, *splits, **options)

        class Work:
            def wait(self) -> None:
                events.append(f"wait for {what}")
                work.wait()

        return Work()

    monkeypatch.setattr(dist, "all_to_all_single", recorded)
