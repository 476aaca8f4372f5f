"""Checkpoints of adapters (LoRA): they hold what was trained, and in `adapter.yaml` say which base it belongs to.

A base is known by the checksums of its weights, so it may be copied and moved; adapters never meet another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig
from moe_lm.config.reading import build_config
from moe_lm.model import lora
from moe_lm.parallel.logical import kept_here, room_beside

FILE = "adapter.yaml"


class Adapter(NamedTuple):
    """What a checkpoint of adapters says of itself."""

    base: Path  # where the base was
    fingerprint: str  # what it was
    lora: LoraConfig


def read(folder: Path) -> Adapter | None:
    """None for a checkpoint of a whole model."""
    if FILE not in checkpoint.checksums(folder):
        return None
    values = yaml.safe_load(checkpoint.read_text(folder, FILE))
    settings = build_config(LoraConfig, values["lora"], f"{folder}/{FILE}", saved=True)
    return Adapter(Path(values["base"]), values["fingerprint"], settings)


def describe(base: Path, settings: LoraConfig) -> str:
    """The content of `adapter.yaml`."""
    values = {"base": str(base.absolute()), "fingerprint": fingerprint(base), "lora": settings.model_dump(mode="json")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def fingerprint(folder: Path) -> str:
    """What tells the model of a checkpoint from any other: a digest of its shape and of the files of its weights."""
    lines = [
        f"{checksum} {name}\n"
        for name, checksum in sorted(checkpoint.checksums(folder).items())
        if name.startswith(f"{checkpoint.MODEL}/") or name in ("model.yaml", FILE)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def base_of(folder: Path, elsewhere: Path | None = None) -> Path:
    """The base of a checkpoint of adapters: where it was, or `elsewhere` when it has moved.

    Raises UsageError when it is not there, or when what is there is another model.
    """
    adapter = read(folder)
    if adapter is None:
        raise UsageError(f"{folder} holds a whole model, which needs no base; leave {elsewhere} out")
    if elsewhere is None and not adapter.base.is_dir():
        raise UsageError(
            f"the adapters in {folder} need their base {adapter.base} (fingerprint {adapter.fingerprint}), which is "
            "not there; say where it is now with --base, when training with start_from"
        )
    base = checkpoint.resolve(elsewhere or adapter.base)
    if (found := fingerprint(base)) != adapter.fingerprint:
        raise UsageError(
            f"the adapters in {folder} were trained beside {adapter.base} (fingerprint {adapter.fingerprint}), and "
            f"{base} is another model (fingerprint {found}); give the one that they were trained beside"
        )
    return base


def load_weights(folder: Path, tensors: Mapping[str, Tensor], elsewhere: Path | None = None) -> None:
    """Fill a model's tensors, named `model.*`, in place: those of a checkpoint, adapters merged into their base.

    Every rank calls this; what ranks divide is a DTensor. Raises as `base_of` and `checkpoint.load` do.
    """
    if elsewhere is None and read(folder) is None:
        checkpoint.load_model_weights(folder, tensors)
        return
    load_weights(base_of(folder, elsewhere), tensors)
    adapter = read(folder)
    assert adapter is not None
    trained = {name: tensors[name] for name in checkpoint.headers(folder) if name in tensors}
    factors = {}
    for name, header in checkpoint.headers(folder).items():
        if lora.is_factor(name) and lora.adapted(name) in tensors:
            factors[name] = room_beside(tensors[lora.adapted(name)], header)
    checkpoint.load_model_weights(folder, trained | factors)
    for name in tensors:
        if name not in trained:
            _merge(name, kept_here(tensors[name]), {key: kept_here(tensor) for key, tensor in factors.items()}, adapter)


@torch.no_grad()
def _merge(name: str, weight: Tensor, factors: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Add the adapter of a weight, if it has one."""
    lora_A, lora_B = map(factors.get, lora.factors_of(name))
    if lora_A is not None and lora_B is not None:
        lora.merge(weight, lora_A.to(weight.dtype), lora_B.to(weight.dtype), lora.scale(adapter.lora))
