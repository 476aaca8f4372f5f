"""Recomputation: activations that are computed again in the backward pass instead of being kept, applied from outside.

`full` keeps the input of every block and repeats the block, its exchanges between ranks included.

`selective` keeps what is dear to compute again: attention, the products of experts and feed-forward layers, the experts
that were chosen, and what other ranks sent. It repeats the rest, which is most of the memory and little of the time
(Korthikanti et al., arXiv 2205.05198). The repeated parts of a block lie between its exchanges:

    attend_and_route   norms, rotation, router, and the projections around attention. A kept byte saves as much work
                       here as in the experts; these are the products that 16B on 8 x 80 GB has no room for. Where ranks
                       share rows, heads travel once more instead of being kept.
    expand             the copies of tokens for their experts; the product of them is kept
    contract           activation and last product, of every expert and feed-forward layer: the products before it are
                       its inputs, and it is repeated only as far as the input of the last one

Nothing in a block draws random numbers: an adapter's dropout is drawn once a step. So no random state is kept.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_lm.config.training import Recomputation
from moe_lm.model.layers import MLP
from moe_lm.model.moe import Experts, MoE
from moe_lm.model.transformer import LanguageModel

ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "moe_lm::uneven_attention",
    "moe_lm::segment_attention",
    "moe_lm::cpu_attention",
}
CHOICE = {"aten::topk"}  # repeated, it could decide otherwise between two equal scores
GROUPED_PRODUCTS = {"aten::_grouped_mm", "moe_lm::rows_by_weights"}


def apply(model: LanguageModel, how: Recomputation) -> None:
    """Let the model compute these parts of it again in the backward pass."""
    if how == "none":
        return
    for block in model.model.layers:
        if how == "full":
            _wrap(block, "forward")
        else:
            _wrap(block, "attend_and_route", ATTENTION | CHOICE)
            if isinstance(block.mlp, MoE):
                _wrap(block.mlp.experts, "expand", GROUPED_PRODUCTS)
            for part in block.modules():
                if isinstance(part, MLP | Experts):
                    _wrap(part, "contract")


def _wrap(module: nn.Module, method: str, kept: Collection[str] = ()) -> None:
    """Put a checkpoint around a method of this module, which keeps the results of the operations of these names."""

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kept:
        options["context_fn"] = partial(_contexts, kept)
    setattr(module, method, partial(checkpoint, getattr(module, method), **options))


def _contexts(kept: Collection[str]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What keeps the results of the operations of these names in the forward pass, and what gives them back."""

    def policy(_: object, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE

    keeping, giving_back = create_selective_checkpoint_contexts(policy)
    return keeping, _Repeating(kept, giving_back)


class _Repeating(TorchDispatchMode):
    """Lets only kept operations reach torch's own mode, which refuses any that the forward pass did not run.

    ZeRO 3 gathers and frees weights between the operations of a block, as the passes before this one lead it to.
    """

    def __init__(self, kept: Collection[str], giving_back: TorchDispatchMode) -> None:
        super().__init__()
        self._kept, self._giving_back = kept, giving_back

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in self._kept:
            return self._giving_back.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs or {})
