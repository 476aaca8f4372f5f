"""The kernels that a model runs in: chosen by name for a device, then applied to a model that is already built.

The model's own code is plain torch. An operation that kernels can replace is an attribute of its modules and has a
table of kernels here, by name. A new kernel is an entry in a table and a line in `choose`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from moe_lm.kernels import attention, cpu_decode, grouped_mm
from moe_lm.kernels.native import build
from moe_lm.model import moe
from moe_lm.model.attention import AttentionLayer, SegmentAttention, segment_attention
from moe_lm.model.moe import Experts, GroupedMM
from moe_lm.model.transformer import LanguageModel

ATTENTION: Mapping[str, SegmentAttention] = {
    "plain": segment_attention,
    "segments": attention.segments,
    "flash_attn": attention.flash_attn,
    "torch_varlen": attention.torch_varlen,
}
EXPERTS: Mapping[str, GroupedMM] = {"plain": moe.grouped_mm, "bucketed": grouped_mm.bucketed, "fused": grouped_mm.fused}
DECODING: Mapping[str, Callable[[LanguageModel], None]] = {"plain": lambda model: None, "cpp": cpu_decode.apply}


class Kernels(NamedTuple):
    """A name of each table; None for `experts` in a dense model, and for `decoding` where a model is only trained."""

    attention: str = "plain"
    experts: str | None = "plain"
    decoding: str | None = None

    def __str__(self) -> str:
        return ", ".join(f"{operation} {name}" for operation, name in self._asdict().items() if name is not None)


def choose(device: torch.device, decoding: bool = False) -> Kernels:
    """The fastest kernels for a device, which need not be there.

    `decoding` adds one for generating text; on a CPU that compiles the C++ where it has not been compiled yet.
    """
    if device.type == "cuda":
        has_flash_attn = importlib.util.find_spec("flash_attn") is not None
        kernels = Kernels("flash_attn" if has_flash_attn else "torch_varlen", "fused")
    elif device.type == "cpu":
        kernels = Kernels("segments", "bucketed")
    else:
        kernels = Kernels("plain", "fused")
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
    if kernels.decoding is not None:
        DECODING[kernels.decoding](model)


def of(model: LanguageModel) -> Kernels:
    """The kernels that a model runs in; its `decoding` is None in plain torch, whether or not it was chosen."""
    attention = next(m.segment_attention for m in model.modules() if isinstance(m, AttentionLayer))
    experts = next((layer.experts.grouped_mm for layer in model.moe_layers), None)
    decoding = "cpp" if model.cached_attention is cpu_decode.NativeCachedAttention else None
    return Kernels(_name(ATTENTION, attention), experts and _name(EXPERTS, experts), decoding)


def _name(table: Mapping[str, object], kernel: object) -> str:
    return next(name for name, function in table.items() if function is kernel)
