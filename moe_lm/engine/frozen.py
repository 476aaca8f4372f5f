"""Frozen weights: the precision in which they are kept, and whether a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import nn

from moe_lm.model.lora import is_factor
from moe_lm.model.moe import Experts, logical_names
from moe_lm.model.transformer import LanguageModel


@torch.no_grad()
def narrow_frozen(model: LanguageModel, dtype: torch.dtype) -> None:
    """Cast frozen matrices to the data type of their products, as autocast would in every pass: no result changes.

    Weights with another use than these products (embedding, norms, router) stay as they are.
    """
    for name, module in model.named_modules():
        tied = name == "lm_head" and model.config.tie_word_embeddings
        if isinstance(module, nn.Linear | Experts) and not tied:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def left_to_base(model: LanguageModel) -> frozenset[str]:
    """The logical names of the weights that a checkpoint leaves to the base: with adapters, all that are frozen."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if not any(map(is_factor, named)):
        return frozenset()
    frozen = (name for name, parameter in named.items() if not parameter.requires_grad)
    return frozenset(part for name in frozen for part in logical_names(name))
