"""Adapters in the format of `peft`: adapter_model.safetensors and adapter_config.json, in a folder of their own.

In this format an adapter is named after the layer of the published model that it adapts, and every routed expert is a
layer. Whatever the format, or `peft` itself, cannot express is refused; merged weights (`moe-lm export`) always work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_lm.checkpoint import checkpoint, lineage, write
from moe_lm.checkpoint.checkpoint import MODEL_PREFIX
from moe_lm.checkpoint.read import CheckpointTensors, TensorSource, open_own_tensors, open_tensors, read_model_config
from moe_lm.checkpoint.safetensors_file import read_header
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import check_regular, read_regular, whole_folder
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.reading import build_config, dump_config
from moe_lm.model import lora
from moe_lm.model.size import on_meta
from moe_lm.model.transformer import is_expert
from moe_lm.tools.interop.families import Family
from moe_lm.tools.interop.fitting import nearest_family
from moe_lm.tools.interop.hf_folder import read_json
from moe_lm.tools.interop.hf_tensors import ROUTER_BIAS, tensor_pairs

SETTINGS, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_fingerprint.txt"
PREFIX = "base_model.model."
# Keys of adapter_config.json that are read here or do not change the numbers. Any other key must be off.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
OFF: tuple[Any, ...] = (None, False, [], {}, "none", 0)


class Place(NamedTuple):
    """The place of a factor of ours in the file: the tensor `theirs`; for a stack, the transpose of one expert."""

    ours: str
    theirs: str
    expert: int | None
    shape: tuple[int, ...]  # of the tensor there


def export_adapter(run: Path, out: Path, base: Path | None = None, base_name: str | None = None) -> str:
    """Write `out` with the adapters of a run, and return a description of them.

    Their base is at `base` if it has moved; peft finds its export under `base_name`, a folder or a name on the hub.
    Raises UsageError when the run has no adapters, or has changed weights that the format does not hold.
    """
    folder = checkpoint.resolve(run)
    adapter = lineage.read_adapter(folder)
    if adapter is None:
        raise UsageError(
            f"{folder} holds a whole model and no adapters; leave --format out, or give one of the families"
        )
    beside = lineage.base_of(folder, base)
    model, own = read_model_config(folder), open_own_tensors(folder)
    family = nearest_family(model)
    _check_layers(own, model, family)
    _check_nothing_else_trained(own, open_tensors(beside))
    tensors: dict[str, Tensor] = {}
    for place in places(model, adapter.lora, family):
        factor = own.rows(place.ours, *_rows_of(own, place))
        tensors[place.theirs] = factor.contiguous() if place.expert is None else factor[0].T.contiguous()
    layers = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": adapter.lora.rank,
        # As alpha / rank: `peft` doubles the rank of experts that it fuses, which would change a root.
        "lora_alpha": lora.scale(adapter.lora) * adapter.lora.rank, "use_rslora": False,
        "lora_dropout": 0.0,  # theirs leaves out other inputs for every token, and cannot for experts
        "target_modules": layers, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "base_model_name_or_path": base_name,
    }  # fmt: skip
    with whole_folder(out) as unfinished:
        save_file(tensors, unfinished / TENSORS, {"format": "pt"})
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (unfinished / BASE).write_text(adapter.fingerprint + "\n", encoding="utf-8")
        _check_written(unfinished / TENSORS, tensors)
    where = "which --base-name would name" if base_name is None else f"to {base_name}"
    return (
        f"adapters of rank {adapter.lora.rank} in the names of {family.model_type}: {len(tensors)} tensors, for "
        f"{', '.join(layers)}\n"
        f"their base is {beside} (fingerprint {adapter.fingerprint}); peft needs its export, {where}"
    )


def import_adapter(source: Path, base: Path | None, run_dir: Path) -> str:
    """Make a run of adapters beside the model of `base`, and return a description of them.

    Layers that the file does not adapt get adapters that add nothing. Raises UsageError for a setting that only `peft`
    has, MoeLmError when the file does not fit the model or is damaged; nothing is left at `run_dir` then.
    """
    if base is None:
        raise UsageError(f"{source} holds an adapter; say with --base which run it stands beside")
    beside = checkpoint.resolve(base)
    model = read_model_config(beside)
    family = nearest_family(model)
    check_regular(source)
    settings = read_settings(read_json(source / SETTINGS), source / SETTINGS)
    fingerprint = lineage.fingerprint(beside)
    known = read_regular(source / BASE, 1 << 10).decode(errors="replace").strip() if (source / BASE).exists() else None
    if known is not None and not lineage.is_model(beside, known):
        raise UsageError(
            f"the adapters in {source} were trained beside a model with the fingerprint {known}, and {beside} is "
            f"another model (fingerprint {fingerprint}); give the model that they were trained beside"
        )
    header = read_header(source / TENSORS)
    by_name = {place.theirs: place for place in places(model, settings, family)}
    unknown = sorted(header.tensors.keys() - by_name.keys())
    if unknown:
        raise MoeLmError(
            f"{source / TENSORS} holds {len(unknown)} tensors that belong to no layer of {beside} in "
            f"{family.model_type}'s names: {', '.join(unknown[:5])}"
        )
    alone = [name for name in header.tensors if _other(name) not in header.tensors]
    if alone:
        raise MoeLmError(f"{source / TENSORS} holds {alone[0]} without {_other(alone[0])}; it is not whole")
    state = _empty(model, settings)
    for name, stored in header.tensors.items():
        place = by_name[name]
        if stored.shape != place.shape:
            raise MoeLmError(f"{source / TENSORS}: tensor {name} is {list(stored.shape)}, expected {list(place.shape)}")
        tensor = stored.rows(0, stored.shape[0]).float()
        if place.expert is None:
            state[place.ours].copy_(tensor)
        else:
            state[place.ours][place.expert].copy_(tensor.T)
    base_tensors = open_tensors(beside)
    for name in base_tensors.names():
        if name.endswith(ROUTER_BIAS):
            state[name] = base_tensors.rows(name, 0, base_tensors.shape(name)[0])
    files: dict[str, write.Content] = {
        "model.yaml": dump_config(model),
        "tokenizer": checkpoint.verified_path(beside, "tokenizer"),
        lineage.ADAPTER: lineage.describe_adapter(beside, settings),
    }
    with whole_folder(run_dir) as unfinished:
        write.save(unfinished / "checkpoints", 0, state, files)
    layers = sum("lora_A" in name for name in header.tensors)
    of_all = sum("lora_A" in name for name in by_name)
    return (
        f"adapters of rank {settings.rank} for {layers} of {of_all} layers, beside {beside} (fingerprint {fingerprint})"
    )


def read_settings(values: Mapping[str, Any], origin: Path) -> LoraConfig:
    """Our settings for an adapter_config.json. Raises UsageError naming the key that has no meaning here."""
    if values.get("peft_type") != "LORA":
        raise UsageError(f"{origin}: peft_type={values.get('peft_type')!r}, expected 'LORA'; merge it with peft first")
    for key, value in values.items():
        plain = key == "init_lora_weights" and value in (True, "gaussian")
        patterns = key in ("alpha_pattern", "rank_pattern") and value
        if (key not in UNDERSTOOD or patterns) and value not in OFF and not plain:
            raise UsageError(f"{origin}: {key}={value!r} has no meaning here; merge the adapter with peft first")
    known = {"rank": values.get("r"), "alpha": values.get("lora_alpha"), "dropout": values.get("lora_dropout", 0.0)}
    settings = build_config(LoraConfig, known, str(origin))
    if not values.get("use_rslora"):
        return settings
    # There the output is multiplied by alpha / sqrt(rank) (arXiv 2312.03732).
    return settings.model_copy(update={"alpha": settings.alpha * math.sqrt(settings.rank)})


def places(model: ModelConfig, settings: LoraConfig, family: Family) -> Iterator[Place]:
    """Every factor of adapters with these settings, and its tensors in the file."""
    factors = {name: tuple(tensor.shape) for name, tensor in _empty(model, settings, "meta").items()}
    for pair in tensor_pairs(model, family):
        for factor in lora.factors_of(pair.ours):
            if factor in factors:
                shape = factors[factor] if len(factors[factor]) == 2 else factors[factor][:0:-1]
                for part in pair.parts:
                    layer = part.name.removesuffix(".weight")
                    yield Place(factor, f"{PREFIX}{layer}.{factor[-6:]}.weight", part.expert, shape)


def _empty(model: ModelConfig, settings: LoraConfig, device: str = "cpu") -> dict[str, Tensor]:
    """The factors of adapters that add nothing."""
    built = on_meta(model)
    lora.add_adapters(built, settings)
    return {
        MODEL_PREFIX + name: torch.zeros(parameter.shape, device=device)
        for name, parameter in built.named_parameters()
        if lora.is_factor(name)
    }


def _other(factor: str) -> str:
    """The name of A for that of B, and of B for that of A."""
    letter, other = ("lora_A", "lora_B") if "lora_A" in factor else ("lora_B", "lora_A")
    return factor.replace(letter, other)


def _rows_of(own: CheckpointTensors, place: Place) -> tuple[int, int]:
    return (0, own.shape(place.ours)[0]) if place.expert is None else (place.expert, place.expert + 1)


def _check_layers(own: CheckpointTensors, model: ModelConfig, family: Family) -> None:
    """Raise UsageError for adapters that `peft` (0.21, with transformers 5) would silently load wrong."""
    of_experts = any(lora.is_factor(name) and is_expert(name) for name in own.names())
    of_others = any(lora.is_factor(name) and ".mlp." in name and not is_expert(name) for name in own.names())
    if model.moe_layers and of_others:
        raise UsageError(
            f"{own.folder} has adapters of dense layers or shared experts, whose names peft takes for routed experts; "
            "train with lora.targets=[attention, experts], or leave --format out for merged weights"
        )
    if family.model_type == "qwen2_moe" and of_experts:
        raise UsageError(
            f"{own.folder} has adapters of routed experts, which peft does not find in a qwen2_moe; train with "
            "lora.targets=[attention], or leave --format out for merged weights"
        )


def _check_nothing_else_trained(own: CheckpointTensors, base: TensorSource) -> None:
    """Raise UsageError for a router, or its bias, that differs from the base's."""
    for name in own.names():
        if lora.is_factor(name):
            continue
        whole = (0, own.shape(name)[0])
        if not torch.equal(own.rows(name, *whole), base.rows(name, *whole)):
            what = "train.balance.bias_update_rate=0" if name.endswith(ROUTER_BIAS) else "train.freeze_router=true"
            raise UsageError(
                f"{own.folder} has trained {name.removeprefix(MODEL_PREFIX)}, which peft's format does not hold; train "
                f"with {what}, or leave --format out for merged weights"
            )


def _check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise MoeLmError unless the file holds exactly these tensors."""
    header = read_header(path)
    same = header.tensors.keys() == tensors.keys() and all(
        torch.equal(stored.rows(0, stored.shape[0]), tensors[name]) for name, stored in header.tensors.items()
    )
    if not same:
        raise MoeLmError(f"{path} does not hold what was written to it; the disk or its file system is damaged")
