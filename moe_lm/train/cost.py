"""What a run trains and what memory that takes, said before it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.reading import dump_config
from moe_lm.config.run import RunConfig
from moe_lm.engine.deepspeed_config import deepspeed_json
from moe_lm.kernels.device import pick_device, pick_dtype
from moe_lm.model.count import Divided, StateBytes, count_parameters, flops_per_token, rank_bytes, state_bytes
from moe_lm.model.lora import freeze, narrow_frozen
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.logical import is_expert
from moe_lm.parallel.topology import current_topology


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, adapters included, those of them that are trained, and bytes on each device."""

    parameters: int
    trained: int
    memory: StateBytes


def cost(config: RunConfig, model: ModelConfig, lora: LoraConfig | None) -> Cost:
    """Of training `model` as `config` says, with adapters or all its weights. Raises UsageError as `freeze` does."""
    train, parallel = config.train, config.parallel
    with torch.device("meta"):
        built = LanguageModel(model)
    freeze(built, lora, train.freeze_router)
    if parallel.zero_stage != 3:
        narrow_frozen(built, pick_dtype(train.precision, pick_device(parallel.device)))
    parameters = dict(built.named_parameters())
    weights = _divided(parameters, lambda p: p.numel() * p.element_size())
    trained = _divided(parameters, lambda p: p.numel() * p.requires_grad)
    if parallel.engine == "deepspeed":
        layout = (processes(config), parallel.expert_parallel_size, parallel.zero_stage or 1)
        memory = rank_bytes(weights, trained, *layout, parallel.offload_optimizer)
    else:
        memory = state_bytes(model, train.optimizer.name, sum(weights), sum(trained))
    return Cost(sum(p.numel() for p in parameters.values()), sum(trained), memory)


def cost_lines(config: RunConfig, model: ModelConfig) -> list[str]:
    """What is trained and what memory it takes; with adapters beside what training all weights would take."""
    it = cost(config, model, config.lora)
    memory = (
        f"{_mib(it.memory.total)} MiB on each device of {processes(config)} ({_mib(it.memory.weights)} weights, "
        f"{_mib(it.memory.gradients)} gradients, {_mib(it.memory.optimizer)} optimizer), before activations"
    )
    if config.lora is not None:
        memory += f"; {_mib(cost(config, model, None).memory.total)} MiB if all weights were trained"
    share = f"{it.trained:,} of {it.parameters:,} parameters ({100 * it.trained / it.parameters:.3g}%)"
    return [f"trained         {share}", f"memory          {memory}"]


def describe(config: RunConfig, model: ModelConfig) -> str:
    """What `--dry-run` prints: the resolved config, then what it costs. Nothing is built on a device."""
    train, parallel, length = config.train, config.parallel, config.data.sequence_length
    parameters = count_parameters(model)
    tokens_per_step = train.global_batch_size * config.row_length
    flops = [flops_per_token(model, length, causal_half=half) for half in (True, False)]
    lines = [
        f"parameters      {parameters.total:,} in all, {parameters.active:,} active a token",
        *cost_lines(config, model),
        f"FLOPs a token   {flops[0]:,} (causal attention halved), {flops[1]:,} (not halved)",
        f"a step          {train.global_batch_size:,} sequences, {tokens_per_step:,} tokens",
        f"the run         {train.steps:,} steps, {train.steps * tokens_per_step:,} tokens, "
        f"{train.steps * tokens_per_step * flops[0]:.3g} FLOPs",
    ]
    if parallel.engine == "deepspeed":
        settings = deepspeed_json(train, parallel, processes(config), cuda=parallel.device != "cpu")
        lines += ["", f"DeepSpeed, {processes(config)} processes:", json.dumps(settings, indent=2)]
    return dump_config(config) + "\n" + "\n".join(lines)


def processes(config: RunConfig) -> int:
    """Those that were started or, when none were, the fewest that the config allows."""
    return max(current_topology().world_size, config.parallel.expert_parallel_size)


def _divided(parameters: dict[str, nn.Parameter], size: Callable[[nn.Parameter], int]) -> Divided:
    total = sum(map(size, parameters.values()))
    routed = sum(size(parameter) for name, parameter in parameters.items() if is_expert(name))
    return Divided(routed, total - routed)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.2f}"
