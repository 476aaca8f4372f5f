"""Which attention kernels serve on this machine: tried once a process, by importing them.

A package may be installed and not serve. flash-attn-4 alone leaves a `flash_attn` without the functions of version 2; a
wheel that was built for another torch fails when it is loaded; a kernel is made for some generations of GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from moe_lm.common.errors import UsageError
from moe_lm.kernels import cpu_attention
from moe_lm.kernels.native import build

# The attention kernels of a kind of device, the fastest first. The last one serves everywhere.
BY_SPEED: dict[str, tuple[str, ...]] = {
    "cuda": ("flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_varlen", "plain"),
    "cpu": ("cpp", "segments", "plain"),
}
SETTING = "parallel.attention_kernel"


class Package(NamedTuple):
    """What brings a kernel; `majors` are the first numbers of the compute capabilities that it is made for."""

    load: Callable[[], object]  # raises what keeps the kernel from serving
    module: str
    majors: Collection[int]
    install: str


class Lack(NamedTuple):
    """Why a kernel does not serve; `installed` says that its package is there all the same."""

    why: str
    installed: bool


class Inputs(NamedTuple):
    """What attention is given: a data type, and the head sizes of keys and of values."""

    dtype: torch.dtype
    head_sizes: tuple[int, int]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} and head sizes of {' and '.join(map(str, self.head_sizes))}"


def pick(
    device_type: str, wanted: str = "auto", simulated: Collection[str] | None = None, inputs: Inputs | None = None
) -> str:
    """The fastest attention kernel that serves, or the wanted one; puts FlashAttention 3 and 4 in their place.

    `simulated` are the kernels of a device that is not there; then nothing is imported. Raises UsageError for a wanted
    kernel that does not serve, or not for the inputs.
    """
    kernels = BY_SPEED.get(device_type, ("plain",))
    if wanted != "auto" and wanted not in kernels:
        known = ", ".join(("auto", *kernels))
        raise UsageError(f"{SETTING}={wanted} does not run on {device_type}; choose one of {known}", common=True)
    if inputs is not None:
        if taken := demand(wanted, inputs):
            raise UsageError(
                f"{SETTING}={wanted} takes {taken}, and this run has {inputs}; set {SETTING}=auto", common=True
            )
        kernels = tuple(name for name in kernels if demand(name, inputs) is None)
    if simulated is not None:
        return wanted if wanted != "auto" else next(name for name in kernels if name in simulated or name == "plain")
    if wanted != "auto" and (found := lack(wanted)):
        install = PACKAGES[wanted].install
        raise UsageError(f"{SETTING}={wanted} does not serve here: {found.why}; {install}, or set {SETTING}=auto")
    name = wanted if wanted != "auto" else next(name for name in kernels if lack(name) is None)
    if device_type == "cuda":
        _switch(SWITCHES.get(name))
    return name


def passed_over(device_type: str, chosen: str) -> list[str]:
    """A sentence for each faster kernel that is installed and does not serve."""
    kernels = BY_SPEED.get(device_type, ("plain",))
    lacks = {name: lack(name) for name in kernels[: kernels.index(chosen)]}
    return [
        f"attention kernel {name} is installed and does not serve: {found.why}; {chosen} serves instead"
        for name, found in lacks.items()
        if found is not None and found.installed
    ]


def demand(name: str, inputs: Inputs) -> str | None:
    """What a kernel takes in place of these inputs, or None if it takes them."""
    dtype, head_sizes = inputs
    if name == "cpp" and (dtype != torch.bfloat16 or any(size % cpu_attention.LANES for size in head_sizes)):
        return f"bfloat16 and head sizes that are multiples of {cpu_attention.LANES}"
    if name in BY_SPEED["cuda"][:-1] and dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 or float16"
    return None


@functools.cache
def lack(name: str) -> Lack | None:
    """Why a kernel does not serve here, or None if it does. Without a GPU, importing alone decides."""
    package = PACKAGES.get(name)
    if package is None:
        return None
    try:
        package.load()
    except ModuleNotFoundError as error:
        absent = error.name is not None and f"{package.module}.".startswith(f"{error.name}.")
        return Lack("it is not installed" if absent else str(error), installed=not absent)
    except build.UnavailableError as error:
        return Lack(str(error), installed=False)
    except Exception as error:  # what a package does while it is loaded is its own
        return Lack(f"{type(error).__name__}: {error}".splitlines()[0], installed=True)
    if (
        package.majors
        and torch.cuda.is_available()
        and (major := torch.cuda.get_device_capability()[0]) not in package.majors
    ):
        made_for = " or ".join(f"{each}.x" for each in package.majors)
        return Lack(f"it is for compute capability {made_for}, and this GPU has {major}.x", installed=True)
    return None


SWITCHES = {"flash_attn_3": "FA3", "flash_attn_4": "FA4"}  # PyTorch's names


def _switch(implementation: str | None) -> None:
    """Let PyTorch's own operators run in FlashAttention 3 or 4, or as they came."""
    from torch.nn import attention

    if implementation is not None:
        attention.activate_flash_attention_impl(implementation)
    elif attention.current_flash_attention_impl() is not None:
        attention.restore_flash_attention_impl()


def _try_switch(implementation: str) -> None:
    from torch.nn.attention import current_flash_attention_impl

    before = current_flash_attention_impl()
    _switch(implementation)
    _switch(before)


def _load_flash_attn_2() -> None:
    from flash_attn import flash_attn_varlen_func  # noqa: F401


def _load_torch_varlen() -> None:
    from torch.nn.attention.varlen import varlen_attn  # noqa: F401


PACKAGES = {
    "cpp": Package(cpu_attention.load, "", (), "install g++"),
    "flash_attn_3": Package(
        functools.partial(_try_switch, "FA3"),
        "flash_attn_interface",
        (9,),
        "build it in the folder `hopper` of flash-attention's sources: python setup.py install",
    ),
    "flash_attn_4": Package(
        functools.partial(_try_switch, "FA4"), "flash_attn.cute.interface", (9, 10), "pip install flash-attn-4"
    ),
    "flash_attn_2": Package(
        _load_flash_attn_2, "flash_attn", range(8, 100), 'pip install --no-build-isolation -e ".[flash]"'
    ),
    "torch_varlen": Package(_load_torch_varlen, "torch.nn.attention.varlen", range(8, 100), "install a newer torch"),
}
