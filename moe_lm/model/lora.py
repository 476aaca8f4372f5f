"""Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights: `W x` becomes `W x + scale * B (A x)`.

Linear layers and stacks of routed experts get their factors in place, so that every name of the model stays; those of
a stack are stacks themselves, multiplied group by group like it. A factor's name ends in `lora_A` or `lora_B`.

Shapes: D inputs, F outputs, r rank, E experts, R token slots. A layer has `lora_A [r, D]` and `lora_B [F, r]`, as in
`peft`; the stack `up_proj [E, D, F]` has `up_proj_lora_A [E, D, r]` and `up_proj_lora_B [E, r, F]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import LoraConfig
from moe_lm.model.drawing import fill_uniform
from moe_lm.model.moe import Experts, all_logical, logical_names
from moe_lm.model.transformer import LanguageModel, generator_of, is_expert

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALIGNMENT = 8  # elements; grouped products want rows of 16 bytes, in bfloat16 too


def freeze(model: LanguageModel, lora: LoraConfig | None, freeze_router: bool | None) -> None:
    """Freeze what is not trained; with `lora` that is everything but new adapters, which are not yet filled.

    `freeze_router=None` freezes routers only with `lora`.
    """
    if lora is not None:
        model.requires_grad_(False)
        add_adapters(model, lora)
    for layer in model.moe_layers:
        layer.gate.weight.requires_grad_(not (lora is not None if freeze_router is None else freeze_router))


def add_adapters(model: LanguageModel, lora: LoraConfig) -> None:
    """Put factors beside every weight that `lora.targets` names."""
    for module, kind in list(_targets(model)):
        if lora.targets is None or kind in lora.targets:
            module.__class__ = LoraExperts if isinstance(module, Experts) else LoraLinear
            assert isinstance(module, LoraExperts | LoraLinear)
            module.adapt(lora)


def _targets(model: LanguageModel) -> Iterator[tuple[nn.Linear | Experts, str]]:
    """The modules that can be adapted, each with its name in `lora.targets`."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield module, "experts"
        elif isinstance(module, nn.Linear) and ".self_attn." in name:
            yield module, "attention"
        elif isinstance(module, nn.Linear) and ".mlp." in name and name.rsplit(".", 1)[-1] in FEED_FORWARD:
            yield module, "feed_forward"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter."""

    def adapt(self, lora: LoraConfig) -> None:
        self.lora_A = nn.Parameter(self.weight.new_empty(lora.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, lora.rank))
        self.scale, self.dropout = scale(lora), lora.dropout
        self.mask_D: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        lora_A = self.lora_A if self.mask_D is None or not self.training else self.lora_A * self.mask_D
        return super().forward(x) + F.linear(F.linear(x, lora_A) * self.scale, self.lora_B)


class LoraExperts(Experts):
    """Routed experts with an adapter for each of their matrices."""

    def adapt(self, lora: LoraConfig) -> None:
        matrices = all_logical(self.named_parameters())
        self.inputs = {name: stack.shape[1] for name, stack in matrices.items()}
        for name, stack in matrices.items():
            experts, inputs, outputs = stack.shape
            setattr(self, f"{name}_lora_A", nn.Parameter(stack.new_empty(experts, inputs, lora.rank)))
            setattr(self, f"{name}_lora_B", nn.Parameter(stack.new_empty(experts, lora.rank, outputs)))
        self.scale, self.dropout = scale(lora), lora.dropout
        self.masks_ED: dict[str, Tensor] = {}

    def multiply(self, name: str, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        added = [self._adapter(part, x_RD, ends_E) for part in logical_names(name)]
        return super().multiply(name, x_RD, ends_E) + torch.cat(added, -1)

    def _adapter(self, name: str, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        lora_A, lora_B = getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")
        if self.training and name in self.masks_ED:
            lora_A = lora_A * self.masks_ED[name][..., None]
        missing = -lora_A.shape[-1] % ALIGNMENT
        lora_A, lora_B = F.pad(lora_A.to(x_RD.dtype), (0, missing)), F.pad(lora_B.to(x_RD.dtype), (0, 0, 0, missing))
        low_Rr = self.grouped_mm(x_RD, lora_A, ends_E) * self.scale
        return self.grouped_mm(low_Rr, lora_B, ends_E)


def scale(lora: LoraConfig) -> float:
    """The factor on an adapter's output."""
    return lora.alpha / lora.rank


def is_factor(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith(("lora_A", "lora_B"))


def factors_of(weight: str) -> tuple[str, str]:
    """The names of the factors A and B of a weight."""
    if weight.endswith(".weight"):
        stem = weight.removesuffix("weight")
        return f"{stem}lora_A", f"{stem}lora_B"
    return f"{weight}_lora_A", f"{weight}_lora_B"


def initialise_adapters(model: LanguageModel, seed: int, first_expert: int = 0) -> None:
    """Fill the factors: A uniform within `1 / sqrt(D)`, as in `peft`, and B with zeros, so that nothing changes yet.

    Drawn by (seed, name, index), as all weights are: the same numbers in every layout.
    """
    for name, factor in model.named_parameters():
        if is_factor(name):
            initialise_factor(name, factor, seed, first_expert if is_expert(name) else 0)


@torch.no_grad()
def initialise_factor(name: str, rows: Tensor, seed: int, first: int = 0) -> None:
    """Fill a factor, or the rows of one from its row `first` on; both kinds of A have D as second dimension."""
    if name.endswith("lora_A"):
        fill_uniform(rows, 1 / math.sqrt(rows.shape[1]), f"{seed}/{name}", first * rows[0].numel())
    else:
        rows.zero_()


@torch.no_grad()
def draw_dropout(model: LanguageModel, seed: int, step: int) -> None:
    """Choose the inputs that the adapters leave out in this step; the others count `1 / (1 - dropout)` times.

    The choice depends on step, adapter and expert, and is the same for all tokens. So a rank with any part of the batch
    and any of the experts does what one process would do, and there is no random state to keep.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLinear | LoraExperts) or not module.dropout:
            continue
        device, key = next(module.parameters()).device, f"{seed}/{step}/{name}"
        if isinstance(module, LoraLinear):
            module.mask_D = _mask((module.in_features,), module.dropout, key, device)
            continue
        for stack, inputs in module.inputs.items():
            mask_ED = _mask((model.config.n_routed_experts, inputs), module.dropout, f"{key}.{stack}", device)
            module.masks_ED[stack] = mask_ED[module.indices.start : module.indices.stop]


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
    """Add an adapter to the weight that it stands beside, in place."""
    if weight.ndim == 3:
        weight.baddbmm_(lora_A, lora_B, alpha=scale)
    else:
        weight.addmm_(lora_B, lora_A, alpha=scale)


def _mask(shape: tuple[int, ...], dropout: float, key: str, device: torch.device) -> Tensor:
    kept = torch.rand(shape, generator=generator_of(key)) >= dropout
    return (kept / (1 - dropout)).to(device)
