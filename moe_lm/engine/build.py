"""From a config to an engine: which processes share what, the model with what this rank keeps, the engine around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.run import ParallelConfig, check_experts
from moe_lm.config.training import PreferenceConfig, TrainConfig
from moe_lm.engine.engine import Engine
from moe_lm.kernels import kernels
from moe_lm.kernels.device import pick_device
from moe_lm.model import lora
from moe_lm.model.lora import is_factor
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel import expert_parallel
from moe_lm.parallel.logical import divided_experts, is_expert
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join
from moe_lm.parallel.topology import Topology, current_topology


@dataclass(frozen=True)
class PlacedModel:
    """A model with the experts that this rank keeps, not yet filled. `mesh` is there for the DeepSpeed engine."""

    model: LanguageModel
    kernels: kernels.Kernels
    mesh: DeviceMesh | None = None
    first_expert: int = 0

    def initialise(self, seed: int) -> None:
        """The weights of step 0, the same in every layout."""
        self.model.initialise(seed, self.first_expert)

    def initialise_adapters(self, seed: int) -> None:
        """The adapters of step 0, the same in every layout."""
        lora.initialise_adapters(self.model, seed, self.first_expert)

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers, without adapters, under their names in a checkpoint, to be filled in place."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items() if not is_factor(name)}
        if self.mesh is None:
            return named
        mesh = self.mesh
        return {name: divided_experts(tensor, mesh) if is_expert(name) else tensor for name, tensor in named.items()}


def place_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    adapters: LoraConfig | None = None,
    freeze_router: bool | None = None,
) -> PlacedModel:
    """Build the model with only the experts that this rank keeps; decide which weights are trained, choose kernels.

    Raises UsageError when the experts or the processes cannot be divided as the config says.
    """
    if parallel.engine == "torch":
        model = LanguageModel(config)
        lora.freeze(model, adapters, freeze_router)
        chosen = kernels.choose(pick_device(parallel.device))
        kernels.apply(model, chosen)
        return PlacedModel(model, chosen)
    topology = current_topology()
    check_experts(config, parallel)
    expert_parallel.check_groups(parallel.expert_parallel_size, topology)
    device = rank_device(parallel, topology)
    join(Meeting(topology), device, parallel.timeout_seconds)
    with torch.device("meta"):
        model = LanguageModel(config)
    lora.freeze(model, adapters, freeze_router)
    # On the host, where checkpoints are written from; its groups serve tensors of the device just as well.
    ranks = torch.arange(topology.world_size).view(-1, parallel.expert_parallel_size)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=(expert_parallel.DATA, expert_parallel.EXPERT))
    first = expert_parallel.apply(model, mesh)
    model.materialise(torch.device("cpu"))
    chosen = kernels.choose(device)
    kernels.apply(model, chosen)
    return PlacedModel(model, chosen, mesh, first)


def build_engine(
    placed: PlacedModel,
    train: TrainConfig,
    parallel: ParallelConfig,
    pad_id: int,
    preference: PreferenceConfig | None = None,
) -> Engine:
    """The engine that `parallel.engine` names, around a filled model; with `preference` it tunes on pairs."""
    if placed.mesh is None:
        from moe_lm.engine.torch_engine import TorchEngine

        return TorchEngine(placed.model, train, parallel, pad_id, preference)
    from moe_lm.engine.deepspeed_engine import DeepSpeedEngine

    device = rank_device(parallel, current_topology())
    return DeepSpeedEngine(placed.model, placed.mesh, train, parallel, device, pad_id, preference)


def rank_device(parallel: ParallelConfig, topology: Topology) -> torch.device:
    """This rank's own device. Raises UsageError when there is none for it, or none that ranks can share."""
    device = pick_device(parallel.device)
    if device.type == "mps":
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
