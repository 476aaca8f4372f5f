"""The tensors of a checkpoint: safetensors in a folder, of which every rank writes a share and reads what it needs.

`torch.distributed.checkpoint` does it: plain tensors in one process, DTensors and plain ones over any number of ranks,
so that what one layout wrote another reads. Its safetensors storage is the one without a pickled `.metadata`. Of a
tensor that several ranks hold alike, the rank with the least to write writes it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard

from moe_lm.common.errors import MoeLmError
from moe_lm.parallel.logical import host_copy
from moe_lm.parallel.process_group import Ranks

MAX_FILE_BYTES = 1 << 30  # a file is serialised in memory before it is written

# One process needs no process group. Once and for all: what `warnings.catch_warnings` does is not for threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@torch.no_grad()
def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in the host's memory of this rank's part of every tensor, which training does not change."""
    return {name: _with_local(tensor, host_copy) for name, tensor in state.items()}


@torch.no_grad()
def write(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write safetensors into `folder`, each rank its share. Raises CheckpointException on every rank alike."""
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True)
    dcp.save(_storable(tensors), storage_writer=writer, process_group=ranks.group)


def written_by(folder: Path, rank: int) -> list[Path]:
    """The files that a rank wrote into `folder`."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def read(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill `tensors` in place, converted to their dtype. Raises MoeLmError on every rank alike."""
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), process_group=ranks.group)
    except CheckpointException as error:
        raise MoeLmError(f"cannot read {folder}: {reason(error)}") from error


def check(folder: Path, tensors: Mapping[str, Tensor], others_too: bool) -> None:
    """Raise MoeLmError unless the headers in `folder` promise every tensor, whole and in its shape.

    Further tensors are refused unless `others_too`.
    """
    saved = saved_tensors(folder)
    for name, tensor in tensors.items():
        if name not in saved:
            raise MoeLmError(
                f"the checkpoint {folder.parent} has no tensor {name}; the model or optimizer settings differ from "
                "those it was trained with"
            )
        shape = tuple(saved[name].size)
        if shape != tuple(tensor.shape):
            raise MoeLmError(
                f"tensor {name} is {list(shape)} in the checkpoint {folder.parent}, expected {list(tensor.shape)}; the "
                "model settings differ from those it was trained with"
            )
        if sum(chunk.sizes.numel() for chunk in saved[name].chunks) != tensor.numel():
            raise MoeLmError(f"the checkpoint {folder.parent} holds only a part of tensor {name}")
    unused = saved.keys() - tensors.keys()
    if unused and not others_too:
        raise MoeLmError(
            f"the checkpoint {folder.parent} has the tensor {min(unused)}, which this model lacks; the model settings "
            "differ from those it was trained with"
        )


def saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What the headers of the files in `folder` say of each tensor. Raises MoeLmError when they cannot be read."""
    try:
        headers = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except FileNotFoundError:
        return {}
    except Exception as error:  # whatever a malformed header with a right checksum makes the libraries raise
        raise MoeLmError(f"cannot read the tensors in {folder}: {error}") from error
    return {name: header for name, header in headers.items() if isinstance(header, TensorStorageMetadata)}


def piece_places(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """Where the pieces of divided tensors begin, from the texts in a file's header; empty where none is divided."""
    info = json.loads(metadata.get(CUSTOM_METADATA_KEY, "{}"))
    return {name: entry[SAVED_OFFSETS_KEY] for name, entry in info.items()}


def reason(error: BaseException) -> str:
    """What to tell the user. An interrupt, which DCP wraps like a failure, goes on as one."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
        if not isinstance(error, Exception):
            raise error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return str(error) or type(error).__name__


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that takes each tensor; a rank's share of a file stays below the limit."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = math.ceil(tensor.numel() / _pieces(tensor)) * tensor.element_size()
        if filled and filled + size > MAX_FILE_BYTES:
            number, filled = number + 1, 0
        filled += size
        numbers[name] = number
    return numbers


def _pieces(tensor: Tensor) -> int:
    """How many pieces the ranks have divided a tensor into."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(place) for place, kind in enumerate(tensor.placements) if isinstance(kind, Shard))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, each in memory of its own: safetensors refuses tied weights, which are two names of one tensor."""
    addresses = set()

    def own(local: Tensor) -> Tensor:
        local = local.detach().contiguous()
        if local.data_ptr() in addresses:
            return local.clone()
        addresses.add(local.data_ptr())
        return local

    return {name: _with_local(tensor, own) for name, tensor in tensors.items()}


def _with_local(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor with this rank's part changed, which keeps its shape."""
    if not isinstance(tensor, DTensor):
        return change(tensor)
    return DTensor.from_local(
        change(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
