"""Which families of Hugging Face can hold a model, and what of it stands in the way of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.tools.interop.families import FAMILIES, Family

# Settings of ours without a meaning when no layer has experts.
OF_EXPERTS = (
    "moe_intermediate_size", "num_experts_per_tok", "n_shared_experts", "shared_expert_intermediate_size",
    "shared_expert_gate", "first_k_dense_replace", "mlp_only_layers", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
)  # fmt: skip
# What makes another kind of model: a family that differs there is further away than any other, the more in the latter.
KINDS = ("n_routed_experts", "kv_lora_rank")


def nearest_family(config: ModelConfig) -> Family:
    """The first family that holds the model exactly. If none does, raises UsageError naming what the nearest lack."""
    in_the_way = {family.model_type: obstacles(config, family) for family in FAMILIES}
    for family in FAMILIES:
        if not in_the_way[family.model_type]:
            return family
    least = min(map(_distance, in_the_way.values()))
    nearest: dict[str, list[str]] = {}
    for name, found in in_the_way.items():
        if _distance(found) == least:
            nearest.setdefault(", ".join(found.values()), []).append(name)
    said = "; ".join(f"{settings} ({', '.join(names)})" for settings, names in nearest.items())
    raise UsageError(f"no family of Hugging Face holds this model; what stands in the way of the nearest: {said}")


def _distance(found: Mapping[str, str]) -> tuple[list[bool], int]:
    return [kind in found for kind in reversed(KINDS)], len(found)


def obstacles(config: ModelConfig, family: Family) -> dict[str, str]:
    """The settings that a family has no place for, each with its value. Empty when the family holds the model."""
    sparse, latent = bool(config.moe_layers), config.kv_lora_rank is not None
    if latent != family.is_latent:
        return {"kv_lora_rank": f"kv_lora_rank={config.kv_lora_rank}"}  # and with it all of latent attention
    if sparse != family.has_experts:
        return {"n_routed_experts": f"n_routed_experts={config.n_routed_experts if sparse else 0}"}
    wanted, found = effective(config), effective(_forced(config, family))
    differing = {name: f"{name}={getattr(config, name)!r}" for name in wanted if found[name] != wanted[name]}
    if "n_shared_experts" in differing:
        differing.pop("shared_expert_intermediate_size", None)
    if "mlp_only_layers" in differing:
        differing["mlp_only_layers"] = f"experts in layers {config.moe_layers}"
    if family.has_shared_experts and sparse and not config.n_shared_experts:
        differing["n_shared_experts"] = "n_shared_experts=0"
    return differing


def known_limit(config: ModelConfig, family: Family) -> str | None:
    """Why the class of a family in `transformers` cannot run a model of a form that the family allows, where known."""
    if config.moe_layers and family.router_bias and config.n_routed_experts == config.n_group:
        groups = f"n_routed_experts={config.n_routed_experts} in n_group={config.n_group}"
        return f"{groups} leaves one expert a group, and its router adds up the best two of each"
    odd = [name for name in ("kv_lora_rank", "qk_nope_head_dim") if (getattr(config, name) or 0) % 2]
    if family.model_type == "deepseek_v2" and odd:
        return (
            f"{odd[0]}={getattr(config, odd[0])} is odd, and it reads the rotated entries behind them in aligned pairs"
        )
    if family.model_type in ("llama", "deepseek_v2") and config.hidden_size % config.num_attention_heads:
        sizes = f"hidden_size={config.hidden_size} is not divisible by num_attention_heads={config.num_attention_heads}"
        return f"{sizes}, which it demands with any head_dim"
    return None


def effective(config: ModelConfig) -> dict[str, Any]:
    """The settings that decide what a model computes, so that equal ones mean equal functions of equal weights.

    A capacity, which drops tokens while training, is none of them: models are used without one.
    """
    values = with_sizes(config) | {
        "capacity_factor": None,
        "n_shared_experts": min(1, config.n_shared_experts),
        "first_k_dense_replace": 0,
        "mlp_only_layers": config.moe_layers,
    }
    if config.kv_lora_rank is not None:
        values |= {"num_key_value_heads": None, "head_dim": None, "use_qk_norm": False}
    if not config.n_shared_experts:
        values["shared_expert_gate"] = False
    if config.n_group == 1:
        values["topk_group"] = 1
    if len(config.moe_layers) == config.num_hidden_layers:
        values["intermediate_size"] = None
    if not config.moe_layers:
        values |= {"n_routed_experts": 0, **dict.fromkeys(OF_EXPERTS)}
    return values


def with_sizes(config: ModelConfig) -> dict[str, Any]:
    """All settings; sizes that others give are written out."""
    return config.model_dump() | {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "moe_intermediate_size": config.expert_size,
        "shared_expert_intermediate_size": config.shared_width,
    }


def _forced(config: ModelConfig, family: Family) -> ModelConfig:
    """The model as the family would have it: its own settings, and the defaults of all that it has no key for."""
    ours = with_sizes(config) | {"rope_scaling": config.rope_scaling}
    values: dict[str, Any] = {name: field.get_default() for name, field in ModelConfig.model_fields.items()}
    values |= dict(family.always) | {name: ours[name] for name in family.rotary_settings}
    for key in family.keys:
        values |= dict.fromkeys(key.ours, ours[key.ours[-1]])
    dense = [layer for layer in range(config.num_hidden_layers) if not config.is_moe_layer(layer)]
    if family.dense_layers == "first":
        values["first_k_dense_replace"] = len(dense)
    if family.dense_layers in ("listed", "types"):
        values["mlp_only_layers"] = tuple(dense)
    if family.dense_layers == "interval":
        sparse = at_intervals(*interval_of(config.moe_layers))
        values["mlp_only_layers"] = tuple(layer for layer in range(config.num_hidden_layers) if layer not in sparse)
    return config.model_copy(update=values)


def at_intervals(start: int, end: int, every: int) -> set[int]:
    """The layers from `start` to `end`, both included, whose number counted from 1 is a multiple of `every`."""
    return {layer for layer in range(start, end + 1) if (layer + 1) % every == 0}


def interval_of(layers: Sequence[int]) -> tuple[int, int, int]:
    """Start, end and interval that give these layers, if any do."""
    if not layers:
        return 0, -1, 1
    return layers[0], layers[-1], layers[1] - layers[0] if len(layers) > 1 else 1
