"""Recomputation: activations that are computed again in the backward pass instead of being kept, applied from outside.

`full` keeps the input of every block and repeats the block, its exchanges between ranks included.

`selective` keeps what is dear to compute again: products, attention, the experts that were chosen, and what other ranks
sent. It repeats the rest, which is most of the memory and little of the time: norms, rotations, casts, activations
(Korthikanti et al., arXiv 2205.05198). The repeated parts of a block lie between its exchanges:

    attend_and_route   norm, attention, norm, router; with a policy that keeps the results of its dear operations
    contract           activation and last product, of every expert and feed-forward layer: the products before it are
                       its inputs, and it is repeated only as far as the input of the last one

Nothing in a block draws random numbers: an adapter's dropout is drawn once a step. So no random state is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_lm.config.training import Recomputation
from moe_lm.model.layers import MLP
from moe_lm.model.moe import Experts, MoE
from moe_lm.model.transformer import LanguageModel

PRODUCTS = {  # the argument whose last dimension is summed over
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::_grouped_mm": 0,
    "moe_lm::rows_by_weights": 0,
}
DEAR = {
    "aten::topk",  # a repeated choice between two equal scores could be the other one
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


def apply(model: LanguageModel, how: Recomputation) -> None:
    """Let the model compute these parts of it again in the backward pass."""
    if how == "none":
        return
    for block in model.model.layers:
        if how == "full":
            _wrap(block, "forward")
        else:
            keep = partial(policy, model.config.hidden_size)
            _wrap(block, "attend_and_route", keep)
            if isinstance(block.mlp, MoE):
                _wrap(block.mlp.experts, "expand", keep)
            for part in block.modules():
                if isinstance(part, MLP | Experts):
                    _wrap(part, "contract")


def policy(hidden_size: int, _: object, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept.

    An element of a product costs as many multiplications as it has summands, so that those with few are repeated: the
    up-projections of latent attention.
    """
    name = operation.name()
    if name in PRODUCTS:
        factor: Tensor = inputs[PRODUCTS[name]]
        keep = 2 * factor.shape[-1] > hidden_size
    else:
        keep = name in DEAR
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _wrap(module: nn.Module, method: str, keep: Callable[..., CheckpointPolicy] | None = None) -> None:
    """Put a checkpoint around a method of this module."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep)

    setattr(module, method, partial(checkpoint, getattr(module, method), **options))
