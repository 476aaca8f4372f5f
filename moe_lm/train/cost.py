"""The cost of a run before it starts: what is trained, memory per device, tokens, FLOPs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.reading import dump_config
from moe_lm.config.run import ParallelConfig, RunConfig
from moe_lm.config.training import OptimizerConfig
from moe_lm.engine.deepspeed_config import deepspeed_json
from moe_lm.engine.frozen import narrow_frozen
from moe_lm.kernels.device import pick_device, pick_dtype
from moe_lm.kernels.rounding import RoundedWeights, narrow_trained
from moe_lm.model.lora import freeze
from moe_lm.model.size import count_parameters, flops_per_token, on_meta
from moe_lm.model.transformer import LanguageModel, is_expert
from moe_lm.optim.groups import moments
from moe_lm.parallel.topology import Topology
from moe_lm.train.summary import layout_parts, rates_line

FLOAT32 = 4  # bytes; master weights, gradients and moments are float32


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Cost:
    """Numbers of parameters (adapters included) and of those that are trained, and the memory of each device."""

    parameters: int
    trained: int
    memory: Memory


def describe(
    config: RunConfig,
    model: ModelConfig,
    topology: Topology,
    memory: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """The lines of `--dry-run` about size and cost. Nothing is built on a device.

    `memory` stands in place of that of weights, gradients and optimizer; `dtype` as for `cost`.
    """
    train, length = config.train, config.data.sequence_length
    parameters = count_parameters(model)
    tokens_per_step = train.global_batch_size * config.row_length
    flops = [flops_per_token(model, length, causal_half=half) for half in (True, False)]
    tokens = train.steps * tokens_per_step
    return [
        f"parameters      {parameters.total:,} in all, {parameters.active:,} active a token",
        *cost_lines(config, model, topology, memory, dtype),
        f"FLOPs per token {flops[0]:,} (causal attention halved), {flops[1]:,} (not halved)",
        f"optimizer       {rates_line(train.optimizer)}",
        f"layout          {', '.join(layout_parts(config.parallel, processes(config, topology)))}",
        f"a step          {train.global_batch_size:,} sequences, {tokens_per_step:,} tokens",
        f"the run         {train.steps:,} steps, {tokens:,} tokens ({tokens / parameters.total:.2g} a parameter), "
        f"{tokens_per_step * flops_a_token(config, model):.3g} FLOPs",
    ]


def all_settings(config: RunConfig, topology: Topology) -> Iterator[str]:
    """The resolved config, and DeepSpeed's, if that runs."""
    yield "\n" + dump_config(config).rstrip()
    if config.parallel.engine == "deepspeed":
        world_size = processes(config, topology)
        settings = deepspeed_json(config.train, config.parallel, world_size, cuda=config.parallel.device != "cpu")
        yield f"\nDeepSpeed, {world_size} processes:\n{json.dumps(settings, indent=2)}"


def flops_a_token(config: RunConfig, model: ModelConfig) -> int:
    """FLOPs of the run for a token of every step, causal attention halved."""
    phases = config.phases
    ends = [*(phase.first_step for phase in phases[1:]), config.train.steps]
    return sum(
        (end - phase.first_step) * flops_per_token(model, phase.sequence_length, causal_half=True)
        for phase, end in zip(phases, ends, strict=True)
    )


def cost_lines(
    config: RunConfig,
    model: ModelConfig,
    topology: Topology,
    memory: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """The parameters that are trained and the memory that they need; with adapters, also that of training all."""
    this_run = cost(config, model, config.lora, topology, dtype)
    memory = memory or (
        f"{_mib(this_run.memory.total)} MiB on each device of {processes(config, topology)} "
        f"({_mib(this_run.memory.weights)} weights, {_mib(this_run.memory.gradients)} gradients, "
        f"{_mib(this_run.memory.optimizer)} optimizer), before activations"
    )
    if config.lora is not None:
        memory += f"; {_mib(cost(config, model, None, topology, dtype).memory.total)} MiB if all weights were trained"
    percent = 100 * this_run.trained / this_run.parameters
    share = f"{this_run.trained:,} of {this_run.parameters:,} parameters ({percent:.3g}%)"
    return [f"trained         {share}", f"memory          {memory}"]


def cost(
    config: RunConfig,
    model: ModelConfig,
    lora: LoraConfig | None,
    topology: Topology,
    dtype: torch.dtype | None = None,
) -> Cost:
    """Cost of training the adapters of `lora`, or all weights, with products in `dtype`.

    None: in the data type of the device that is here. Raises UsageError when there is none as the config asks for.
    """
    train, parallel = config.train, config.parallel
    built = on_meta(model)
    freeze(built, lora, train.freeze_router)
    dtype = dtype or pick_dtype(train.precision, pick_device(parallel.device))
    if parallel.zero_stage != 3:
        narrow_frozen(built, dtype)
    parameters = dict(built.named_parameters())
    if parallel.engine == "deepspeed":
        narrow_trained(built, dtype)
        memory = divided_memory(parameters, parallel, processes(config, topology), train.optimizer)
    else:
        memory = whole_memory(built, train.optimizer, dtype)
    return Cost(sum(p.numel() for p in parameters.values()), _trained(parameters), memory)


def whole_memory(model: LanguageModel, optimizer: OptimizerConfig, dtype: torch.dtype = torch.float32) -> Memory:
    """Memory of a device that keeps the whole model, with gradients and moments of what is trained.

    Products in another data type than float32 are those of copies.
    """
    copies = 0 if dtype == torch.float32 else RoundedWeights(model, dtype).nbytes
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Memory(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + copies,
        gradients=FLOAT32 * _trained(trained),
        optimizer=FLOAT32 * sum(moments(name, p, optimizer) for name, p in trained.items()),
    )


def divided_memory(
    parameters: Mapping[str, nn.Parameter], parallel: ParallelConfig, world_size: int, optimizer: OptimizerConfig
) -> Memory:
    """Memory of each rank under DeepSpeed.

    Experts are divided over `expert_parallel_size` ranks. ZeRO divides over the ranks that keep the same ones, which
    for everything else are all: float32 master weights and moments of what is trained from stage 1 on, gradients from
    stage 2, the weights themselves in stage 3.
    """
    stage, ep = parallel.zero_stage or 1, parallel.expert_parallel_size
    weights = gradients = state = 0
    for routed, division, copies in ((False, 1, world_size), (True, ep, world_size // ep)):
        held = {name: parameter for name, parameter in parameters.items() if is_expert(name) is routed}
        trained = _trained(held) // division
        weights += sum(p.nbytes for p in held.values()) // division // (copies if stage == 3 else 1)
        gradients += FLOAT32 * trained // (copies if stage >= 2 else 1)
        numbers = sum(p.numel() + moments(name, p, optimizer) for name, p in held.items() if p.requires_grad)
        state += FLOAT32 * numbers // division // copies
    return Memory(weights, gradients, 0 if parallel.offload_optimizer else state)


def processes(config: RunConfig, topology: Topology) -> int:
    """The number of processes that were started, or else the smallest that the config allows."""
    return max(topology.world_size, config.parallel.least_processes)


def _trained(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.2f}"
