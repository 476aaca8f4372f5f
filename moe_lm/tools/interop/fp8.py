"""Checkpoints in 8 bits, as DeepSeek-V3's weights are published: read in bfloat16.

A matrix W [out, in] is kept as Q in float8 e4m3, with a scale for each block of B0 x B1 entries, 128 x 128 as published
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2): S [ceil(out / B0), ceil(in / B1)], under W's name and `_scale_inv`.

    W[i, j] = bfloat16(float32(Q[i, j]) * S[i // B0, j // B1])

Blocks at the lower and the right edge may be smaller. What is not e4m3 (embeddings, norms, routers) is read as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.tools.interop.hf_folder import CONFIG, HFFolder
from moe_lm.tools.interop.hf_tensors import LAYER

FLOAT8, SCALE = "F8_E4M3", "_scale_inv"


def open_folder(path: Path) -> HFFolder:
    """A folder of Hugging Face, in 8 bits or not. Raises UsageError as `HFFolder` and `block_of` do."""
    folder = HFFolder(path)
    return folder if block_of(folder.config, str(path / CONFIG)) is None else FP8Folder(path)


def block_of(config: Mapping[str, Any], origin: str) -> tuple[int, int] | None:
    """The rows and columns of a block of a checkpoint in 8 bits, None for other checkpoints.

    Raises UsageError for a `quantization_config` of another kind; `origin` names the file.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if isinstance(given, Mapping):
        given = {name: given.get(name) for name in ("quant_method", "fmt", "weight_block_size")}
        method, form, block = given.values()
        sizes = block if isinstance(block, list) and all(type(size) is int and size > 0 for size in block) else []
        if method == "fp8" and form in (None, "e4m3", "float8_e4m3fn") and len(sizes) == 2:
            return sizes[0], sizes[1]
    raise UsageError(
        f"{origin}: quantization_config={given!r:.160} is not for import, expected quant_method='fp8', fmt='e4m3' and "
        "the two sizes of a block; take the checkpoint in bfloat16 or float32"
    )


class FP8Folder(HFFolder):
    """A folder whose matrices in 8 bits are read as bfloat16, some rows at a time."""

    def names(self) -> Iterable[str]:
        return self._tensors.keys() - {name + SCALE for name in self._in_8_bits}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor as it is read. Raises MoeLmError for a matrix in 8 bits without fitting scales."""
        if name not in self._in_8_bits:
            return super().dtype(name)
        shape, scale = self.shape(name), self._tensors.get(name + SCALE)
        expected = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=False))
        if len(shape) != 2 or scale is None or scale.shape != expected:
            there = "there is none" if scale is None else f"it is {list(scale.shape)}"
            raise MoeLmError(
                f"{self.where(name)}: tensor {name} is {list(shape)} in 8 bits, expected {name}{SCALE} "
                f"{list(expected)} beside it, but {there}; copy the checkpoint again"
            )
        super().dtype(name + SCALE)
        return torch.bfloat16

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        stored = super().rows(name, start, stop)
        if name in self._in_8_bits:
            rows, columns = self._block
            first = start // rows
            scale = super().rows(name + SCALE, first, -(-stop // rows)).float()
            scale = scale.repeat_interleave(rows, 0)[start - first * rows :][: stop - start]
            stored = stored.float().mul_(scale.repeat_interleave(columns, 1)[:, : stored.shape[1]]).bfloat16()
        return stored[(slice(None), *across)]

    def first_layers(self, layers: int) -> dict[str, Tensor]:
        """The whole tensors of the first `layers` layers, and those outside of any."""
        found = {name: LAYER.match(name) for name in self.names()}
        names = [name for name, layer in found.items() if layer is None or int(layer[1]) < layers]
        return {name: self.rows(name, 0, (self.shape(name) or (1,))[0]).view(self.shape(name)) for name in names}

    @cached_property
    def _block(self) -> tuple[int, int]:
        block = block_of(self.config, str(self.path / CONFIG))
        assert block is not None
        return block

    @cached_property
    def _in_8_bits(self) -> set[str]:
        return {name for name, stored in self._tensors.items() if stored.dtype_name == FLOAT8}
