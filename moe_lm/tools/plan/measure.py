"""Rates of this machine, measured in as many processes at once as the layout has ranks here, so that they share it.

What is timed has the shapes of the config: forward and backward together, as a step runs them. Nothing is kept.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.config.model import ModelConfig
from moe_lm.kernels import kernels
from moe_lm.kernels.device import DTYPES, pick_device
from moe_lm.parallel import process_group
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.plan.devices import KERNEL, SYNC, Device, Network
from moe_lm.tools.ranks import run_ranks

MOST_RANKS = 8  # that are started to measure
TIMES = 5  # of which the median counts
TIMEOUT_SECONDS = 120
ADVICE = "measure smaller products (train.micro_batch_size, data.sequence_length), or give the rates with --rate"
SMALL, LARGE = 1 << 10, 8 << 20  # numbers in a sum over the ranks


@dataclass(frozen=True)
class Shapes:
    """Sizes of the products to time: those of a micro-batch of the model."""

    tokens: int
    sequence: int
    hidden: int
    width: int  # of an expert, or of a dense layer
    experts: int  # 0 in a dense model
    per_token: int
    heads: int
    head: int
    dtype: str
    device: str

    @classmethod
    def of(cls, model: ModelConfig, tokens: int, sequence: int, dtype: torch.dtype, device: torch.device) -> Shapes:
        width = model.expert_size if model.n_routed_experts else model.intermediate_size
        return cls(
            tokens, sequence, model.hidden_size, width, model.n_routed_experts, model.num_experts_per_tok,
            model.num_attention_heads, model.head_size, str(dtype).removeprefix("torch."), device.type,
        )  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """FLOP/s of products, bytes/s of other kernels, seconds of a launch; of sums over the ranks bytes/s and seconds."""

    dense: float
    grouped: float
    attention: float
    single: float
    copy: float
    launch: float
    reduce: float
    latency: float


def measured(shapes: Shapes, ranks: int, memory: int) -> Device:
    """This machine as a device of the table; `memory` is a rank's share in bytes."""
    here = min(ranks, MOST_RANKS) if shapes.device == "cpu" else 1
    with TemporaryDirectory() as folder:
        (Path(folder) / "shapes.json").write_text(json.dumps(asdict(shapes)), encoding="utf-8")
        threads = max(1, torch.get_num_threads() // here)
        run_ranks("moe_lm.tools.plan.measure", Path(folder), here, TIMEOUT_SECONDS, threads, advice=ADVICE)
        rates = Rates(**json.loads((Path(folder) / "rates.json").read_text(encoding="utf-8")))
    shared = max(1.0, ranks / here) if shapes.device == "cpu" else 1.0  # more ranks than were measured share the same
    network = Network("this machine", rates.reduce / shared, rates.latency, "measured")
    is_cpu = shapes.device == "cpu"
    return Device(
        name=f"{shapes.device} (measured)",
        memory=memory,
        peak=max(rates.dense, rates.grouped) / shared,  # no data sheet: MFU is against the products measured
        dense=rates.dense / shared,
        grouped=rates.grouped / shared,
        attention=rates.attention / shared,
        single=rates.single / shared,
        copy=rates.copy / shared,
        inside=network,
        between=network,
        per_node=ranks,
        # A CPU is host and device in one: a launch is work of its own, and there is nothing to wait for.
        launch=1e-12 if is_cpu else rates.launch,
        kernel=rates.launch if is_cpu else KERNEL,
        sync=1e-12 if is_cpu else SYNC,
        host=rates.copy / shared,
        host_update=rates.copy / shared * ranks / 28,
        source="measured now, in the shapes of this config",
    )


def measure(shapes: Shapes) -> Rates:
    """The rates of this process, while the others of its process group measure theirs."""
    device, dtype = pick_device(shapes.device), DTYPES[shapes.dtype]
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, grad: bool = True) -> Tensor:
        made = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return made.to(dtype).requires_grad_(grad)

    chosen = kernels.choose(device)
    x, square = random(shapes.tokens, shapes.hidden), random(shapes.hidden, 2 * shapes.hidden)
    seconds = _both_ways(lambda: x @ square, device)
    dense = grouped = 6 * shapes.tokens * square.numel() / seconds
    if shapes.experts:
        rows = shapes.tokens * shapes.per_token
        slots, stack = random(rows, shapes.hidden), random(shapes.experts, shapes.hidden, shapes.width)
        ends = (torch.arange(1, shapes.experts + 1, device=device) * rows // shapes.experts).to(torch.int32)
        grouped_mm = kernels.EXPERTS[chosen.experts or "plain"]
        seconds = _both_ways(lambda: grouped_mm(slots, stack, ends), device)
        grouped = 6 * rows * shapes.hidden * shapes.width / seconds
    q, k, v = (random(shapes.tokens, shapes.heads, shapes.head) for _ in range(3))
    cuts = torch.arange(0, shapes.tokens + 1, shapes.sequence, device=device, dtype=torch.int32)
    attend = kernels.ATTENTION[chosen.attention]
    seconds = _both_ways(lambda: attend(q, k, v, cuts, shapes.sequence, shapes.head**-0.5), device)
    attention = 6 * shapes.tokens * shapes.sequence * shapes.heads * shapes.head / seconds  # causal: half of 12
    x_single, square_single = (tensor.detach().float().requires_grad_() for tensor in (x, square))
    single = 6 * x.shape[0] * square.numel() / _both_ways(lambda: x_single @ square_single, device)
    gate, up = (random(shapes.tokens * max(1, shapes.per_token), shapes.width, grad=False) for _ in range(2))
    copy = 5 * gate.nbytes / _median(lambda: F.silu(gate) * up, device)  # two kernels: two and three passes
    one = random(8)
    chain = 50
    launch = _both_ways(lambda: _chain(one, chain), device) / (2 * chain)
    reduce, latency = _sums(device)
    return Rates(dense, grouped, attention, single, copy, launch, reduce, latency)


def _chain(x: Tensor, length: int) -> Tensor:
    for _ in range(length):
        x = x * 0.5
    return x


def _sums(device: torch.device) -> tuple[float, float]:
    """Bytes/s that a rank sends in sums over the ranks, and the seconds of a tiny one."""
    ranks = process_group.Ranks().size
    if ranks == 1:
        return 1e12, 1e-6  # nothing is sent
    small, large = (torch.ones(size, device=device) for size in (SMALL, LARGE))
    latency = _median(lambda: process_group.all_reduce_sum(small), device)
    seconds = _median(lambda: process_group.all_reduce_sum(large), device) - latency
    return 2 * (ranks - 1) / ranks * large.nbytes / max(seconds, 1e-9), latency


def _both_ways(forward: Callable[[], Tensor], device: torch.device) -> float:
    """The seconds of forward and backward."""
    grad = torch.ones_like(forward())
    return _median(lambda: forward().backward(grad), device)


def _median(action: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(TIMES + 1):
        _wait(device)
        started = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one warms up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(folder: Path) -> None:
    """Measure as a rank that `measured` started."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shapes = Shapes(**json.loads((folder / "shapes.json").read_text(encoding="utf-8")))
    topology = current_topology()
    if topology.world_size > 1:
        process_group.join(Meeting(topology), pick_device(shapes.device), TIMEOUT_SECONDS)
    rates = measure(shapes)
    if topology.is_main:
        (folder / "rates.json").write_text(json.dumps(asdict(rates)), encoding="utf-8")
    process_group.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
