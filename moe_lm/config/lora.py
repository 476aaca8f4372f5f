"""What stands beside the weights of a model while adapters are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_lm.config.section import Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), which are trained in place of the weights that they stand beside."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0, description="an adapter's output is multiplied by alpha / rank")
    rank_stabilised: bool = Field(default=False, description="by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of an adapter's inputs; the same for a whole step")
    targets: tuple[Literal["attention", "feed_forward", "experts"], ...] | None = Field(
        default=None, min_length=1, description="feed_forward: dense layers and shared experts; None: all there are"
    )
