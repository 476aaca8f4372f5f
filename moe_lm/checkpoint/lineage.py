"""The model that a checkpoint descends from: the base of its adapters (LoRA), or the start of its training.

A checkpoint of adapters holds what was trained and names its base in `adapter.yaml`; it needs that base for good. A
run that trains all weights of another model on names its start in `start.yaml`. It needs the start again only to
recompute a lost reference of preference tuning. A model is known by a fingerprint, so it may be copied and moved, and
adapters are never merged into another model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.integrity import KINDS, checksum_of, kind_of
from moe_lm.config.model import LoraConfig
from moe_lm.config.moved import moved_along
from moe_lm.config.reading import build_config
from moe_lm.config.run import FinetuneConfig

ADAPTER, START = "adapter.yaml", "start.yaml"


def fingerprint(folder: Path, kind: str | None = None) -> str:
    """A digest of a checkpoint's model: of its shape, and of the checksums of its files of weights.

    The checksums are those of its manifest, or of another `kind`, which an older or newer version would have written.
    """

    def checksum(name: str) -> str:
        entry = entries[name]
        return str(entry[kind or kind_of(entry)]) if kind in (None, *entry) else checksum_of(folder / name, kind or "")

    entries = checkpoint.entries(folder)
    of_model = (f"{checkpoint.MODEL}/", "model.yaml", ADAPTER)
    names = [name for name in sorted(entries) if name.startswith(of_model)]
    return hashlib.sha256("".join(f"{checksum(name)} {name}\n" for name in names).encode()).hexdigest()[:16]


def is_model(folder: Path, known: str) -> bool:
    """Whether a checkpoint holds the model of a fingerprint, whichever kind of checksum that was made of."""
    return fingerprint(folder) == known or known in (fingerprint(folder, kind) for kind in KINDS)


# Adapters and their base


class Adapter(NamedTuple):
    """The content of `adapter.yaml`."""

    base: Path  # where the base was in training
    fingerprint: str  # of the base
    lora: LoraConfig


def read_adapter(folder: Path) -> Adapter | None:
    """The description of a checkpoint's adapters; None for a checkpoint of a whole model."""
    if ADAPTER not in checkpoint.entries(folder):
        return None
    values = checkpoint.read_section(folder, ADAPTER)
    base, known, lora = (values.get(name) for name in ("base", "fingerprint", "lora"))
    if not isinstance(base, str) or not isinstance(known, str) or not isinstance(lora, dict):
        raise MoeLmError(f"{folder}/{ADAPTER} does not name base, fingerprint and lora; copy the checkpoint again")
    return Adapter(Path(base), known, build_config(LoraConfig, lora, f"{folder}/{ADAPTER}"))


def describe_adapter(base: Path, settings: LoraConfig) -> str:
    """The text of `adapter.yaml`."""
    values = {"base": str(base.absolute()), "fingerprint": fingerprint(base), "lora": settings.model_dump(mode="json")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def base_of(folder: Path, elsewhere: Path | None = None) -> Path:
    """The base of a checkpoint of adapters: where it was in training, or `elsewhere` if it has moved.

    One that was moved along with the run of the adapters is found.
    Raises UsageError when there is no checkpoint at that path, or one of another model.
    """
    adapter = read_adapter(folder)
    if adapter is None:
        raise UsageError(f"{folder} holds a whole model, which needs no base; leave {elsewhere} out")
    if elsewhere is None and not adapter.base.is_dir():
        elsewhere = _moved_base(folder, adapter)
    if elsewhere is None and not adapter.base.is_dir():
        raise UsageError(
            f"the adapters in {folder} need their base {adapter.base} (fingerprint {adapter.fingerprint}), which is "
            "not there; say where it is now with --base, when training with start_from"
        )
    base = checkpoint.resolve(elsewhere or adapter.base)
    if not is_model(base, adapter.fingerprint):
        raise UsageError(
            f"the adapters in {folder} were trained beside {adapter.base} (fingerprint {adapter.fingerprint}), and "
            f"{base} is another model (fingerprint {fingerprint(base)}); give the model that they were trained beside"
        )
    return base


def _moved_base(folder: Path, adapter: Adapter) -> Path | None:
    """The checkpoint of a base that lies where `start_from` leads from the run of the adapters now."""
    if "config.yaml" not in checkpoint.entries(folder):
        return None
    values = moved_along(checkpoint.read_section(folder, "config.yaml"), folder.parent.parent)
    start = Path(str(values.get("start_from")))
    base = start / "checkpoints" / adapter.base.name
    return base if base.is_dir() else start if start.name == adapter.base.name and start.is_dir() else None


# The start of fine-tuning and of continued pretraining


class Start(NamedTuple):
    """The checkpoint that a run begins with, or goes on from."""

    folder: Path  # the checkpoint with its shape, tokenizer and first weights
    origin: Path  # the checkpoint that training began with
    fingerprint: str  # of the origin
    positions: dict[str, Any] | None = None  # of the origin: settings of its model that the run may have changed

    @property
    def is_new(self) -> bool:
        """Whether the run has no checkpoint of its own yet."""
        return self.folder.absolute() == self.origin

    @property
    def is_origin(self) -> bool:
        """Whether the weights in `folder` are those that training began with."""
        return is_model(self.folder, self.fingerprint)

    def describe(self) -> str:
        """The text of `start.yaml`."""
        about: dict[str, Any] = {"origin": str(self.origin), "fingerprint": self.fingerprint}
        if self.positions is not None:
            about["positions"] = self.positions
        return yaml.safe_dump(about, allow_unicode=True)


def find_start(config: FinetuneConfig) -> Start:
    """The start of the run of `config`. A run that goes on keeps its first start, even if `start_from` has changed.

    Raises UsageError when the base of adapters is missing, or `start_from` is another model.
    """
    newest = checkpoint.latest_readable(Path(config.run_dir) / "checkpoints")
    if newest is None:
        return _start_at(checkpoint.resolve(config.start_from))
    names = checkpoint.entries(newest)
    if ADAPTER in names and config.lora is not None:
        return _start_at(*_base(newest, config))
    start = find_first_start(config.run_dir, config.start_from)
    if config.preference is not None and not start.is_new:
        for place in (start.origin, config.start_from):
            if is_at(place, start.fingerprint):
                return _start_at(checkpoint.resolve(place), start.fingerprint)
    return start


def find_first_start(run_dir: Path, start_from: Path) -> Start:
    """The start of a run that trains all weights: the one that it began with, else `start_from`."""
    newest = checkpoint.latest_readable(Path(run_dir) / "checkpoints")
    if newest is None or START not in checkpoint.entries(newest):
        return _start_at(checkpoint.resolve(start_from))  # a run that began without is refused (train/settings.py)
    kept = checkpoint.read_section(newest, START)
    return Start(newest, Path(kept["origin"]), kept["fingerprint"], kept.get("positions"))


def is_at(place: Path, known: str) -> bool:
    """Whether `place` names a checkpoint with the model of this fingerprint."""
    return checkpoint.is_there(place) and is_model(checkpoint.resolve(place), known)


def lost_reference(start: Start) -> UsageError:
    """The error for a reference that must be computed when its model is gone."""
    return UsageError(
        f"the reference of this run is lost, and so is the model that it began with, {start.origin} (fingerprint "
        f"{start.fingerprint}), to compute it again; bring that back, or begin anew in another run_dir"
    )


def _start_at(folder: Path, known: str | None = None) -> Start:
    return Start(folder, folder.absolute(), known or fingerprint(folder))


def _base(newest: Path, config: FinetuneConfig) -> tuple[Path, str | None]:
    adapter = read_adapter(newest)
    old = checkpoint.read_section(newest, "config.yaml")
    moved = Path(old["start_from"]) != config.start_from or adapter is None or not adapter.base.is_dir()
    return base_of(newest, config.start_from if moved else None), adapter and adapter.fingerprint
