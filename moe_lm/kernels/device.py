"""The device to compute on, the data type, and what compiling needs."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from moe_lm.common.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(wanted: str) -> torch.device:
    """`auto` prefers CUDA, then MPS, then the CPU. Raises UsageError for a device that is not there.

    CUDA is not used before it has been picked, so its allocator gets its setting here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(kind for kind, there in available.items() if there)
    if not available.get(wanted):
        choices = ", ".join(["auto", *(kind for kind, there in available.items() if there)])
        raise UsageError(f"device {wanted!r} is not available on this machine; choose one of {choices}")
    if wanted == "cuda":
        grow_segments()
    return torch.device(wanted)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has instructions for it; elsewhere bfloat16 is slower than float32."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def grow_segments() -> None:
    """Have CUDA's allocator let its segments grow; what a person has set is left as it is.

    The allocator reads this when CUDA is first used, if only for the device's properties. Experts get other numbers of
    tokens in every step, and segments of fixed size would break up into pieces.
    """
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def compiling_needs(device: torch.device) -> str | None:
    """The thing that `torch.compile` lacks here, or None. It builds with a C++ compiler against Python's headers."""
    if device.type not in ("cpu", "cuda"):
        return f"a CPU or CUDA device, not {device.type}"
    compilers = [os.environ.get("CXX") or "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return "a C++ compiler (Debian: apt-get install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Debian: apt-get install python3-dev)"
    return None
