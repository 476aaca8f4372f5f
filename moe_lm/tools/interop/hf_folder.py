"""A Hugging Face folder: config.json, one safetensors file or several with an index, tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint.checkpoint import GENERATION
from moe_lm.checkpoint.safetensors_file import Stored, read_header
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import check_regular, read_regular

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MOST_JSON = 64 << 20  # bytes; the index of DeepSeek-V3 has 9 MB
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class HFFolder:
    """A folder's config and the rows of its tensors. Nothing in it is executed, and no file outside it is read.

    Raises UsageError when the folder does not exist or is of another kind.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UsageError(
                f"there is no folder {path}; give a folder with config.json and safetensors, or a name of the hub"
            )
        check_regular(path)
        self.path = path
        self.config = read_json(path / CONFIG)

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].weight_dtype

    def where(self, name: str) -> str:
        return str(self._tensors[name].file)

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        return self._tensors[name].rows(start, stop)[(slice(None), *across)]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({stored.file for stored in self._tensors.values()})

    def generation_config(self) -> str | None:
        """The text of generation_config.json, or None if there is no such file."""
        path = self.path / GENERATION
        return json.dumps(read_json(path), indent=2) if path.is_file() else None

    @cached_property
    def _tensors(self) -> dict[str, Stored]:
        if (self.path / INDEX).exists():
            return self._read_shards()
        if (self.path / SINGLE).exists():
            return read_header(self.path / SINGLE).tensors
        for name in PICKLES:
            if (self.path / name).exists():
                raise UsageError(f"{self.path} holds {name}, a pickle, which can run code and is not read; "
                                 "get or make the checkpoint as safetensors")  # fmt: skip
        raise UsageError(f"{self.path} holds no weights; expected {SINGLE}, or {INDEX} and the files that it names")

    def _read_shards(self) -> dict[str, Stored]:
        index = self.path / INDEX
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise MoeLmError(f"{index} has no weight_map from tensors to files; copy it again")
        found: dict[str, Stored] = {}
        for name in sorted(set(places.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise MoeLmError(f"{index} names the file {name!r}, expected a safetensors file in the same folder")
            path = self.path / name
            if not os.path.lexists(path):
                raise MoeLmError(f"{index} names {name}, which is missing; copy it again")
            tensors = read_header(path).tensors
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                raise MoeLmError(f"{path}: tensor {twice[0]} is in {found[twice[0]].file.name} too")
            found |= tensors
        for tensor, name in places.items():
            if tensor not in found or found[tensor].file.name != name:
                raise MoeLmError(f"{index} promises tensor {tensor} in {name}, which does not hold it; copy both again")
        return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file of at most MOST_JSON bytes. Raises UsageError naming what is wrong with it."""
    content = read_regular(path, MOST_JSON)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values
