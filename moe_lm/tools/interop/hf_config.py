"""config.json of a family -> ModelConfig and back. A setting that the other cannot express is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from moe_lm.common.errors import UsageError
from moe_lm.config.model import MOST_LAYERS, ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.tools.interop.families import REQUIRED, WITHOUT_MEANING, Family, Key, family_of, known_families
from moe_lm.tools.interop.fitting import at_intervals, interval_of, obstacles, with_sizes
from moe_lm.tools.interop.fp8 import block_of

Values = dict[str, Any]
MOST = 1 << 31  # of a count or size
OF_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
OF_WINDOWS = ("sliding_window", "layer_types", "max_window_layers", "use_sliding_window")
OF_DENSE_LAYERS = {
    "first": ("first_k_dense_replace",),
    "listed": ("mlp_only_layers", "decoder_sparse_step"),
    "types": ("mlp_layer_types", "first_k_dense_replace"),
    "interval": ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
    "none": (),
}


class Read(NamedTuple):
    """A config.json as read."""

    family: Family
    config: ModelConfig
    unused: list[str]  # keys that were not understood, with their values


def read_config(hf: Mapping[str, Any], origin: str) -> Read:
    """The model that a config.json describes; `origin` names the file in errors.

    Raises UsageError for an unknown `model_type`, and for a key whose value this program or the family cannot express.
    """
    family = family_of(hf.get("model_type"))
    if family is None:
        raise UsageError(
            f"{origin}: model_type={hf.get('model_type')!r} is unknown; expected one of {known_families()}"
        )
    block_of(hf, origin)
    values: Values = dict(family.always)
    known = {*WITHOUT_MEANING, *OF_ROPE, *OF_WINDOWS, "quantization_config", *OF_DENSE_LAYERS[family.dense_layers]}
    for name, allowed in family.constants.items():
        known.add(name)
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if hf.get(name) is not None and hf[name] not in choices:
            raise _refused(origin, family, name, hf[name], " or ".join(repr(choice) for choice in choices))
    for key in family.keys:
        names = (key.theirs, *key.other_names)
        known.update(names)
        value = next((hf[name] for name in names if hf.get(name) is not None), key.default)
        if value is REQUIRED:
            raise UsageError(f"{origin} has no {key.theirs}, which a model of type {family.model_type} needs")
        _check_kind(value, key, origin)
        values.update(dict.fromkeys(key.ours, value))
    if family.has_shared_experts and values["n_shared_experts"] == 0:
        raise _refused(origin, family, "n_shared_experts", 0, "at least 1")
    values |= _read_rope(hf, family, origin)
    _check_full_attention(hf, values["num_hidden_layers"], values["max_position_embeddings"], family, origin)
    values |= _read_dense_layers(hf, family, values["num_hidden_layers"], origin)
    if family.model_type == "deepseek_v2" and hf.get("topk_method", "greedy") == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    if family.is_latent:
        known |= {"head_dim", "num_key_value_heads"}
        heads, expected = hf.get("num_key_value_heads"), values["num_attention_heads"]
        if heads not in (None, expected):
            raise _refused(origin, family, "num_key_value_heads", heads, f"num_attention_heads={expected}")
    config = build_config(ModelConfig, values, origin)
    return Read(family, config, [f"{name}={value!r:.60}" for name, value in hf.items() if name not in known])


def _check_kind(value: Any, key: Key, origin: str) -> None:
    """Raise UsageError for a value that is no whole number where our setting is one, or absurdly large."""
    whole = any(int in _kinds(ModelConfig.model_fields[name].annotation) for name in key.ours)
    most = MOST_LAYERS if key.theirs == "num_hidden_layers" else MOST
    if whole and value is not None and (type(value) is not int or not 0 <= value <= most):
        raise UsageError(f"{origin}: {key.theirs}={value!r:.40}, expected a whole number from 0 to {most}")


def _whole(hf: Mapping[str, Any], name: str, default: int, origin: str) -> int:
    _check_kind(hf.get(name), Key(name, ("hidden_size",)), origin)
    return default if hf.get(name) is None else int(hf[name])


def _items(hf: Mapping[str, Any], name: str, kind: type, origin: str) -> list[Any]:
    """The list of a key, empty when it is left out. Raises UsageError unless its items are of this kind."""
    items = hf.get(name)
    if items is not None and (not isinstance(items, list) or any(type(item) is not kind for item in items)):
        raise UsageError(f"{origin}: {name}={items!r:.60}, expected a list of {kind.__name__}")
    return items or []


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


def write_config(config: ModelConfig, family: Family) -> Values:
    """The config.json of a model in a family. Raises UsageError naming every setting that the family cannot hold."""
    in_the_way = obstacles(config, family)
    if in_the_way:
        settings = ", ".join(in_the_way.values())
        raise UsageError(f"the family {family.model_type} cannot hold a model with {settings}")
    ours = with_sizes(config)
    hf: Values = {"architectures": [family.architecture], "model_type": family.model_type}
    for key in family.keys:
        hf[key.theirs] = ours.get(key.ours[-1])
    for name, allowed in family.constants.items():
        hf[name] = allowed[0] if isinstance(allowed, tuple) else allowed
    if family.model_type == "deepseek_v2" and config.n_group == 1:
        hf["topk_method"] = "greedy"
    if config.kv_lora_rank is not None:
        hf["num_key_value_heads"] = config.num_attention_heads
    if family.sliding_window is not None:
        hf["sliding_window"] = None
    hf |= _write_rope(config, family) | _write_dense_layers(config, family)
    return hf


def _read_rope(hf: Mapping[str, Any], family: Family, origin: str) -> Values:
    """Read either form: `rope_parameters`, or, before transformers 5, `rope_theta` beside `rope_scaling`."""
    whole = family.partial_rotary_factor is None
    share = 1.0 if whole else family.partial_rotary_factor
    rope: Values = {"rope_theta": family.rope_theta, "partial_rotary_factor": share}
    rope |= {name: hf[name] for name in ("rope_theta", "partial_rotary_factor") if hf.get(name) is not None}
    for name in ("rope_scaling", "rope_parameters"):
        part = hf.get(name) or {}
        if not isinstance(part, Mapping):
            raise UsageError(f"{origin}: {name}={part!r} is not a table")
        rope |= {key: value for key, value in part.items() if value is not None}
    if family.rotary_dim and hf.get("rotary_dim") is not None:
        rope["partial_rotary_factor"] = _whole(hf, "rotary_dim", 0, origin) / (hf.get("head_dim") or math.inf)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    values = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    if whole and values["partial_rotary_factor"] != 1:
        raise _refused(origin, family, "partial_rotary_factor", values["partial_rotary_factor"], "1.0")
    if kind == "default":
        return values
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    return values | {"rope_scaling": {"rope_type": kind, **rope}}


def _write_rope(config: ModelConfig, family: Family) -> Values:
    """Write both forms, for readers old and new."""
    scaling = config.rope_scaling
    table = {"rope_type": "default"}
    if scaling is not None:
        table = scaling.model_dump(exclude_none=True, exclude_defaults=True)
    partial = {}
    if family.partial_rotary_factor is not None:
        partial = {"partial_rotary_factor": config.partial_rotary_factor}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else table,
        "rope_parameters": {"rope_theta": config.rope_theta, **partial, **table},
        **partial,
    }


def _check_full_attention(hf: Mapping[str, Any], layers: int, positions: int, family: Family, origin: str) -> None:
    kinds = _items(hf, "layer_types", str, origin)
    if kinds:
        if set(kinds) - {"full_attention"}:
            raise _refused(origin, family, "layer_types", sorted(set(kinds)), "full_attention in every layer")
    elif hf.get("use_sliding_window", True):
        window = _whole(hf, "sliding_window", 0, origin) if "sliding_window" in hf else family.sliding_window
        first = _whole(hf, "max_window_layers", 0, origin)
        if window and window < positions and first < layers and "use_sliding_window" not in family.constants:
            raise _refused(origin, family, "sliding_window", window, "null: every layer sees all positions")


def _read_dense_layers(hf: Mapping[str, Any], family: Family, layers: int, origin: str) -> Values:
    def listed(is_dense: Callable[[int], object]) -> Values:
        return {"mlp_only_layers": [layer for layer in range(layers) if is_dense(layer)]}

    match family.dense_layers:
        case "first":
            return {"first_k_dense_replace": _whole(hf, "first_k_dense_replace", 0, origin)}
        case "listed":
            every = _whole(hf, "decoder_sparse_step", 1, origin) or 1
            named = set(_items(hf, "mlp_only_layers", int, origin))
            return listed(lambda layer: layer in named or (layer + 1) % every)
        case "types":
            kinds = _items(hf, "mlp_layer_types", str, origin)
            if not kinds:
                return {"first_k_dense_replace": _whole(hf, "first_k_dense_replace", 1, origin)}
            if len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
                raise _refused(origin, family, "mlp_layer_types", kinds, f"dense or sparse for {layers} layers")
            return listed(lambda layer: kinds[layer] == "dense")
        case "interval":
            start, every = (_whole(hf, name, 1, origin) for name in ("moe_layer_start_index", "moe_layer_interval"))
            to_the_last = hf.get("moe_layer_end_index") == -1
            end = layers - 1 if to_the_last else _whole(hf, "moe_layer_end_index", layers - 1, origin)
            sparse = at_intervals(start, end, every or 1)
            return listed(lambda layer: layer not in sparse)
    return {}


def _write_dense_layers(config: ModelConfig, family: Family) -> Values:
    dense = [layer for layer in range(config.num_hidden_layers) if not config.is_moe_layer(layer)]
    match family.dense_layers:
        case "first":
            return {"first_k_dense_replace": len(dense)}
        case "listed":
            return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        case "types":
            kinds = ("dense" if layer in dense else "sparse" for layer in range(config.num_hidden_layers))
            return {"mlp_layer_types": list(kinds)}
        case "interval":
            return dict(zip(OF_DENSE_LAYERS["interval"], interval_of(config.moe_layers), strict=True))
    return {}


def _refused(origin: str, family: Family, name: str, value: object, expected: str) -> UsageError:
    return UsageError(
        f"{origin}: {name}={value!r} cannot be expressed here, expected {expected} of a {family.model_type}"
    )
