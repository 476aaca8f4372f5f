"""What a command line asks of sampling."""

from __future__ import annotations

import secrets

from moe_lm.generate.decode import Settings
from moe_lm.generate.penalties import NO_PENALTIES, Penalties
from moe_lm.generate.strategies import Sampling


def settings_of(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    min_p: float | None = None,
    typical_p: float | None = None,
    penalties: Penalties = NO_PENALTIES,
    min_new_tokens: int = 0,
    logprobs: int | None = None,
    routing: bool = False,
) -> Settings:
    """What a command line asked for; without a seed one is drawn."""
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    sampling = Sampling(temperature, top_k, top_p, min_p, typical_p, penalties)
    return Settings(max_new_tokens, sampling, seed, min_new_tokens, logprobs, routing)
