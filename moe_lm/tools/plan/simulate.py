"""One rank of any number, simulated: the real model, objective and exchanges, on tensors that hold no numbers.

What runs is what a device would be given, with the kernels of that device; the layers that are alike are run twice and
counted as often as there are. Nothing is allocated, nothing is computed, and no other rank is needed.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import OptimizerConfig, TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.engine.build import RankModel, build_loss, build_model, check_batch_size
from moe_lm.kernels import grouped_mm, kernels
from moe_lm.kernels.device import DTYPES
from moe_lm.kernels.rounding import RoundedWeights, narrow_trained
from moe_lm.model.layers import CHUNK_BYTES, CHUNK_ROWS
from moe_lm.model.moe import logical_names
from moe_lm.model.transformer import LanguageModel, is_expert
from moe_lm.objective.training_loss import NextToken, Objective, StepCounts, TrainingLoss
from moe_lm.optim.groups import is_hidden_matrix, moments
from moe_lm.parallel.expert_parallel import AllToAllDispatcher
from moe_lm.parallel.simulated import simulated_ranks
from moe_lm.parallel.topology import Topology
from moe_lm.tools.plan import findings, zero
from moe_lm.tools.plan.fusion import fuse
from moe_lm.tools.plan.layers import Layers, reduced
from moe_lm.tools.plan.matrices import Matrices
from moe_lm.tools.plan.memory import activations
from moe_lm.tools.plan.places import Place, Places
from moe_lm.tools.plan.recording import Kernel, Recorder, Recording
from moe_lm.tools.plan.trace import Collective, Finding, HostSync, Memory, Part, Pass, Product, Trace, Work

GIB = 2**30
WHOLE = 1 << 40  # rows of a piece, for a device that takes all at once
CONTEXT = GIB // 2  # of CUDA and its libraries: an allowance
NCCL = 2 * GIB  # channels of three communicators: an allowance
ROUTING = "moe_lm/parallel/expert_parallel.py"  # reads the counts of an exchange on the host


@dataclass(frozen=True)
class Recorded:
    """One micro-batch of a rank, before anything is said of the engine's buffers, which are arithmetic."""

    layers: Layers
    recording: Recording
    findings: tuple[Finding, ...]
    groups: list[zero.Group]
    weights: int  # bytes of parameters, buffers and rounded copies
    fused: Recording  # the same with its compiled graphs as inductor would make them


def simulate(
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    row_length: int,
    world_size: int = 1,
    rank: int = 0,
    device: str = "cuda",
    imbalance: float = 1.0,
    objective: Objective | None = None,
    known: dict[str, Recorded] | None = None,
) -> Trace:
    """The step of `rank` among `world_size`, with the kernels of `device`, `cuda` or `cpu`.

    `imbalance`: tokens that come to this rank's experts, over those that would if all experts had the same load.
    `known` keeps what was recorded, for other calls that differ in `train` and `parallel` alone: stages of ZeRO and
    offload share it, and so do a compiled step and one that is not. Raises UsageError when the layout does not divide,
    and in a process that belongs to a run.
    """
    ranks = parallel.sequence_parallel_size
    topology = Topology(rank, world_size, sequence_parallel_size=ranks)
    check_batch_size(train, topology)
    rows = train.rows_at_once(topology.row_groups)
    micro_batches = train.global_batch_size // topology.row_groups // rows
    is_alike = {"zero_stage": 1, "offload_optimizer": False} if parallel.engine == "deepspeed" else {}
    alike = parallel.model_copy(update=is_alike)
    compiled = train.model_copy(update={"compile": True, "micro_batch_size": rows})
    key = f"{compiled.model_copy(update={'global_batch_size': 0})!r} {alike!r} {world_size} {micro_batches > 1}"
    known = {} if known is None else known
    if key not in known:
        known[key] = _record(model, compiled, alike, row_length, topology, device, imbalance, objective)
    recorded = known[key]
    layers, groups = recorded.layers, recorded.groups
    recording = recorded.fused if train.compile else recorded.recording
    work = _work(recording, layers)
    stage = (parallel.zero_stage or 1) if parallel.engine == "deepspeed" else 0
    overlaps = device == "cuda"
    backward = reduce(Work.__add__, (w for (during, _), w in work.items() if during == "backward"), Work())
    return Trace(
        world_size=world_size,
        rank=rank,
        device=device,
        tokens=rows * row_length // ranks,
        micro_batches=micro_batches,
        work={**work, ("update", "update"): zero.update(stage, groups)},
        collectives=(
            *_collectives(recording, layers, micro_batches),
            *zero.exchanges(stage, groups, micro_batches, backward, overlaps),
        ),
        syncs=tuple(_syncs(recording, layers)),
        findings=recorded.findings,
        memory=_memory(recorded, recording, stage, micro_batches, world_size, parallel.offload_optimizer, overlaps),
    )


def _record(
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    row_length: int,
    topology: Topology,
    device: str,
    imbalance: float,
    objective: Objective | None,
) -> Recorded:
    layers = reduced(model)
    rows = train.rows_at_once(topology.row_groups)
    tokens = rows * row_length // topology.sequence_parallel_size
    accumulates = train.global_batch_size // topology.row_groups > rows
    dtype = DTYPES["float32" if train.precision == "float32" else "bfloat16"]
    recorders: list[Recorder] = []
    compiled: set[int] = set()  # modules, and the code of functions

    def mark(function: Any) -> Any:
        """Let it run as it is: what a compiler would make of it is modelled (fusion.py)."""
        compiled.add(id(function.__self__) if inspect.ismethod(function) else id(function.__code__))
        return function

    with (
        _pieces_of(device),
        simulated_ranks(topology.world_size, topology.rank, lambda work: recorders[-1].waited(work)),
    ):
        built = build_model(layers.config, parallel, topology, simulated=torch.device(device))
        if device == "cuda" and dtype == torch.float32:
            # Its own kernels loop over segments and experts, which takes numbers; a CPU's have the same products.
            kernels.apply(built.model, kernels.Kernels(attention="segments", experts="bucketed"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            built.model.materialise(torch.device("cpu"))
            loss = build_loss(built, objective or NextToken(), train, pad_id=-1, dtype=dtype, compiler=mark)
            copies = _rounded(built.model, parallel, dtype)
            groups = _groups(built, layers, parallel, train.optimizer, dtype.itemsize)
            batch = _batch(rows, row_length).part(0, topology.sequence_parallel_size)
            counts = Counts(tokens, layers.config, parallel.expert_parallel_size, imbalance)
            recorder = Recorder(Places(loss, frozenset(compiled)), counts.received, counts)
            recorders.append(recorder)
            recorder.hold([tensor for _, tensor in copies])
            _run(loss, batch, recorder, topology.world_size, accumulates)
    recording = recorder.recording
    found = findings.check(recording, tokens, layers.config, dtype)
    fused = Recording(
        [replace(kernel) for kernel in recording.kernels],
        recording.exchanges,
        [replace(life) for life in recording.lives],
        recording.reads,
    )
    fuse(fused)
    for one in (recording, fused):
        _of_all_moe_layers(one, layers)
    named = [*built.model.named_parameters(), *built.model.named_buffers(), *copies]
    weights = sum(tensor.nbytes * layers.of(_layer(name)) for name, tensor in named)
    return Recorded(layers, recording, tuple(found), groups, weights, fused)


def _rounded(model: LanguageModel, parallel: ParallelConfig, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Have products read the weights that an engine gives them; returns copies that it keeps beside its own."""
    if dtype == torch.float32:
        return []
    if parallel.engine == "deepspeed":
        narrow_trained(model, dtype)
        return []
    RoundedWeights(model, dtype)
    named = model.named_modules()
    return [(name, copy) for name, module in named for copy in module.__dict__.get("rounded", {}).values()]


def _groups(
    built: RankModel, layers: Layers, parallel: ParallelConfig, optimizer: OptimizerConfig, element_size: int
) -> list[zero.Group]:
    """The trained parameters, by the ranks that hold the same ones."""
    world = range(built.topology.world_size)
    same = (
        world
        if built.mesh is None
        else world[built.topology.rank % parallel.expert_parallel_size :: parallel.expert_parallel_size]
    )
    found = []
    for routed, ranks in ((False, world), (True, same)):
        trained = {
            name: p for name, p in built.model.named_parameters() if p.requires_grad and is_expert(name) is routed
        }
        count = sum(p.numel() * layers.of(_layer(name)) for name, p in trained.items())
        weights = sum(p.nbytes * layers.of(_layer(name)) for name, p in trained.items())
        state = sum(moments(name, p, optimizer) * layers.of(_layer(name)) for name, p in trained.items())
        matrices = tuple(_matrices(trained, layers, optimizer, element_size))
        found.append(zero.Group(count, weights, tuple(ranks), state, matrices))
    return [group for group in found if group.parameters]


def _matrices(
    trained: Mapping[str, Tensor], layers: Layers, optimizer: OptimizerConfig, element_size: int
) -> Iterator[Matrices]:
    """What the optimizer takes apart into matrices, together what is stepped together."""
    if optimizer.name == "adamw":
        return
    shapes: dict[int, list[tuple[int, ...]]] = {}
    for name, parameter in trained.items():
        if is_hidden_matrix(name, parameter) if optimizer.name == "muon" else parameter.ndim >= 2:
            copies = [tuple(parameter.shape)] * layers.of(_layer(name))
            shapes.setdefault(len(logical_names(name)), []).extend(copies)
    for side_by_side, some in shapes.items():
        yield Matrices(optimizer.name, tuple(some), side_by_side, element_size)


def _layer(name: str) -> int | None:
    """The layer of a parameter, by its name."""
    found = re.search(r"layers\.(\d+)\b", name)
    return int(found[1]) if found else None


def _of_all_moe_layers(recording: Recording, layers: Layers) -> None:
    """The balance terms take the routing of all layers at once: more layers are more bytes in as many kernels."""
    if not layers.moe_layers:
        return
    for kernel in recording.kernels:
        if kernel.place.part == "balance":
            kernel.bytes = kernel.bytes * layers.moe_layers // layers.traced_moe_layers
    for life in recording.lives:
        if life.place.part == "balance":
            life.bytes = life.bytes * layers.moe_layers // layers.traced_moe_layers


def _work(recording: Recording, layers: Layers) -> dict[tuple[Pass, Part], Work]:
    """The kernels of the whole model, by pass and part."""
    work: dict[tuple[Pass, Part], Work] = {}
    for kernel in recording.kernels:
        key = kernel.place.during, kernel.place.part
        work[key] = work.get(key, Work()) + _cost(kernel).times(layers.of(kernel.place.layer))
    return {key: _summed(found) for key, found in work.items()}


def _cost(kernel: Kernel) -> Work:
    return Work((kernel.product,) if kernel.product else (), kernel.bytes, kernel.launches)


def _summed(work: Work) -> Work:
    """The same with products of one shape counted together."""
    counts: Counter[Product] = Counter()
    for product in work.products:
        counts[replace(product, count=1)] += product.count
    return Work(tuple(replace(product, count=n) for product, n in counts.items()), work.bytes, work.launches)


def _collectives(recording: Recording, layers: Layers, micro_batches: int) -> list[Collective]:
    found: Counter[Collective] = Counter()
    for exchange in recording.exchanges:
        place, until = exchange.place, exchange.wait or len(recording.kernels)
        hidden = reduce(Work.__add__, map(_cost, recording.kernels[exchange.start : until]), Work())
        one = Collective(exchange.kind, exchange.bytes, exchange.ranks, place.part, place.during, 0, _summed(hidden))
        found[one] += layers.of(place.layer) * micro_batches
    return [replace(one, times=times) for one, times in found.items()]


def _syncs(recording: Recording, layers: Layers) -> list[HostSync]:
    found: Counter[HostSync] = Counter()
    for read in recording.reads:
        place = read.place
        found[HostSync(place.part, place.during, read.operator, place.where, 0, read.expected)] += layers.of(
            place.layer
        )
    return [replace(one, times=times) for one, times in found.items()]


def _memory(
    recorded: Recorded,
    recording: Recording,
    stage: int,
    micro_batches: int,
    world_size: int,
    offload: bool,
    overlaps: bool,
) -> Memory:
    weights, groups = recorded.weights, recorded.groups
    if stage:
        state = zero.divided(stage, groups, micro_batches, overlaps, offload)
        if state.weights is not None:
            weights = state.weights
    else:
        state = zero.whole(groups, micro_batches, world_size)
    made = activations(recording, recorded.layers, state.gradients_grow)
    communication = (CONTEXT + NCCL * (world_size > 1)) if overlaps else 0
    resident = weights + state.gradients + state.optimizer + communication
    peak, where = max(
        (resident + made.forward[0], made.forward[1]),
        (resident + state.buffers + made.backward[0], made.backward[1]),
        (resident - state.gradients + state.update + zero.orthogonalising(groups), "update"),
    )
    return Memory(
        weights=weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        zero=state.buffers,
        communication=communication,
        activations=sum(made.saved.values()),
        peak=peak,
        peak_during=where,
        saved=made.saved,
    )


class Counts:
    """Answers the host's read of the counts that ranks exchange: rows to each rank, choices to each, then from each.

    Every token chooses among all experts alike, and so is sent to the ranks of those that it chooses.
    """

    def __init__(self, tokens: int, model: ModelConfig, ranks: int, imbalance: float) -> None:
        experts, chosen = model.n_routed_experts, min(model.num_experts_per_tok, model.n_routed_experts)
        local = experts // ranks
        choices = tokens * chosen / ranks
        spared = math.prod((experts - local - i) / (experts - i) for i in range(chosen))  # no choice is on a given rank
        sent = round(tokens * (1 - spared)), round(choices)
        arriving = round(choices * imbalance)
        rows = min(round(tokens * (1 - spared) * imbalance), tokens, arriving)
        received = rows, min(arriving, rows * min(chosen, local))
        source, first = inspect.getsourcelines(AllToAllDispatcher.splits)  # the one place that may read them
        self._lines = range(first, first + len(source))
        self._counts = [count for count in (*sent, *received) for _ in range(ranks)]
        self.received = received[1] * ranks

    def __call__(self, place: Place, index: int) -> int | None:
        file, _, line = place.where.rpartition(":")
        is_asked = file == ROUTING and int(line) in self._lines and index < len(self._counts)
        return self._counts[index] if is_asked else None


def _run(loss: TrainingLoss, batch: Batch, recorder: Recorder, world_size: int, accumulating: bool) -> None:
    """One micro-batch; when `accumulating`, it is not the first one of its step."""
    parameters = [p for p in loss.parameters() if p.requires_grad]
    if accumulating:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    recorder.hold([*loss.parameters(), *loss.buffers(), *(p.grad for p in parameters if p.grad is not None)])
    recorder.hold([value for value in vars(batch).values() if isinstance(value, Tensor)])
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.gradient(p.grad))
    tokens = batch.input_ids.numel() * world_size
    counts = StepCounts(units=tokens, targets=tokens, tokens=tokens, rows=len(batch.input_ids) * world_size)
    with recorder:
        part = loss(batch, counts)
        (part.loss * world_size).backward()


def _batch(rows: int, length: int) -> Batch:
    """A batch whose rows are one document each."""
    ids = torch.zeros(rows, length, dtype=torch.int32)
    bounds = torch.zeros(rows + 1, dtype=torch.int32)
    return Batch(ids, torch.zeros_like(ids), bounds, max_seqlen=length)


@contextmanager
def _pieces_of(device: str) -> Iterator[None]:
    """Have the loss and the experts' activation take pieces of the size for `device`, though its tensors say `cpu`."""
    if device == "cpu":
        yield
        return
    with (
        patch.dict(CHUNK_BYTES, clear=True),
        patch.dict(CHUNK_ROWS, clear=True),
        patch.object(grouped_mm, "BLOCK", WHOLE),
    ):
        yield
