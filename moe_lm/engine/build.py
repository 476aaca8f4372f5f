"""From a config to an engine: the model with the experts of this rank, and the engine around it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.run import ParallelConfig, check_experts, check_heads
from moe_lm.config.training import TrainConfig
from moe_lm.engine import recomputation
from moe_lm.engine.engine import Engine
from moe_lm.kernels import kernels
from moe_lm.kernels.available import Inputs
from moe_lm.kernels.device import compiling_needs, pick_device, pick_dtype
from moe_lm.model import lora
from moe_lm.model.lora import is_factor
from moe_lm.model.transformer import LanguageModel, initialise_tensor, is_expert
from moe_lm.objective.training_loss import Objective, TrainingLoss
from moe_lm.parallel import expert_parallel
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.logical import Piece, piece_of
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join
from moe_lm.parallel.sequence_parallel import SequenceGroup
from moe_lm.parallel.topology import Topology

# Of a simulated device, unless the config names another: what a run finds installed is not known. `torch_varlen` pads
# the uneven heads of latent attention, which FlashAttention 3 and 4 take as they are.
SIMULATED_ATTENTION = ("torch_varlen", "segments")
# Run in their place there, with the same products: one needs its package, the other reads lengths on the host.
STAND_INS = {"flash_attn_2": "torch_varlen", "plain": "segments"}

# Fills, in place, rows of the parameter or buffer of this name, from its row of this number on; a stack's are its
# experts. Every rank may be given other rows, and no rank waits for another one.
Fill = Callable[[str, Tensor, int], None]
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class RankModel:
    """A model with the experts of this rank, not yet filled, and what the engine around it needs."""

    model: LanguageModel
    topology: Topology
    device: torch.device
    exchange: Exchange | None = None  # None in a single process
    adapters: LoraConfig | None = None
    mesh: DeviceMesh | None = None  # for the DeepSpeed engine
    first_expert: int = 0
    sequence: SequenceGroup | None = None  # where ranks share rows
    divided: bool = False  # ZeRO 3: only the engine makes the parameters, one at a time, and this rank's share of each
    fills: list[Fill] = field(default_factory=list)  # what it then fills them with, one after the other

    def fill(self, fill: Fill) -> None:
        """Fill parameters and buffers: at once, or those that are `divided` when the engine makes them."""
        named = [] if self.divided else list(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in [*named, *self.model.named_buffers()]:
                fill(name, tensor, self.first_row(name))
        self.fills.append(fill)

    def fill_share(self, name: str, rows: Tensor, first: int) -> None:
        """Fill rows of a parameter of this rank, from its row `first` on, as `fill` was told to."""
        for fill in self.fills:
            fill(name, rows, self.first_row(name) + first)

    def first_row(self, name: str) -> int:
        """The number, in the logical tensor, of the first row that this rank has."""
        return self.first_expert if is_expert(name) else 0

    def initialise(self, seed: int) -> None:
        """The weights of step 0, the same in every layout."""

        def draw(name: str, rows: Tensor, first: int) -> None:
            if not is_factor(name):
                initialise_tensor(name, rows, self.model.config, seed, first)

        self.fill(draw)

    def initialise_adapters(self, seed: int) -> None:
        """The adapters of step 0, the same in every layout."""

        def draw(name: str, rows: Tensor, first: int) -> None:
            if is_factor(name):
                lora.initialise_factor(name, rows, seed, first)

        self.fill(draw)

    def tensors(self) -> Mapping[str, Tensor | Piece]:
        """Parameters and buffers under their names in a checkpoint, without adapters, to be filled in place."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items() if not is_factor(name)}
        if self.mesh is None:
            return named
        return {name: self._experts(tensor) if is_expert(name) else tensor for name, tensor in named.items()}

    def _experts(self, stack: Tensor) -> Piece:
        """This rank's experts as a piece of the whole stack."""
        whole = (self.model.config.n_routed_experts, *stack.shape[1:])
        return piece_of(stack)._replace(start=self.first_expert * math.prod(whole[1:]), shape=whole)


def build_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    topology: Topology,
    adapters: LoraConfig | None = None,
    freeze_router: bool | None = None,
    simulated: torch.device | None = None,
    precision: str | None = None,
) -> RankModel:
    """Build the model with only the experts that this rank keeps; decide which weights are trained, choose kernels.

    For a `simulated` device, which need not be there, the model stays on the meta device, with that one's kernels.
    With the `precision` of a run, its kernels are those that take it; without, a kernel leaves what it does not take to
    plain torch. Raises UsageError when the experts or the processes cannot be divided as the config says, or its
    attention kernel does not serve.
    """
    device = rank_device(parallel, topology) if simulated is None else torch.device("cpu")
    if simulated is None:
        inputs = None
        if precision is not None:
            inputs = Inputs(pick_dtype(precision, device), (config.head_size, config.value_size))
        chosen = kernels.choose(device, attention=parallel.attention_kernel, inputs=inputs)
    else:
        named = kernels.choose(simulated, attention=parallel.attention_kernel, simulated=SIMULATED_ATTENTION)
        chosen = named._replace(attention=STAND_INS.get(named.attention, named.attention))
    exchange = Exchange(device) if topology.world_size > 1 else None
    check_heads(config, parallel)
    topology.check_groups("parallel.sequence_parallel_size", parallel.sequence_parallel_size)
    topology = replace(topology, sequence_parallel_size=parallel.sequence_parallel_size)
    if parallel.engine == "torch":
        with torch.device("meta"):
            model = LanguageModel(config)
        lora.freeze(model, adapters, freeze_router)
        if simulated is None:
            model.materialise(device)
        kernels.apply(model, chosen)
        return RankModel(model, topology, device, exchange, adapters, sequence=_sequence_group(topology, exchange))
    check_experts(config, parallel)
    topology.check_groups("parallel.expert_parallel_size", parallel.expert_parallel_size)
    join(Meeting(topology), device, parallel.timeout_seconds)
    with torch.device("meta"):
        model = LanguageModel(config)
    lora.freeze(model, adapters, freeze_router)
    # A mesh of the host, where checkpoints are written; its groups serve tensors of the device just as well.
    ranks = torch.arange(topology.world_size).view(-1, parallel.expert_parallel_size)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=(expert_parallel.DATA, expert_parallel.EXPERT))
    first = expert_parallel.apply(model, mesh, exchange)
    divided = parallel.zero_stage == 3
    if simulated is None and divided:
        model.materialise_buffers(device)
    elif simulated is None:
        model.materialise(device)
    kernels.apply(model, chosen)
    sequence = _sequence_group(topology, exchange)
    return RankModel(model, topology, device, exchange, adapters, mesh, first, sequence, divided)


def _sequence_group(topology: Topology, exchange: Exchange | None) -> SequenceGroup | None:
    """The ranks that share this rank's rows, which are its neighbours; every rank calls this at the same point."""
    size = topology.sequence_parallel_size
    if size == 1:
        return None
    assert exchange is not None
    groups = torch.arange(topology.world_size).view(-1, size)
    mesh = DeviceMesh("cpu", groups, mesh_dim_names=("rows", "positions"))
    return SequenceGroup(mesh.get_group("positions"), exchange)


def build_engine(
    built: RankModel, objective: Objective, train: TrainConfig, parallel: ParallelConfig, pad_id: int
) -> Engine:
    """Build the engine that `parallel.engine` names around a filled model, to minimise the objective.

    Raises UsageError when the processes cannot share the global batch evenly, or the device cannot do what is asked.
    """
    model, topology, device, exchange = built.model, built.topology, built.device, built.exchange
    check_batch_size(train, topology)
    torch.manual_seed(train.seed)  # the run does not depend on what this process drew before
    if train.compile and (needed := compiling_needs(device)):
        raise UsageError(f"train.compile=true needs {needed}; install it, or set train.compile=false")
    loss = build_loss(built, objective, train, pad_id, pick_dtype(train.precision, device))
    before_step = None
    if built.adapters is not None and built.adapters.dropout:
        before_step = partial(lora.draw_dropout, model, train.seed)
    if built.mesh is None:
        from moe_lm.engine.torch_engine import TorchEngine

        return TorchEngine(loss, train, topology, device, exchange, before_step)
    from moe_lm.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(loss, train, parallel, topology, device, built.mesh, exchange, before_step, built.fill_share)


def build_loss(
    built: RankModel,
    objective: Objective,
    train: TrainConfig,
    pad_id: int,
    dtype: torch.dtype,
    compiler: Compiler | None = None,
) -> TrainingLoss:
    """The model with its loss, run as the config says, with products in `dtype`: what an engine is put around.

    Where the config asks for compilation, `compiler` makes of a function what is called in its place; `torch.compile`
    by default.
    """
    if train.residual_dtype == "bfloat16" and dtype == torch.bfloat16:
        built.model.model.residual_dtype = dtype
    loss = TrainingLoss(built.model, objective, train.balance, pad_id, dtype)
    if built.sequence is not None:
        loss.attention, loss.over_row = built.sequence.attention, built.sequence.sum
    if train.compile:
        compile_parts(loss, compiler or torch.compile)
    recomputation.apply(built.model, train.activation_checkpointing)
    return loss


def check_batch_size(train: TrainConfig, topology: Topology) -> None:
    """Raise UsageError when the processes cannot share the global batch evenly."""
    if train.global_batch_size % topology.row_groups:
        groups = "processes" if topology.sequence_parallel_size == 1 else "sequence-parallel groups"
        raise UsageError(
            f"train.global_batch_size={train.global_batch_size} is not divisible by the {topology.row_groups} {groups} "
            f"of this run; choose a multiple of {topology.row_groups}",
            common=True,
        )


def compile_parts(loss: TrainingLoss, compiler: Compiler) -> None:
    """Compile block by block, and the loss: layers of one kind share a compiled graph, and names stay as they are."""
    # Else DDP's buckets of 25 MB cut every block into pieces, so that gradients come early. A block is early enough.
    torch._dynamo.config.optimize_ddp = False
    # With a policy for recomputation it warns that operations in place would go wrong; a block has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    model = loss.model.model
    for part in (*model.layers, model.norm):
        setattr(part, "forward", compiler(part.forward))  # noqa: B010
    loss.chunk_loss, loss.routing_figures = compiler(loss.chunk_loss), compiler(loss.routing_figures)


def rank_device(parallel: ParallelConfig, topology: Topology) -> torch.device:
    """This rank's own device. Raises UsageError if there is none for it, or none that ranks can share."""
    device = pick_device(parallel.device)
    if device.type == "mps" and (topology.world_size > 1 or parallel.engine == "deepspeed"):
        raise UsageError(
            "neither several processes nor parallel.engine=deepspeed run on mps; set parallel.device=cpu, or start one "
            "process with parallel.engine=torch"
        )
    if device.type == "cuda":
        if topology.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"rank {topology.rank} is number {topology.local_rank} on its host, which has "
                f"{torch.cuda.device_count()} CUDA devices; start at most one process a device"
            )
        device = torch.device("cuda", topology.local_rank)
        torch.cuda.set_device(device)
    return device
