"""What goes through this program as it came: a published model's tensors for multi-token prediction (MTP).

DeepSeek-V3 (arXiv 2412.19437, section 2.2) predicts a second token with one more layer, `model.layers.61`; others call
theirs `mtp`. An import keeps these tensors beside the model (moe_lm/checkpoint/carried.py) with the keys of config.json
that announce them, and an export in the same family writes both again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, lineage
from moe_lm.checkpoint.carried import is_carrying
from moe_lm.checkpoint.checkpoint import CARRIED
from moe_lm.checkpoint.read import CheckpointTensors, TensorSource
from moe_lm.checkpoint.safetensors_file import read_header
from moe_lm.config.model import ModelConfig
from moe_lm.tools.interop.families import MTP_KEYS, Family
from moe_lm.tools.interop.hf_folder import HFFolder
from moe_lm.tools.interop.hf_tensors import LAYER, Part, TensorPair, some

PREFIX = f"{CARRIED}."
MTP = re.compile(r"(^|\.)mtp[._]")


class Carried(NamedTuple):
    """The tensors of a checkpoint that are none of the model's, and what an import knew of them."""

    source: TensorSource
    pairs: Sequence[TensorPair]
    family: str  # that they came with
    keys: Mapping[str, Any]  # of its config.json

    def __str__(self) -> str:
        names = [part.name for pair in self.pairs for part in pair.parts]
        return f"{len(names)} tensors for multi-token prediction ({some(names)})"


def find_carried(folder: HFFolder, pairs: Iterable[TensorPair], config: ModelConfig) -> list[TensorPair]:
    """The tensors for multi-token prediction in a folder, beside the `pairs` of its model."""
    of_model = {part.name for pair in pairs for part in pair.parts}
    names = sorted(name for name in folder.names() if name not in of_model and _is_for_prediction(name, config))
    return [TensorPair(PREFIX + name, folder.shape(name), (Part(name, folder.shape(name), None),)) for name in names]


def description(folder: HFFolder, family: Family) -> dict[str, str]:
    """What `read_carried` reads again, for the header of the files."""
    keys = {name: folder.config[name] for name in MTP_KEYS if name in folder.config}
    return {"family": family.model_type, "keys": json.dumps(keys)}


def read_carried(folder: Path, base: Path | None = None) -> Carried | None:
    """What a checkpoint carries, verified; for one of adapters, what their base carries."""
    while lineage.read_adapter(folder) is not None:
        folder, base = lineage.base_of(folder, base), None
    if not is_carrying(folder):
        return None
    files = [folder / name for name in checkpoint.verify(folder, CARRIED)]
    source = CheckpointTensors(folder, CARRIED)
    pairs = []
    for name in sorted(source.names()):
        shape = source.shape(name)
        pairs.append(TensorPair(name, shape, (Part(name.removeprefix(PREFIX), shape, None),)))
    said = read_header(files[0]).metadata
    return Carried(source, pairs, said["family"], json.loads(said["keys"]))


class WithCarried:
    """The tensors of a model and those that go along with it."""

    def __init__(self, model: TensorSource, carried: TensorSource) -> None:
        self._model, self._carried = model, carried

    def names(self) -> Iterable[str]:
        return {*self._model.names(), *self._carried.names()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype(name)

    def where(self, name: str) -> str:
        return self._of(name).where(name)

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        return self._of(name).rows(name, start, stop, *across)

    def _of(self, name: str) -> TensorSource:
        return self._carried if name.startswith(PREFIX) else self._model


def _is_for_prediction(name: str, config: ModelConfig) -> bool:
    layer = LAYER.match(name)
    return bool(MTP.search(name)) or (layer is not None and int(layer[1]) >= config.num_hidden_layers)
