"""A model that is larger than one device: its layers on several devices, in the host's memory and on the disk.

Accelerate decides what goes where, and brings the weights of a layer to its device before it runs. Each tensor goes to
its place some rows at a time, so that none need be in the host's memory whole.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.kernels import kernels
from moe_lm.model.moe import logical_names
from moe_lm.model.transformer import LanguageModel, LayerDevices

WHOLE = ["Block"]  # a residual connection does not leave its device, and weights are used without their layer's forward
DISK = "disk"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in this order

Read = Callable[[str], Iterator[Tensor]]  # the rows of a parameter or buffer in order, by its name in the model


@dataclass(frozen=True)
class Spread:
    """The memory that each device may use, like `{"cpu": "4GiB", "0": "20GiB"}`, and a folder for the rest.

    Without `max_memory` a device may use what it has free.
    """

    max_memory: Mapping[str, str] | None = None
    offload_folder: Path | None = None


def spread_over_devices(model: LanguageModel, read: Read, spread: Spread) -> None:
    """Give a model on the meta device its weights, each where it fits; `read` knows them by their logical names.

    Raises UsageError for a device or size that does not exist, MoeLmError when the disk cannot take its share.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import set_module_tensor_to_device

    limits = _limits(spread.max_memory)
    folder = None if spread.offload_folder is None else _folder(model, spread.offload_folder)
    with _quiet():
        device_map = infer_auto_device_map(model, limits, no_split_module_classes=WHOLE)
    devices = [device for device in device_map.values() if device not in ("cpu", DISK)]
    main = torch.device(devices[0] if devices else "cpu")
    if folder is None and DISK in device_map.values():
        folder = _folder(model, None)
    buffers, index = dict(model.named_buffers()), dict[str, Any]()
    tied = model.config.tie_word_embeddings and _place_of(HEAD, device_map) == _place_of(EMBEDDING, device_map)
    for name, tensor in {**dict(model.named_parameters(remove_duplicate=False)), **buffers}.items():
        place = _place_of(name, device_map)
        if name == HEAD and tied and place != DISK:
            model.lm_head.weight = model.model.embed_tokens.weight
            continue
        if place == DISK and name not in buffers:
            assert folder is not None
            index[name] = _write(folder / f"{name}.dat", name, tensor, read)
        else:
            device = main if place == DISK else torch.device(place)
            set_module_tensor_to_device(model, name, device, value=_filled(name, tensor, device, read))
    kernels.apply(model, kernels.choose(main, decoding=True))  # before Accelerate wraps the forwards
    # Accelerate would take a state dict, whose names are the logical ones.
    on_host = {name: p for name, p in model.named_parameters() if p.device.type == "cpu" != main.type}
    with _quiet():
        dispatch_model(
            model,
            device_map,
            state_dict=on_host or None,
            main_device=devices[0] if devices else "cpu",
            offload_dir=folder if DISK in device_map.values() else None,
            offload_index=index or None,
            preload_module_classes=WHOLE,
        )
    runs = {name: main if place in ("cpu", DISK) else torch.device(place) for name, place in device_map.items()}
    layers = range(model.config.num_hidden_layers)
    model.layer_devices = LayerDevices(main, tuple(_place_of(f"model.layers.{layer}", runs) for layer in layers))


def _limits(given: Mapping[str, str] | None) -> dict[int | str, int]:
    """Bytes by device: those given, elsewhere all that are free."""
    from accelerate.utils import get_max_memory
    from accelerate.utils.modeling import convert_file_size_to_int

    limits: dict[int | str, int] = get_max_memory()
    for name, size in (given or {}).items():
        device = int(name) if name.isdigit() else name
        if device not in limits:
            there = ", ".join(map(str, limits))
            raise UsageError(f"--max-memory {name}={size} does not name a device of this machine; it has {there}")
        try:
            limits[device] = 0 if size == "0" else convert_file_size_to_int(size)
        except ValueError as error:
            raise UsageError(f"--max-memory {name}={size} is not a size; give it like {name}=4GiB") from error
    return limits


def _place_of(name: str, places: Mapping[str, Any]) -> Any:
    """The place of a parameter or module: that of its own name, or of a module around it."""
    return next(place for module, place in places.items() if not module or f"{name}.".startswith(f"{module}."))


def _folder(model: LanguageModel, parent: Path | None) -> Path:
    """A folder for the weights on the disk, deleted together with the model."""
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="moe-lm-offload-", dir=parent)
    except OSError as error:
        raise MoeLmError(f"--offload-folder {parent} cannot be written ({error.strerror}); give another one") from error
    weakref.finalize(model, temporary.cleanup)
    return Path(temporary.name)


def _write(file: Path, name: str, tensor: Tensor, read: Read) -> dict[str, Any]:
    """Put a tensor on the disk as Accelerate reads it; returns its entry in Accelerate's index."""
    try:
        with file.open("wb") as opened:
            for rows in _rows(name, read):
                opened.write(rows.to(tensor.dtype).contiguous().view(torch.uint8).numpy().data)
    except OSError as error:
        raise MoeLmError(
            f"{file} cannot be written ({error.strerror}); give a folder on a larger disk with --offload-folder"
        ) from error
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _rows(name: str, read: Read) -> Iterator[Tensor]:
    """The rows of a parameter; what is one stack here is several tensors to `read`, side by side."""
    for rows in zip(*map(read, logical_names(name)), strict=True):
        yield rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def _filled(name: str, tensor: Tensor, device: torch.device, read: Read) -> Tensor:
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    start = 0
    for rows in _rows(name, read):
        out[start : start + len(rows)] = rows
        start += len(rows)
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Accelerate's warning that weights are on the meta device, where they are meant to be."""
    logger = logging.getLogger("accelerate")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
