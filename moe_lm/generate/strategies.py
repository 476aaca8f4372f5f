"""How the next token is chosen from logits: temperature, top-k, top-p, min-p, typical-p, and the draw.

Shapes: R rows, V vocabulary. Logits of -inf are tokens that are never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError
from moe_lm.config.generation import SamplingConfig
from moe_lm.generate.penalties import Text, penalised, penalises


class Sampling(SamplingConfig):
    """Penalties, temperature, top-k, top-p, min-p, typical, in this order and each where it is set, then a draw.

    temperature: 0 is greedy, whatever the others are.
    top_k: choose among this many likeliest tokens; more than the vocabulary means all of it.
    top_p: choose among the likeliest tokens that together have this probability (arXiv 1904.09751), at least one.
    min_p: choose among tokens at least this share as likely as the likeliest (arXiv 2407.01082).
    typical_p: choose among the tokens whose surprise is nearest to its expectation and that together have this
    probability (arXiv 2202.00666), at least one.
    """

    @classmethod
    def of(cls, config: SamplingConfig) -> Sampling:
        """The strategy in a section that has more fields than these."""
        return cls(**{name: getattr(config, name) for name in SamplingConfig.model_fields})

    def __call__(self, logits_RV: Tensor, generators: Sequence[torch.Generator], texts: Sequence[Text] = ()) -> Tensor:
        """The chosen token of each row, `[R]` int64.

        Each row draws once from its own CPU generator, so that its token does not depend on the other rows; greedy
        choice draws nothing. The penalties read `texts`; -1 stands where they leave no token. Raises MoeLmError for
        logits that are not a distribution (NaN, +inf, or -inf everywhere).
        """
        check_logits(logits_RV)
        changed = penalises(self) or any(text.forbidden for text in texts)
        if self.temperature == 0 and not changed:
            return greedy(logits_RV)
        # In float64, so that rounding moves neither the edge of a top-p set nor a rare token's chance.
        logits_RV = logits_RV.cpu().double() if logits_RV.device.type == "mps" else logits_RV.double()
        if not changed:
            return draw(self.kept(logits_RV), generators)
        logits_RV = penalised(logits_RV, self, texts or [Text(())] * len(logits_RV))
        tokens_R = greedy(logits_RV) if self.temperature == 0 else draw(self.kept(logits_RV), generators)
        return tokens_R.masked_fill(logits_RV.amax(-1) == -math.inf, -1)

    def kept(self, logits_RV: Tensor) -> Tensor:
        """The logits that are drawn from, at a `temperature` above 0 and after the penalties."""
        logits_RV = with_temperature(logits_RV, self.temperature)
        if self.top_k is not None:
            logits_RV = keep_top_k(logits_RV, self.top_k)
        if self.top_p is not None:
            logits_RV = keep_top_p(logits_RV, self.top_p)
        if self.min_p is not None:
            logits_RV = keep_min_p(logits_RV, self.min_p)
        if self.typical_p is not None:
            logits_RV = keep_typical(logits_RV, self.typical_p)
        return logits_RV


GREEDY = Sampling(temperature=0.0)


def greedy(logits_RV: Tensor) -> Tensor:
    """The likeliest token of each row `[R]`; of equals the one with the smallest id."""
    return logits_RV.argmax(-1)


def with_temperature(logits_RV: Tensor, temperature: float) -> Tensor:
    """Logits over `temperature` > 0, shifted to a maximum of 0, so that no temperature is small enough to overflow."""
    return (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits_RV: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens of each row: exactly that many, also among equals."""
    best = logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1)
    return torch.full_like(logits_RV, -math.inf).scatter(-1, best.indices, best.values)


def keep_top_p(logits_RV: Tensor, top_p: float) -> Tensor:
    """-inf for all but the smallest set of likeliest tokens whose probability reaches `top_p`; at least one."""
    return _keep_until(top_p, logits_RV, -logits_RV)


def keep_min_p(logits_RV: Tensor, min_p: float) -> Tensor:
    """-inf for tokens less than `min_p` times as likely as the likeliest."""
    if min_p == 0:
        return logits_RV
    return logits_RV.masked_fill(logits_RV < logits_RV.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def keep_typical(logits_RV: Tensor, typical_p: float) -> Tensor:
    """-inf for all but the smallest set of most typical tokens whose probability reaches `typical_p`; at least one.

    How typical a token is: |entropy + ln p| (arXiv 2202.00666, equation 5), smaller is more.
    """
    log_p = logits_RV.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nansum(-1, keepdim=True)
    return _keep_until(typical_p, logits_RV, (entropy + log_p).abs())


def _keep_until(mass: float, logits_RV: Tensor, rank_RV: Tensor) -> Tensor:
    """-inf for all but the first tokens, by ascending `rank`, that together reach a probability of `mass`."""
    if mass == 1:
        return logits_RV  # a sum of rounded probabilities can reach 1 before the last token
    order = rank_RV.argsort(dim=-1, stable=True)
    ordered = logits_RV.gather(-1, order)
    reached = ordered.softmax(-1).cumsum(-1)
    superfluous = torch.zeros_like(reached, dtype=torch.bool)
    superfluous[:, 1:] = reached[:, :-1] >= mass
    return torch.full_like(logits_RV, -math.inf).scatter(-1, order, ordered.masked_fill(superfluous, -math.inf))


def draw(logits_RV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row `[R]` with its softmax probability, each row's from its own generator."""
    uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return token_at(logits_RV, uniform)


def token_at(logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The inverse of each row's distribution at a number of [0, 1): `[R]`."""
    reached = logits_RV.softmax(-1).cumsum(-1)
    # 1 - uniform is in (0, 1]: the first token that reaches it always exists and never has probability 0.
    wanted = (1 - uniform_R).to(reached.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, wanted)[:, 0]


def check_logits(logits_RV: Tensor) -> None:
    """Raise MoeLmError unless every row is a distribution."""
    broken_R = ~logits_RV.amax(-1).isfinite()
    if broken_R.any():
        row = int(broken_R.nonzero()[0])
        raise MoeLmError(
            f"the model's logits are not numbers (row {row}: largest {float(logits_RV[row].amax())}), so no token can "
            "be chosen; its weights are damaged or its training diverged, use an earlier checkpoint"
        )
