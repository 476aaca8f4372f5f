"""Which model a fine-tuning run began with. Every checkpoint says it, so that a run goes on whatever became of that.

Adapters say it in `adapter.yaml` and need their base for good. A run of all weights says it in `start.yaml` and needs
it no more, unless a lost reference of preference tuning has to be computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from moe_lm.checkpoint import adapters, checkpoint
from moe_lm.common.errors import UsageError
from moe_lm.config.run import FinetuneConfig

FILE = "start.yaml"


class Start(NamedTuple):
    """Where a run begins, or goes on."""

    folder: Path  # the checkpoint with its shape, tokenizer and first weights
    origin: Path  # the one that training began with
    fingerprint: str  # what that was

    @property
    def is_origin(self) -> bool:
        """Whether the weights in `folder` are those that training began with."""
        return adapters.fingerprint(self.folder) == self.fingerprint

    def describe(self) -> str:
        """The content of `start.yaml`."""
        return yaml.safe_dump({"origin": str(self.origin), "fingerprint": self.fingerprint}, allow_unicode=True)


def find_start(config: FinetuneConfig) -> Start:
    """Where the run of `config` begins; of one that goes on, what it began with, even if `start_from` has moved on.

    Raises UsageError when the base of adapters is not there any more, or `start_from` is not it.
    """
    newest = checkpoint.latest(Path(config.run_dir) / "checkpoints")
    if newest is None:
        return _begin(checkpoint.resolve(config.start_from))
    names = checkpoint.checksums(newest)
    if adapters.FILE in names and config.lora is not None:
        return _begin(_base(newest, config))
    if FILE not in names:  # not one of fine-tuning's; `check_unchanged` says what differs
        return _begin(checkpoint.resolve(config.start_from))
    kept = yaml.safe_load(checkpoint.read_text(newest, FILE))
    origin, fingerprint = Path(kept["origin"]), kept["fingerprint"]
    if config.preference is not None:
        for place in (origin, config.start_from):
            start = _begin(checkpoint.resolve(place)) if checkpoint.is_there(place) else None
            if start is not None and start.fingerprint == fingerprint:
                return start
    return Start(newest, origin, fingerprint)


def _begin(folder: Path) -> Start:
    return Start(folder, folder.absolute(), adapters.fingerprint(folder))


def _base(newest: Path, config: FinetuneConfig) -> Path:
    adapter = adapters.read(newest)
    old = yaml.safe_load(checkpoint.read_text(newest, "config.yaml"))
    moved = Path(old["start_from"]) != config.start_from or adapter is None or not adapter.base.is_dir()
    return adapters.base_of(newest, config.start_from if moved else None)


def lost_reference(start: Start) -> UsageError:
    """When the reference is to be computed, and the model that it belongs to is not there."""
    return UsageError(
        f"the reference of this run is lost, and so is the model that it began with, {start.origin} (fingerprint "
        f"{start.fingerprint}), to compute it again; bring that back, or begin anew in another run_dir"
    )
