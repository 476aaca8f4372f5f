"""On each of four ranks: the dispatcher of expert parallelism beside one process with all tokens and experts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.model.moe import Experts, Routing, dispatch_locally
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.expert_parallel import AllToAllDispatcher, Splits
from tests.tiny import random, tiny

TOKENS = (5, 0, 6, 1)  # of each rank
CHOICES: dict[str, list[list[int]]] = {  # of the eight experts, two on each rank, for every token
    "all on one rank": [[2 * (token % 4), 2 * (token % 4) + 1] for token in range(12)],
    "one on every rank": [[token % 2, 2, 5, 7 - token % 2] for token in range(12)],
    "none on rank 2": [[token % 4, 6 + token % 2, (token + 1) % 4] for token in range(12)],
    "all on rank 3": [[6, 7]] * 12,
}


class Recording(AllToAllDispatcher):
    def splits(self, *counts: object) -> Splits:
        self.last = super().splits(*counts)  # type: ignore[arg-type]
        return self.last


def dispatched(group: dist.ProcessGroup) -> dict[str, dict[str, object]]:
    """For every choice of experts the greatest relative difference that any rank of the group found, and the rows that
    each rank sent to each."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start = sum(TOKENS[:rank])
    my_tokens, my_experts = slice(start, start + TOKENS[rank]), slice(2 * rank, 2 * rank + 2)
    dispatcher = Recording(group, Exchange(torch.device("cpu")))
    found = {}
    for name, choices in CHOICES.items():
        mine = computed(choices, my_tokens, my_experts, dispatcher)
        worst = torch.zeros(())
        for key, whole in computed(choices, slice(None), slice(None)).items():
            part = whole[my_tokens if key in ("out", "x", "weights") else my_experts]
            assert mine[key].shape == part.shape
            if part.numel():
                worst = torch.maximum(worst, (mine[key] - part).abs().max() / whole.abs().max())
        dist.all_reduce(worst, dist.ReduceOp.MAX, group)
        sent = torch.zeros(ranks, ranks, dtype=torch.int64)
        sent[rank] = torch.tensor(dispatcher.last.sent)
        dist.all_reduce(sent, group=group)
        found[name] = {"difference": float(worst), "sent": sent.tolist()}
    return found


def computed(
    choices: list[list[int]], tokens: slice, kept: slice, dispatcher: AllToAllDispatcher | None = None
) -> dict[str, Tensor]:
    """Results for the tokens, and the gradients of the tokens, of their weights, and of the experts that are kept."""
    experts = Experts(tiny())
    for seed, (name, stack) in enumerate(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(random(*stack.shape, seed=seed)[kept].clone()))
    experts_Tk = torch.tensor(choices)
    x_TD = random(12, 32, seed=10)[tokens].clone().requires_grad_()
    weights_Tk = random(*experts_Tk.shape, seed=11).abs()[tokens].clone().requires_grad_()
    scores_TE = torch.zeros(len(x_TD), 8)
    dispatch = dispatcher or dispatch_locally
    out_TD, _ = dispatch(x_TD, Routing(scores_TE, scores_TE, experts_Tk[tokens], weights_Tk), experts, None)
    out_TD.backward(random(12, 32, seed=12)[tokens])
    named = {"x": x_TD, "weights": weights_Tk, **dict(experts.named_parameters())}
    gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    assert gradients.keys() == named.keys()
    return {"out": out_TD.detach(), **gradients}
