"""Layers that are alike: a model with two of each kind stands for one with many."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lm.config.model import ModelConfig

TRACED = 2  # of a kind: the passes differ at the first one and at the last


@dataclass(frozen=True)
class Layers:
    """A config with few layers, and how many of the whole model's each of them stands for."""

    config: ModelConfig
    copies: tuple[int, ...]
    moe_layers: int = 0  # of the whole model
    traced_moe_layers: int = 0

    def of(self, layer: int | None) -> int:
        """The layers that a traced one stands for; 1 for what is outside of all layers."""
        return 1 if layer is None else self.copies[layer]


def reduced(config: ModelConfig, traced: int = TRACED) -> Layers:
    """Keep at most `traced` layers of each kind, the dense ones first. The last of a kind stands for the others too."""
    moe, dense = len(config.moe_layers), config.num_hidden_layers - len(config.moe_layers)
    kept_dense, kept_moe = min(dense, traced), min(moe, traced)
    copies = [1] * (kept_dense + kept_moe)
    if kept_dense:
        copies[kept_dense - 1] += dense - kept_dense
    if kept_moe:
        copies[-1] += moe - kept_moe
    changes: dict[str, object] = {"num_hidden_layers": kept_dense + kept_moe}
    if config.n_routed_experts:
        changes |= {"first_k_dense_replace": kept_dense, "mlp_only_layers": ()}
    return Layers(ModelConfig.model_validate(config.model_dump() | changes), tuple(copies), moe, kept_moe)
