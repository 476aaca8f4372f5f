"""Weights in the data type of their products: bfloat16, rounded from float32 once a step.

Products under autocast multiply the same numbers, but autocast rounds every weight in every micro-batch, and again when
activations are recomputed. What has another use than a product (embedding, norms, router, biases) stays in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.model.lora import is_factor
from moe_lm.model.moe import Experts
from moe_lm.model.transformer import LanguageModel


def multiplied(model: LanguageModel) -> Iterator[tuple[nn.Module, str]]:
    """The weights whose products run in the data type of autocast: matrices of linear layers, stacks of experts.

    Those of adapters are too small to be worth it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | Experts):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not is_factor(name):
                    yield module, name


class RoundedWeights:
    """Copies of the trained weights, which the modules multiply in their place; their gradient goes to the weights.

    A weight that changes needs a `refresh`.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        for module, name in multiplied(model):
            weight = module._parameters[name]
            assert weight is not None
            if weight.requires_grad:
                copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
                module.__dict__.setdefault("rounded", {})[name] = copy  # no buffer: no checkpoint has it
                self._weights.append(weight)
                self._copies.append(copy)
        for module in {module for module, _ in multiplied(model) if "rounded" in module.__dict__}:
            layer: Any = type(module)  # which the type checker does not take for hashable
            module.__class__ = _reading_copies(layer, frozenset(module.__dict__["rounded"]))
        self.refresh()

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights again."""
        if self._copies:  # with adapters there are none
            torch._foreach_copy_(self._copies, self._weights)


@torch.no_grad()
def narrow_trained(model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keep the trained weights themselves in this data type; returns their values before, on the host, by name.

    Autograd casts their gradients to float32 and adds them up so. A table of embeddings that is the head too stays as
    it is, and autocast rounds it for the head.
    """
    before: dict[str, Tensor] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module, name in multiplied(model):
        weight = module._parameters[name]
        assert weight is not None
        if weight.requires_grad and weight.dtype != dtype and weight is not model.model.embed_tokens.weight:
            if not weight.is_meta:  # on the host: a device has no room for both when an optimizer comes besides
                before[names[weight]] = weight.data.cpu()
            weight.data = weight.data.to(dtype)
            weight.grad_dtype = torch.float32
    return before


@functools.cache
def _reading_copies(layer: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The same layer, except that whoever reads its weights of these names gets their copies."""
    return type(layer.__name__, (layer,), {name: property(_reader(name)) for name in sorted(names)})


def _reader(name: str) -> Callable[[Any], Tensor]:
    def read(layer: Any) -> Tensor:
        copy: Tensor = _Rounded.apply(layer._parameters[name], layer.rounded[name])
        return copy

    return read


class _Rounded(torch.autograd.Function):
    """A weight's copy; the gradient is that of rounding: it passes on to the weight, in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None
