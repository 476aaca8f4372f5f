"""What Muon and LAMB add to a planned update: the products that a step has, and the bytes that its ranks exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import OptimizerConfig, TrainConfig
from moe_lm.optim.groups import build_optimizers
from moe_lm.optim.matrices import Share, Travel, whole
from moe_lm.tools.plan import matrices
from moe_lm.tools.plan.devices import find_device
from moe_lm.tools.plan.matrices import Matrices
from moe_lm.tools.plan.predict import step_time
from moe_lm.tools.plan.simulate import simulate
from moe_lm.tools.plan.trace import Trace
from tests.tiny import tiny, tiny_model

SHAPES = ((6, 4), (5, 4, 6), (6, 4), (3, 8))  # a stack of experts among matrices
MUON = OptimizerConfig(name="muon")


@dataclass
class Counting:
    """Ranks that count the bytes which others send and get, this one's side of an exchange as a collective has it."""

    rank: int
    size: int
    swaps: list[int] = field(default_factory=list)
    collected: int = 0

    def swap(self, sent: Tensor, sizes: list[int], arriving: list[int]) -> Tensor:
        others = [sum(side) - side[self.rank] for side in (sizes, arriving)]
        self.swaps.append(sent.element_size() * max(others))
        return sent.new_zeros(sum(arriving))

    def collect(self, tensor: Tensor) -> Tensor:
        self.collected += self.size * tensor.nbytes
        return tensor.new_zeros(self.size * len(tensor))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def planned(optimizer: OptimizerConfig, stage: int, ranks: int = 2) -> Trace:
    train = TrainConfig(steps=1, global_batch_size=2, precision="bfloat16", optimizer=optimizer)
    parallel = ParallelConfig(engine="deepspeed", zero_stage=stage) if stage else ParallelConfig()  # type: ignore[arg-type]
    return simulate(tiny(num_hidden_layers=3), train, parallel, 32, world_size=ranks)


def test_the_products_of_a_planned_update_are_those_of_a_step() -> None:
    model = tiny_model(0, num_hidden_layers=3)
    optimizers = build_optimizers(model, MUON)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        for optimizer in optimizers:
            optimizer.step()
    assert planned(MUON, 0, ranks=1).of(["update"]).flops() == counter.get_total_flops() > 0
    assert planned(OptimizerConfig(), 0, ranks=1).of(["update"]).flops() == 0


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_bytes_of_a_planned_exchange_are_those_of_the_busiest_rank(stage: int) -> None:
    some, size = Matrices("muon", SHAPES, 1, 4), 3
    found = matrices.exchanges(some, stage, tuple(range(size)))
    ranks = [travelling(stage, rank, size) for rank in range(size)]
    if stage == 0:
        assert sum(one.bytes * one.times for one in found) == ranks[0].collected > 0
        assert {one.kind for one in found} == {"all_gather"}
    else:  # a third of an all-to-all's bytes stays at home
        busiest = sum(map(max, zip(*(rank.swaps for rank in ranks), strict=True)))
        assert sum(one.bytes * one.times for one in found) * (size - 1) / size == pytest.approx(busiest)
        assert busiest > 0
        assert sum(one.times for one in found) == len(ranks[0].swaps)


def travelling(stage: int, rank: int, size: int) -> Counting:
    """A rank after all batches went to the ranks that work on them and back."""
    ranks = Counting(rank, size)
    if stage == 0:
        tensors = [torch.zeros(shape) for shape in SHAPES]
        share = whole(tensors, ranks)
    else:
        parts = matrices.cut(stage, SHAPES, size)
        assert sorted(part[:1] + part[2:4] for some in parts for part in some) == covering(stage, size)
        tensors = [torch.zeros(sum(part.length for part in parts[rank]) + 99)]
        share = Share(parts, ranks)
    travel = Travel(share, torch.float32, torch.device("cpu"))
    flat = [tensor.view(-1) for tensor in tensors]
    for batch in travel.batches:
        results = travel.there(batch, flat)
        assert len(list(travel.back(batch, results, flat))) > 0 or stage
    return ranks


def covering(stage: int, size: int) -> list[tuple[int, ...]]:
    """Parameter, first element and number of elements of all parts: 24, 120, 24 and 24 among 3 ranks."""
    if stage == 1:  # 64 each
        return [(0, 0, 24), (1, 0, 40), (1, 40, 64), (1, 104, 16), (2, 0, 24), (3, 0, 24)]
    return [(n, rank * piece, piece) for n, piece in enumerate((8, 40, 8, 8)) for rank in range(size)]


def test_lamb_sums_norms_and_moves_more_than_adamw() -> None:
    lamb, adamw = planned(OptimizerConfig(name="lamb"), 2), planned(OptimizerConfig(), 2)
    more = set(lamb.collectives) - set(adamw.collectives)
    assert [(one.kind, one.times) for one in more] == [("all_reduce", 1)] * len(more) != []
    assert lamb.of(["update"]).bytes > 1.5 * adamw.of(["update"]).bytes
    assert lamb.of(["update"]).flops() == 0


def test_ranks_share_the_work_of_muon() -> None:
    one, two = planned(MUON, 0, ranks=1), planned(MUON, 3, ranks=2)
    assert 0.5 <= two.of(["update"]).flops() / one.of(["update"]).flops() < 0.75
    device = find_device("h100")
    seconds = step_time(two, device).of
    assert seconds["dense products", "update"] > 0
    kinds = [one.kind for one in two.collectives if one.during == "update"]
    assert "all_to_all" in kinds
    assert seconds["exchanges", "update"] > 0  # without Muon, stage 3 sends nothing after the backward pass
