"""The kernels that a model runs in: chosen by name for a device, then applied to a model that is already built.

The model's own code is plain torch. An operation that kernels can replace is an attribute of its modules and has a
table of kernels here, by name. A new kernel is an entry in a table and a line in `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from moe_lm.kernels import (
    attention,
    available,
    cpu_attention,
    cpu_decode,
    flash_attention,
    grouped_mm,
)
from moe_lm.kernels.native import build
from moe_lm.model import moe
from moe_lm.model.attention import AttentionLayer, SegmentAttention, segment_attention
from moe_lm.model.moe import Experts, GroupedMM, WeightedActivation
from moe_lm.model.transformer import LanguageModel

ATTENTION: Mapping[str, SegmentAttention] = {
    "plain": segment_attention,
    "segments": attention.segments,
    "cpp": cpu_attention.cpp,
    "torch_varlen": flash_attention.torch_varlen,
    "flash_attn_2": flash_attention.flash_attn_2,
    "flash_attn_3": flash_attention.flash_attn_3,
    "flash_attn_4": flash_attention.flash_attn_4,
}
EXPERTS: Mapping[str, GroupedMM] = {"plain": moe.grouped_mm, "bucketed": grouped_mm.bucketed, "fused": grouped_mm.fused}
ACTIVATION: Mapping[str, WeightedActivation] = {  # of the experts, by the same names
    "plain": moe.weighted_activation,
    "bucketed": grouped_mm.kept_narrow_in_blocks,
    "fused": grouped_mm.kept_narrow,
}
DECODING: Mapping[str, Callable[[LanguageModel], None]] = {"plain": lambda model: None, "cpp": cpu_decode.apply}


class Kernels(NamedTuple):
    """A name of each table; None for `experts` in a dense model, and for `decoding` where a model is only trained."""

    attention: str = "plain"
    experts: str | None = "plain"
    decoding: str | None = None

    def __str__(self) -> str:
        return ", ".join(f"{operation} {name}" for operation, name in self._asdict().items() if name is not None)


def choose(
    device: torch.device,
    decoding: bool = False,
    attention: str = "auto",
    simulated: Collection[str] | None = None,
    inputs: available.Inputs | None = None,
) -> Kernels:
    """The fastest kernels for a device, which need not be there; `attention` names another one for it.

    `decoding` adds one for generating text. On a CPU the C++ is compiled where it has not been compiled yet.
    `simulated` are the attention kernels that a simulated device has; otherwise those that can be imported here count.
    Without the `inputs` of attention it is not asked whether the kernel takes them: what it does not take, it leaves to
    plain torch. Raises UsageError for an attention kernel by name that does not serve.
    """
    kernels = Kernels(
        attention=available.pick(device.type, attention, simulated, inputs),
        experts="bucketed" if device.type == "cpu" else "fused",
    )
    if not decoding:
        return kernels
    has_cpp = device.type == "cpu" and build.library() is not None
    return kernels._replace(decoding="cpp" if has_cpp else "plain")


def apply(model: LanguageModel, kernels: Kernels) -> None:
    """Give a model its kernels. Adapters and expert parallelism come first: `cpp` leaves them as they are."""
    for module in model.modules():
        if isinstance(module, AttentionLayer):
            module.segment_attention = ATTENTION[kernels.attention]
        elif isinstance(module, Experts) and kernels.experts is not None:
            module.grouped_mm = EXPERTS[kernels.experts]
            module.activate = ACTIVATION[kernels.experts]
    if kernels.decoding is not None:
        DECODING[kernels.decoding](model)


def of(model: LanguageModel) -> Kernels:
    """The kernels that a model runs in; its `decoding` is None in plain torch, whether or not it was chosen."""
    attention = next(m.segment_attention for m in model.modules() if isinstance(m, AttentionLayer))
    experts = next((layer.experts.grouped_mm for layer in model.moe_layers), None)
    decoding = "cpp" if model.cached_attention is cpu_decode.NativeCachedAttention else None
    return Kernels(_name(ATTENTION, attention), experts and _name(EXPERTS, experts), decoding)


def passed_over(model: LanguageModel) -> list[str]:
    """A sentence for each attention kernel that is installed, is faster than the model's and does not serve here."""
    return available.passed_over(model.device.type, of(model).attention)


def _name(table: Mapping[str, object], kernel: object) -> str:
    return next(name for name, function in table.items() if function is kernel)
