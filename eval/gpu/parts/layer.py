"""The MoE layer, forward and backward, beside the grouped products alone and the layers of Liger and SonicMoE.

TFLOP/s count the products of the routed experts: 6 x tokens x k x hidden x width forward, three times that both ways.
Random weights and random tokens: the routing is real, and nearly even. Shapes are those for which others have published
their figures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import begin, median_seconds
from torch import Tensor

from moe_lm.config.model import ModelConfig
from moe_lm.kernels import kernels
from moe_lm.model.transformer import LanguageModel

# Tokens, hidden size, width of an expert, experts, experts a token.
SHAPES = [
    (32768, 2048, 768, 128, 8),
    (32768, 1536, 256, 128, 8),
    (32768, 4096, 1024, 128, 8),
    (32768, 1280, 848, 63, 7),
]
TINY = [(64, 32, 16, 8, 2)]

part = begin()


def shape_of(hidden: int, width: int, experts: int, k: int) -> ModelConfig:
    """One MoE layer without shared experts, in the smallest model around it."""
    return ModelConfig(
        vocab_size=64, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=1, intermediate_size=width,
        moe_intermediate_size=width, n_routed_experts=experts, num_experts_per_tok=k, n_shared_experts=0,
    )  # fmt: skip


def our_layer(config: ModelConfig, x: Tensor, compiled: bool) -> Callable[[], Tensor]:
    with part.device:
        model = LanguageModel(config)
    model.initialise(0)
    kernels.apply(model, kernels.choose(part.device))
    layer = model.moe_layers[0].to(torch.bfloat16)
    run = torch.compile(layer) if compiled else layer

    def forward() -> Tensor:
        with torch.autocast(part.device.type, torch.bfloat16):
            return run(x[None])[0]

    return forward


def products_alone(config: ModelConfig, x: Tensor) -> Callable[[], Tensor]:
    """Three grouped products over rows that are sorted already, evenly."""
    k, experts, hidden, width = (
        config.num_experts_per_tok,
        config.n_routed_experts,
        config.hidden_size,
        config.expert_size,
    )
    rows = x.repeat(k, 1).requires_grad_()
    ends = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32) * (len(rows) // experts)
    ends[-1] = len(rows)
    up = torch.randn(experts, hidden, 2 * width, device=x.device, dtype=x.dtype, requires_grad=True)
    down = torch.randn(experts, width, hidden, device=x.device, dtype=x.dtype, requires_grad=True)

    def forward() -> Tensor:
        gate_up = F.grouped_mm(rows, up, offs=ends)
        return F.grouped_mm(gate_up[:, :width].contiguous(), down, offs=ends)

    return forward


def both_ways(forward: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = forward()
        out.backward(torch.ones_like(out))  # not expanded, which grouped_mm refuses

    return run


def main() -> None:
    part.note(other_layers={name: is_there(name) for name in ("liger_kernel", "sonicmoe")})
    shapes = TINY if part.tiny else SHAPES
    budget = part.seconds / len(shapes) / 8
    for tokens, hidden, width, experts, k in shapes:
        config = shape_of(hidden, width, experts, k)
        x = torch.randn(tokens, hidden, device=part.device, dtype=torch.bfloat16, requires_grad=True)
        flops = 6 * tokens * k * hidden * width
        contenders = {"grouped_mm alone": products_alone(config, x), "moe-lm": our_layer(config, x, compiled=False)}
        if not part.tiny:
            contenders["moe-lm compiled"] = our_layer(config, x, compiled=True)
        found: dict[str, Any] = {}
        for name, forward in contenders.items():
            try:
                with torch.no_grad():
                    seconds = median_seconds(forward, part.device, budget)
                both = median_seconds(both_ways(forward), part.device, budget)
                found[name] = {"forward": round(flops / seconds / 1e12, 2), "both": round(3 * flops / both / 1e12, 2)}
            except (RuntimeError, torch.OutOfMemoryError) as error:
                found[name] = {"failed": str(error).splitlines()[0]}
            part.note(**{f"T {tokens}, D {hidden}, F {width}, E {experts}, k {k}, TFLOP/s": found})


def is_there(package: str) -> str:
    """Whether a package with a layer of its own can be imported; its layer is then worth a row here."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"no: {error}"
    return "yes"


main()
