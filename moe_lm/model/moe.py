"""The Mixture-of-Experts layer: router, shared and routed experts, and how tokens come to their experts.

DeepSeekMoE (arXiv 2401.06066) with DeepSeek-V3's bias balance (arXiv 2412.19437); other configs make it a softmax over
every expert, Switch (arXiv 2101.03961) or GShard (arXiv 2006.16668).

Shapes: B rows, S positions, T = B*S tokens, D hidden_size, E n_routed_experts, k num_experts_per_tok, F expert width,
R = T*k token slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.model.layers import ACTIVATIONS, MLP, compute_dtype


class Routing(NamedTuple):
    """The decisions of a router. `experts` are chosen by biased scores; `weights` come from unbiased ones."""

    logits: Tensor  # [T, E] float32
    scores: Tensor  # [T, E] float32, after the scoring function
    experts: Tensor  # [T, k] int64
    weights: Tensor  # [T, k] float32


class MoE(nn.Module):
    """The shared experts' output plus that of the chosen experts, by weight (DeepSeek-V3, equation 12)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.shared_width) if config.shared_width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        self.dispatcher: Dispatcher = dispatch_locally

    def forward(self, x_BSD: Tensor, routing: Routing | None = None) -> tuple[Tensor, Routing]:
        """The layer's output and its routing, which a block gives: its router reads `x` before that is rounded."""
        routing = self.gate(x_BSD) if routing is None else routing
        x_TD = x_BSD.flatten(0, 1)
        routed_TD, shared_TD = self.dispatcher(x_TD, routing, self.experts, self.shared_experts)
        if shared_TD is None:
            return routed_TD.view_as(x_BSD), routing
        if self.shared_expert_gate is not None:
            shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
        return (routed_TD + shared_TD).view_as(x_BSD), routing


class Router(nn.Module):
    """Scores all experts in float32 and chooses; its `e_score_correction_bias` is moved by no gradient."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_BSD: Tensor) -> Routing:
        routing = self.choose(x_BSD)
        if self.config.capacity_factor is None:
            return routing
        kept = within_capacity(routing.experts.unflatten(0, x_BSD.shape[:2]), self.config)
        # The overflow is computed and then weighed by zero: capacity is here to compare its quality, not to save time.
        return routing._replace(weights=routing.weights * kept.flatten(0, 1))

    def choose(self, x_BSD: Tensor) -> Routing:
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSE = F.linear(x_BSD.float(), self.weight.float())
        return route(logits_BSE.flatten(0, 1), self.e_score_correction_bias, self.config)


def route(logits_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> Routing:
    """Choose `k` experts for each token: DeepSeek-V3, equations 13 to 16; without bias and groups, any classical top-k.

    With groups a token goes only to experts of its `topk_group` best ones. A group's score is the sum of its two best
    biased scores with sigmoid (DeepSeek-V3) and its best one with softmax (DeepSeek-V2).
    """
    scores_TE = logits_TE.sigmoid() if config.scoring_func == "sigmoid" else logits_TE.softmax(-1)
    biased_TE = scores_TE.detach() + bias_E
    if config.n_group > 1:
        groups = biased_TE.unflatten(-1, (config.n_group, -1))
        best = min(2, groups.shape[-1]) if config.scoring_func == "sigmoid" else 1
        group_scores = groups.topk(best, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(-1, group_scores.topk(config.topk_group, dim=-1).indices, True)
        biased_TE = groups.masked_fill(~allowed[..., None], -math.inf).flatten(-2)
    experts_Tk = biased_TE.topk(config.num_experts_per_tok, dim=-1).indices
    weights_Tk = scores_TE.gather(-1, experts_Tk)
    if config.norm_topk_prob:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return Routing(logits_TE, scores_TE, experts_Tk, weights_Tk * config.routed_scaling_factor)


def within_capacity(experts_BSk: Tensor, config: ModelConfig) -> Tensor:
    """A mask `[B, S, k]` of the choices that find room when an expert takes `ceil(factor * k * S / E)` tokens of a row.

    First choices go before second ones, earlier positions before later ones (GShard, algorithm 1, with a row as its
    group: the result does not depend on how rows are spread over devices). Documents packed into a row share its room.
    """
    assert config.capacity_factor is not None
    _, positions, per_token = experts_BSk.shape
    capacity = math.ceil(config.capacity_factor * per_token * positions / config.n_routed_experts)
    in_order = F.one_hot(experts_BSk.transpose(1, 2).flatten(1), config.n_routed_experts)  # [B, k*S, E]
    place = (in_order.cumsum(1) * in_order).sum(-1)
    return (place <= capacity).unflatten(1, (per_token, positions)).transpose(1, 2)


# x `[R, D]`, weight `[E, D, F]`, ends `[E]` int32 -> `[R, F]`: rows ends[e-1]..ends[e] of x times weight[e].
GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]
# See `weighted_activation`.
WeightedActivation = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], bool], Tensor]


class Experts(nn.Module):
    """Routed experts as stacked weights `[E, in, out]`; kernels replace `grouped_mm` and `activate`.

    Gate and up are one stack, for one product, but a state dict has them apart, as all else outside the step does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.expert_size
        self.wide = GATE_UP if config.mlp_gated else "up_proj"  # the name of the first product's stack
        columns = width * len(logical_names(self.wide))
        self.register_parameter(self.wide, nn.Parameter(torch.empty(experts, hidden, columns)))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.gated, self.activation = config.mlp_gated, ACTIVATIONS[config.hidden_act]
        self.indices = range(experts)  # of these among all experts; expert parallelism keeps a part of them
        self.grouped_mm: GroupedMM = grouped_mm
        self.activate: WeightedActivation = weighted_activation

    def forward(self, x: Tensor, ends_E: Tensor, weights_R: Tensor, copies: Copies | None = None) -> Tensor:
        """Expert e takes rows `ends[e-1]..ends[e]` of `x [R, D]`, which are sorted by expert.

        With `copies` they are copies of the rows of `x [T, D]`. A row's result counts `weights` times. That is one
        factor for all of it, so it may come before the last product, where rows are narrower, and a token's results
        need only be added up.
        """
        return self.contract(self.expand(x, ends_E, copies), ends_E, weights_R)

    def expand(self, x: Tensor, ends_E: Tensor, copies: Copies | None) -> Tensor:
        """The first product, of gate and up or of up alone."""
        x = x.to(compute_dtype(x))
        return self.multiply(self.wide, x if copies is None else copy_rows(x, copies), ends_E)

    def contract(self, wide: Tensor, ends_E: Tensor, weights_R: Tensor) -> Tensor:
        """The way back from the first product: the activation and the last one."""
        hidden_RF = self.activate(wide, weights_R, self.activation, self.gated)
        return self.multiply("down_proj", hidden_RF, ends_E)

    def multiply(self, name: str, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """The product with one of the stacks, in the data type of `x`; an adapter adds its own to it."""
        stack: Tensor = getattr(self, name)
        return self.grouped_mm(x_RD, stack.to(x_RD.dtype), ends_E)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        named = self.named_parameters(prefix.removesuffix("."), recurse=False)
        destination |= all_logical((name, stack if keep_vars else stack.detach()) for name, stack in named)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        wide = prefix + self.wide
        if all(name in state_dict for name in logical_names(wide)):
            stack = physical(wide, state_dict)
            for name in logical_names(wide):
                del state_dict[name]
            state_dict[wide] = stack
        super()._load_from_state_dict(state_dict, prefix, *others)


def weighted_activation(wide: Tensor, weights_R: Tensor, activation: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    """`weight * act(gate) * up` of each row, `[R, F]`, computed in float32.

    `wide` has gate and up side by side, `[R, 2F]`; not `gated`, it is up alone, `[R, F]`, and takes the activation.
    """
    first_RF, *up_RF = in_float32(wide).chunk(2 if gated else 1, -1)
    hidden_RF = activation(first_RF)
    return ((hidden_RF * up_RF[0] if gated else hidden_RF) * weights_R[:, None]).to(wide.dtype)


def in_float32(x: Tensor) -> Tensor:
    """The same numbers in float32, but those of float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


GATE_UP = "gate_up_proj"


def logical_names(name: str) -> tuple[str, ...]:
    """The names by which all but the step itself knows a parameter: checkpoints, adapters, optimizers of matrices.

    They are its own, but for the stack of gate and up, which are two.
    """
    stem = name.removesuffix(GATE_UP)
    return (name,) if stem == name else (f"{stem}gate_proj", f"{stem}up_proj")


def logical(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter, or a tensor like it (a gradient, a moment), as views under its logical names.

    A scalar, such as a count of steps, belongs to each of them.
    """
    names = logical_names(name)
    if len(names) == 1 or tensor.ndim == 0:
        return dict.fromkeys(names, tensor)
    return dict(zip(names, tensor.chunk(len(names), -1), strict=True))


def all_logical(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {part: view for name, tensor in named for part, view in logical(name, tensor).items()}


def physical(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `logical`: the parameter out of the tensors under its logical names."""
    parts = [tensors[part] for part in logical_names(name)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def grouped_mm(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """One matrix product after the other, also for experts without rows, whose gradient is zero."""
    rows = x_RD.split(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())
    return torch.cat([x @ weight for x, weight in zip(rows, weight_EDF, strict=True)])


# Carries tokens `[T, D]` to their experts and back, and computes the shared experts, if there are any, meanwhile: their
# results `[T, D]` are returned apart. Expert parallelism and decoding in C++ put others in place of `dispatch_locally`.
Dispatcher = Callable[[Tensor, Routing, Experts, MLP | None], tuple[Tensor, Tensor | None]]


def dispatch_locally(
    x_TD: Tensor, routing: Routing, experts: Experts, shared: MLP | None
) -> tuple[Tensor, Tensor | None]:
    """All experts are here."""
    x_TD = x_TD.to(compute_dtype(x_TD))
    out_TD = add_experts(x_TD, weights_by_expert(routing), routing.experts.numel(), experts)
    return out_TD, None if shared is None else shared(x_TD)


NOT_CHOSEN = -math.inf  # among weights, which may be zero


def weights_by_expert(routing: Routing) -> Tensor:
    """The weight of every expert for every token, `[T, E]` float32; NOT_CHOSEN where it has none."""
    return torch.full_like(routing.scores, NOT_CHOSEN).scatter(1, routing.experts, routing.weights)


def add_experts(x_TD: Tensor, weights_TE: Tensor, count: int, experts: Experts) -> Tensor:
    """The sum of the chosen experts' results for each token, by weight: `[T, D]`. `count` weights are chosen in all.

    Tokens are copied for their experts, multiplied expert by expert, and their results added up.
    """
    copies, pair_R, before = copies_of(weights_TE != NOT_CHOSEN, count)
    weights_R = weights_TE.T.flatten().index_select(0, pair_R)
    rows, groups = weights_TE.shape
    ends_E = before.index_select(0, rows * torch.arange(1, groups + 1, device=before.device)).to(torch.int32)
    return add_up(experts(x_TD, ends_E, weights_R, copies), copies)


class Copies(NamedTuple):
    """R copies of T rows, for those of G groups that want them. Row t's have `places[offsets[t]:offsets[t + 1]]`."""

    source: Tensor  # [R] int64, the row of which each is a copy
    places: Tensor  # [R] int64
    offsets: Tensor  # [T + 1] int64

    def first(self, count: int) -> Copies:
        """The same with the first `count` of R copies, where the others mean nothing."""
        return Copies(self.source[:count], self.places[:count], self.offsets)

    def take(self, x_TD: Tensor) -> Tensor:
        """The copies `[R, D]`."""
        return x_TD.index_select(0, self.source)

    def add_up(self, y_RD: Tensor) -> Tensor:
        """The sum over the copies of each row, `[T, D]`: added in float32, in one order, rounded once."""
        return F.embedding_bag(self.places, y_RD.contiguous(), self.offsets, mode="sum", include_last_offset=True)


def copies_of(wanted_TG: Tensor, count: int) -> tuple[Copies, Tensor, Tensor]:
    """The copies of rows for the groups that want them, by group and within a group by row.

    Returns with them the pair `[R]` of which each is one, as `group * T + row`, and how many copies come before each
    pair, `[G*T + 1]`. `count` is R, the number of True in `wanted`: given, so that no device must be asked for it. With
    a larger one the last entries mean nothing. No sort and no search: counting gives the places.
    """
    rows, groups = wanted_TG.shape
    wanted_GT, wanted_TG = wanted_TG.T.flatten(), wanted_TG.flatten()
    before_GT = F.pad(wanted_GT.cumsum(0), (1, 0))
    before_TG = F.pad(wanted_TG.cumsum(0), (1, 0))
    # What is not wanted goes to a place behind the last one.
    place_GT = before_GT[:-1].masked_fill(~wanted_GT, count)
    order_TG = before_TG[:-1].masked_fill(~wanted_TG, count)
    place_TG = place_GT.view(groups, rows).T.flatten()
    pair_R = _put(place_GT, torch.arange(groups * rows, device=place_GT.device), count)
    places_R = _put(order_TG, place_TG, count)
    return Copies(pair_R % max(rows, 1), places_R, before_TG[::groups].contiguous()), pair_R, before_GT


def _put(places: Tensor, values: Tensor, count: int) -> Tensor:
    """`[count]` values by place; those of place `count` are left out."""
    return values.new_zeros(count + 1).scatter_(0, places, values)[:count]


def copy_rows(x_TD: Tensor, copies: Copies) -> Tensor:
    """`[R, D]`. Its gradient is `add_up`."""
    return _Copy.apply(x_TD, *copies)


def add_up(y_RD: Tensor, copies: Copies) -> Tensor:
    """`[T, D]`. Its gradient is `copy_rows`."""
    return _AddUp.apply(y_RD, *copies)


# Gradients are written out, because those of index_select and embedding_bag add with atomics on CUDA, in no fixed
# order.


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *copies: Tensor) -> Tensor:
        ctx.save_for_backward(*copies)
        return Copies(*copies).take(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return Copies(*ctx.saved_tensors).add_up(grad_RD), None, None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, *copies: Tensor) -> Tensor:
        ctx.save_for_backward(*copies)
        return Copies(*copies).add_up(y_RD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        return Copies(*ctx.saved_tensors).take(grad_TD), None, None, None


def expert_counts(experts_Tk: Tensor, num_experts: int, counted_T: Tensor | None = None) -> Tensor:
    """Tokens of each expert, `[E]` int64, or `[..., E]` of several layers; `counted [T]` leaves padding out."""
    chosen = torch.ones_like(experts_Tk) if counted_T is None else counted_T[:, None].expand_as(experts_Tk).long()
    zeros = experts_Tk.new_zeros(*experts_Tk.shape[:-2], num_experts)
    return zeros.scatter_add(-1, experts_Tk.flatten(-2), chosen.flatten(-2))
