"""The Mixture-of-Experts layer: router, shared and routed experts, load statistics.

DeepSeekMoE (arXiv 2401.06066) with DeepSeek-V3's bias balance (arXiv 2412.19437); by config alone also a softmax
over every expert, Switch (arXiv 2101.03961) and GShard (arXiv 2006.16668).

Shapes: T = B*S tokens, D hidden_size, E n_routed_experts, k num_experts_per_tok, F expert width, R = T*k token slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.kernels import few_rows
from moe_lm.kernels.grouped_mm import Runs, grouped_mm, mm_by_runs, runs_of
from moe_lm.model.layers import ACTIVATIONS, MLP, Linear


class Routing(NamedTuple):
    """What a router decided. `experts` are chosen by biased scores, `weights` come from the unbiased ones."""

    logits: Tensor  # [T, E] float32
    scores: Tensor  # [T, E] float32, after the scoring function
    experts: Tensor  # [T, k] int64
    weights: Tensor  # [T, k] float32


FEW_SLOTS = 512  # more are faster sorted by torch than in Python


class Dispatcher(Protocol):
    """Carries tokens to their experts and back; `meanwhile` is computed while they travel, and returned beside them.

    Expert parallelism puts another one in its place.
    """

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]: ...


class MoE(nn.Module):
    """Shared experts on every token plus the routed experts that the router chose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.shared_width) if config.shared_width else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        self.dispatcher: Dispatcher = dispatch_locally

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.gate(x_BSD)
        x_TD = x_BSD.flatten(0, 1)
        routed, shared = self.dispatcher(x_TD, routing, self.experts, lambda: self._shared(x_TD))
        out = routed if shared is None else routed + shared
        return out.view_as(x_BSD), routing

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        out = self.shared_experts(x_TD)
        return out if self.shared_expert_gate is None else self.shared_expert_gate(x_TD).sigmoid() * out


class Router(nn.Module):
    """Scores every expert in float32 and chooses; the trainer, not a gradient, moves `e_score_correction_bias`."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_BSD: Tensor) -> Routing:
        if self.config.n_group == 1 and few_rows.serves(x_BSD, x_BSD, few_rows.ANY):
            routing = self._of_few_rows(x_BSD)
        else:
            with torch.autocast(x_BSD.device.type, enabled=False):
                logits_BSE = F.linear(x_BSD.float(), self.weight.float())
            routing = route(logits_BSE.flatten(0, 1), self.e_score_correction_bias, self.config)
        if self.config.capacity_factor is None:
            return routing
        kept = within_capacity(routing.experts.unflatten(0, x_BSD.shape[:2]), self.config)
        # The overflow is computed and thrown away: capacity is here to compare its quality, not to save time.
        return routing._replace(weights=routing.weights * kept.flatten(0, 1))

    def _of_few_rows(self, x_BSD: Tensor) -> Routing:
        config = self.config
        x_TD, weight = x_BSD.flatten(0, 1).float(), self.weight.float()
        bias, sigmoid = self.e_score_correction_bias.float(), config.scoring_func == "sigmoid"
        how = config.num_experts_per_tok, sigmoid, config.norm_topk_prob, config.routed_scaling_factor
        return Routing(*few_rows.route(x_TD, weight, bias, *how))


def route(logits_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> Routing:
    """Choose `k` experts a token: DeepSeek-V3, equations 12 to 16; without a bias and groups any classical top-k.

    A group's score is the sum of its two best biased scores with sigmoid (DeepSeek-V3), its best one with softmax
    (DeepSeek-V2).
    """
    scores = logits_TE.sigmoid() if config.scoring_func == "sigmoid" else logits_TE.softmax(-1)
    choice = scores.detach() + bias_E
    if config.n_group > 1:
        grouped = choice.unflatten(-1, (config.n_group, -1))
        best = min(2, grouped.shape[-1]) if config.scoring_func == "sigmoid" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(-1, group_scores.topk(config.topk_group, dim=-1).indices, True)
        choice = grouped.masked_fill(~allowed[..., None], -math.inf).flatten(-2)
    experts = choice.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(-1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(logits_TE, scores, experts, weights * config.routed_scaling_factor)


def within_capacity(experts_BSk: Tensor, config: ModelConfig) -> Tensor:
    """Which choices, `[B, S, k]` bool, find room when an expert takes `ceil(factor * k * S / E)` tokens of a row.

    First choices go before second ones, earlier positions before later ones (GShard, algorithm 1, with a row as its
    group: the result does not depend on how rows are spread over devices). Documents packed into a row share its room.
    """
    assert config.capacity_factor is not None
    _, positions, per_token = experts_BSk.shape
    capacity = math.ceil(config.capacity_factor * per_token * positions / config.n_routed_experts)
    in_order = F.one_hot(experts_BSk.transpose(1, 2).flatten(1), config.n_routed_experts)  # [B, k*S, E]
    place = (in_order.cumsum(1) * in_order).sum(-1)
    return (place <= capacity).unflatten(1, (per_token, positions)).transpose(1, 2)


class Experts(nn.Module):
    """Routed experts as stacked weights `[E, in, out]`, multiplied group by group."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.expert_size
        if config.mlp_gated:
            self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.gated = config.mlp_gated
        self.activation, self.activation_name = ACTIVATIONS[config.hidden_act], config.hidden_act
        self.indices = range(experts)  # of these among all experts; expert parallelism keeps a part of them

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Expert e takes rows `ends[e-1]..ends[e]` of `x [R, D]`, which are sorted by expert."""
        x_RD = x_RD.to(compute_dtype(x_RD))
        up = self.multiply("up_proj", x_RD, ends_E)
        hidden = self.activation(self.multiply("gate_proj", x_RD, ends_E)) * up if self.gated else self.activation(up)
        return self.multiply("down_proj", hidden, ends_E)

    def serve_natively(self, x_TD: Tensor, routing: Routing) -> bool:
        """Whether no adapter and no other device has a part in these experts, and the C++ may run them."""
        size = routing.experts.numel() * x_TD.shape[-1]
        few = size <= few_rows.MAX_EXPERT_OUTPUTS
        return few and type(self) is Experts and few_rows.serves(x_TD, self.up_proj, few_rows.ANY)

    def of_few_rows(self, x_TD: Tensor, routing: Routing) -> Tensor:
        gate = self.gate_proj if self.gated else None
        chosen, weights = routing.experts, routing.weights
        return few_rows.experts(x_TD, chosen, weights, gate, self.up_proj, self.down_proj, self.activation_name)

    def can_run_few(self, x: Tensor) -> bool:
        """Whether `few` gives what `forward` would: on a CPU, without a gradient, autocast or an adapter."""
        return (
            type(self) is Experts
            and x.device.type == "cpu"
            and x.dtype == self.up_proj.dtype
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        )

    def few(self, x_RD: Tensor, runs: Runs) -> Tensor:
        """`forward` for few rows: row r of `x` is the expert's whose run it lies in."""
        up = mm_by_runs(x_RD, self.up_proj, runs)
        if self.gated:
            up *= self.activation(mm_by_runs(x_RD, self.gate_proj, runs))
        else:
            up = self.activation(up)
        return mm_by_runs(up, self.down_proj, runs)

    def multiply(self, name: str, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """The product with one of the stacks, in the data type of `x`; an adapter adds its own to it."""
        stack: Tensor = getattr(self, name)
        return grouped_mm(x_RD, stack.to(x_RD.dtype), ends_E)


def dispatch_locally(
    x_TD: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Sort token slots by expert, run the experts, put the results back in order, add them up by weight."""
    if experts.serve_natively(x_TD, routing):
        return experts.of_few_rows(x_TD, routing), meanwhile()
    if routing.experts.numel() <= FEW_SLOTS and experts.can_run_few(x_TD):
        return _few_tokens(x_TD, routing, experts), meanwhile()
    slots = SortedSlots(routing)
    out_RD = experts(slots.gather(x_TD), slots.counts_E.cumsum(0).to(torch.int32))
    return slots.combine(out_RD), meanwhile()


def _few_tokens(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The same for the few tokens of a decoding step, whose time goes into calls and not into sums."""
    per_token = routing.experts.shape[1]
    chosen = routing.experts.flatten().tolist()
    if len(x_TD) == 1:  # its experts differ, so each has one row, and the order is free
        runs = [(expert, row, row + 1) for row, expert in enumerate(chosen)]
        return routing.weights.to(x_TD.dtype) @ experts.few(x_TD.expand(per_token, -1), runs)
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    tokens_R = torch.tensor([slot // per_token for slot in order])
    out_RD = experts.few(x_TD.index_select(0, tokens_R), runs_of([chosen[slot] for slot in order]))
    out_SD = torch.empty_like(out_RD).index_copy_(0, torch.tensor(order), out_RD)
    weights_T1k = routing.weights.to(x_TD.dtype)[:, None]
    return torch.bmm(weights_T1k, out_SD.unflatten(0, (-1, per_token)))[:, 0]


class SortedSlots:
    """The T*k token slots of a routing, sorted by expert and within an expert by token."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.order_R, self.place_R = sorting(routing.experts.flatten())
        self.counts_E = expert_counts(routing.experts, routing.scores.shape[1])

    def gather(self, x_TD: Tensor) -> Tensor:
        """Every token once for each of its experts: `[R, D]`."""
        return Gather.apply(x_TD, self.order_R, self.place_R, self.routing.experts.shape[1])

    def combine(self, out_RD: Tensor) -> Tensor:
        """The experts' results back in the order of tokens, added up by weight: `[T, D]`."""
        out_TkD = Gather.apply(out_RD, self.place_R, self.order_R, 1).unflatten(0, self.routing.experts.shape)
        return (out_TkD * self.routing.weights[..., None].to(out_TkD.dtype)).sum(1)


def sorting(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sorted entry comes from, and where each entry goes: two permutations, inverse to each other."""
    order = keys.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class Gather(torch.autograd.Function):
    """Row `order[i] // copies` of x at place i. The gradient is a gather as well: deterministic, and no scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        back = grad.index_select(0, inverse)
        return back.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else back, None, None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The data type that matrix products run in here: autocast's when it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def expert_counts(experts_Tk: Tensor, num_experts: int, counted_T: Tensor | None = None) -> Tensor:
    """Tokens an expert, `[E]` int64; `counted [T]` leaves padding out."""
    chosen = torch.ones_like(experts_Tk) if counted_T is None else counted_T[:, None].expand_as(experts_Tk).long()
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=experts_Tk.device)
    return zeros.scatter_add(0, experts_Tk.flatten(), chosen.flatten())
