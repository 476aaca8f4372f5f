"""The figures of a step, a line of `metrics.jsonl`: loss, speed, utilisation, and how even the experts' load is."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from moe_lm.engine.engine import Engine, StepResult

# FLOP/s of dense bfloat16 (and float16) products without sparsity, from the vendors' data sheets. The first key that is
# part of the device's name counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "MI300X": 1307e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def step_record(
    step: int,
    result: StepResult,
    seconds: float,
    data_seconds: float,
    reading_seconds: float,
    engine: Engine,
    flops_per_token: float,
    with_load: bool = False,
) -> dict[str, object]:
    """The figures of a step that took this many seconds, `data_seconds` of which this rank waited for its batch.

    `reading_seconds`: those in which the batch was read, mostly while the step before ran.

    `with_load` adds the load of each expert, which makes a record several times as long.
    """
    tokens_per_second = result.tokens / seconds
    record: dict[str, object] = {
        "step": step,
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "lr": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "targets": result.targets,
        "tokens_per_second": tokens_per_second,
        "seconds": seconds,
        "data_seconds": data_seconds,
        "reading_seconds": reading_seconds,
        **memory(engine.device),
        "skipped": result.skipped,
        **result.figures,
    }
    peak = peak_flops(engine.device, engine.dtype)
    if peak is not None:
        peak *= engine.topology.world_size
        record["mfu"] = model_flops_utilisation(tokens_per_second, flops_per_token, peak)
    if result.load.numel():
        layers = load_statistics(result.load)
        for layer, entropy, bias_range in zip(layers, result.entropy.tolist(), result.bias_range, strict=True):
            layer |= {"router_entropy": entropy, "bias_range": bias_range}
        for layer, shares in zip(layers, expert_shares(result.load) if with_load else (), strict=False):
            layer["load"] = shares
        record["experts"] = layers
    return record


def load_statistics(load: Tensor) -> list[dict[str, Any]]:
    """Measures of balance for each MoE layer, from `load [layers, experts]`, the tokens of each expert.

    max_over_mean: the largest load over the mean load; max_violation: that minus 1 (MaxVio, arXiv 2408.15664);
    entropy: of the load distribution, 1 if even, 0 if one expert has all tokens; dead_share: experts without a token.
    Where there are any, dead_experts says which: bit e of this hexadecimal number is set for expert e.
    A layer without tokens counts as even but dead: max_over_mean 1, entropy 0, dead_share 1.
    """
    return [_layer_statistics(counts) for counts in load.double().cpu()]


def _layer_statistics(counts: Tensor) -> dict[str, Any]:
    experts, total = len(counts), float(counts.sum())
    dead = (counts == 0).nonzero().flatten().tolist()
    which = {"dead_experts": hex(sum(1 << expert for expert in dead))} if dead else {}
    if total == 0:
        return {"max_over_mean": 1.0, "max_violation": 0.0, "entropy": 0.0, "dead_share": 1.0} | which
    shares = counts / total
    max_over_mean = float(shares.max()) * experts
    entropy = float(torch.special.entr(shares).sum()) / math.log(experts) if experts > 1 else 1.0
    return {
        "max_over_mean": max_over_mean,
        "max_violation": max_over_mean - 1,
        "entropy": entropy,
        "dead_share": len(dead) / experts,
        **which,
    }


def expert_shares(load: Tensor) -> list[list[int]]:
    """Each expert's tokens in percent of an even share, by layer, from `load [layers, experts]`: 100 is balanced."""
    even = load.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
    shares: list[list[int]] = (100 * load / even).round().long().tolist()
    return shares


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """The share of the peak (FLOP/s) that the model's own arithmetic uses, without recomputation."""
    return tokens_per_second * flops_per_token / peak


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of this device in FLOP/s of dense products; None if unknown, as on a CPU or in float32."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of memory, as far as the system tells.

    memory_bytes: the peak, of the tensors on the device, or of the process if the device is the CPU; device_bytes: of
    the tensors on the device now; host_bytes: of the process now, without its libraries.
    """
    figures = {"memory_bytes": memory_bytes(device), "host_bytes": host_bytes()}
    if device.type == "cuda":
        figures["device_bytes"] = torch.cuda.memory_allocated(device)
    return {name: size for name, size in figures.items() if size is not None}


def memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of the tensors on the device, or of the process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_bytes() -> int | None:
    """The memory that this process has for itself now; None where the system does not tell, as macOS.

    Mapped files, as libraries are, do not count: their pages come and go.
    """
    with suppress(OSError), open("/proc/self/statm", "rb", buffering=0) as file:
        resident, shared = file.read().split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return None
