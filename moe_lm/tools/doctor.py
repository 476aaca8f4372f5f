"""`moe-lm doctor`: what this machine has, what is missing and how to install it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_lm import __version__
from moe_lm.common import environment
from moe_lm.common.process import cores
from moe_lm.kernels.native import build

Status = Literal["ok", "missing", "optional", "warning"]

GIB = 1 << 30
LOW_DISK_GIB = 5  # a small run with its shards and two checkpoints
INSTALL = "pip install -e ."


# The extra that brings a package, and what it is for.
OPTIONAL = {
    "fastapi": ("serve", "for moe-lm serve"),
    "transformers": ("dev", "to compare imports and exports with"),
    "peft": ("dev", "to compare exported adapters with"),
    "matplotlib": ("plot", "for moe-lm explain"),
    "tensorboard": ("track", "for log.trackers: [tensorboard]"),
    "wandb": ("track", "for log.trackers: [wandb]"),
    "trackio": ("track", "for log.trackers: [trackio]"),
    "lm_eval": ("eval", "for moe-lm eval --tasks"),
    "s3fs": ("s3", "for s3:// in data and checkpoint.upload_to"),
}
BYTES_A_PARAMETER = 16  # weight, gradient and two moments in float32


@dataclass(frozen=True)
class Finding:
    """One line of the report. `missing` marks what is required, and makes the verb fail; the other states do not."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def run() -> int:
    """Print the report; returns the exit code, 1 when something required is missing."""
    findings = list(examine())
    _show(findings)
    return int(any(finding.status == "missing" for finding in findings))


def examine() -> Iterator[Finding]:
    """Yield every finding, in the order of the report."""
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("moe-lm", "ok", __version__)
    yield _package("torch", INSTALL)
    yield from _devices()
    yield _bf16_on_cpu()
    for name in ("deepspeed", "accelerate", "tokenizers", "datasets", "safetensors"):
        yield _package(name, INSTALL)
    for name, (extra, purpose) in OPTIONAL.items():
        yield _package(name, f'pip install -e ".[{extra}]" ({purpose})', required=False)
    yield _program("C compiler", ("cc", "gcc", "clang"), "install gcc (torch.compile and DeepSpeed's ops need it)")
    yield _program("C++ compiler", ("c++", "g++", "clang++"), "install g++ (torch.compile and DeepSpeed's ops need it)")
    yield _native()
    yield from _attention_kernels()
    yield _kernels()
    yield _program("ninja", ("ninja",), "pip install ninja (DeepSpeed's ops are built with it)")
    yield _program("pdsh", ("pdsh",), "install pdsh (only launch/deepspeed.sh over several hosts needs it)")
    yield _program("Slurm", ("sbatch",), "ask the cluster's administrators (only launch/slurm.sbatch needs it)")
    yield Finding("processor", "ok", f"{cores()} cores, {_memory_gib():.0f} GiB memory")
    yield from _environment()
    yield _training()
    yield _disk(Path.cwd())
    yield from _build_locks(_extensions_dir())


def _package(name: str, remedy: str, required: bool = True) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing" if required else "optional", "not installed", remedy)


def _devices() -> Iterator[Finding]:
    """Yield the devices that torch sees. Imports torch: a build that does not fit the driver fails here."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("devices", "missing", f"torch does not load: {error}", f"{INSTALL} --force-reinstall")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB")
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("CUDA", "ok", f"{torch.version.cuda}, NCCL {nccl}")
    elif torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")
    elif shutil.which("nvidia-smi"):
        yield Finding("CUDA", "warning", "an NVIDIA driver, but torch sees no device", "install a CUDA build of torch")
    else:
        yield Finding("devices", "ok", "only the CPU")


def _bf16_on_cpu() -> Finding:
    """Whether the processor multiplies bfloat16 matrices in hardware; otherwise float32 is faster."""
    import torch

    from moe_lm.kernels.device import pick_dtype

    fast = pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    return Finding("bfloat16 on the CPU", "ok", "fast" if fast else "slow here; float32 is used")


def _program(name: str, commands: tuple[str, ...], remedy: str) -> Finding:
    places = [place for place in map(shutil.which, commands) if place]
    return Finding(name, "ok", places[0]) if places else Finding(name, "optional", "not found", remedy)


def _native() -> Finding:
    """Whether decoding on a CPU runs in C++. Builds the library if it was not built yet."""
    try:
        return Finding("decoding in C++", "ok", build.load()._name)
    except build.UnavailableError as error:
        remedy = "" if build.compiler_path() else "install g++"
        return Finding("decoding in C++", "optional", f"{error}; torch decodes instead, more slowly", remedy)


def _attention_kernels() -> Iterator[Finding]:
    """Yield the attention kernels of each kind of device, the fastest first: which serve, and how to get the others."""
    from moe_lm.kernels import available

    for device, names in available.BY_SPEED.items():
        for name in filter(available.PACKAGES.__contains__, names):
            lack, package = available.lack(name), available.PACKAGES[name]
            if lack is None:
                yield Finding(f"attention {name}", "ok", f"serves on {device}")
            else:
                status: Status = "warning" if lack.installed else "optional"
                yield Finding(f"attention {name}", status, lack.why, f"{package.install} ({device} only)")


def _kernels() -> Finding:
    """The kernels that training and sampling choose on this machine."""
    from moe_lm.kernels.device import pick_device
    from moe_lm.kernels.kernels import choose

    return Finding("kernels", "ok", str(choose(pick_device("auto"), decoding=True)))


def _environment() -> Iterator[Finding]:
    """Yield the variables that a rank has when it trains on all GPUs of this machine, and who set them."""
    import torch

    machine = environment.Machine(cores(), max(1, torch.cuda.device_count()))
    for setting in environment.settings(environment.VARIABLES, machine):
        origin = "set in the environment" if setting.is_given else f"moe-lm's: {setting.why}"
        yield Finding(setting.name, "ok", f"{setting.value} ({origin})")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", "ok", f"{soft:,}, raised to {hard:,} when a run starts")


def _training() -> Finding:
    """What this machine can train: the models that `moe-lm init` sizes, and what its memory bounds."""
    import torch

    from moe_lm.config.model import ModelConfig
    from moe_lm.config.reading import build_config
    from moe_lm.model.size import count_parameters
    from moe_lm.tools.sizes import SHAPES, Sizes

    sizes = [Sizes(0, shape) for shape in (SHAPES[0], SHAPES[-1])]
    least, most = (
        count_parameters(build_config(ModelConfig, {"vocab_size": size.vocab_size, **size.model}, "sizes")).total / 1e6
        for size in sizes
    )
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    place, gib = ("a GPU", min(gpus) / GIB) if gpus else ("memory", _memory_gib())
    bound = gib * GIB / 2 / BYTES_A_PARAMETER / 1e6  # the other half is for activations
    return Finding(
        "can train",
        "ok",
        f"{least:.1f} to {most:.0f} million parameters in minutes (moe-lm init TEXT writes the config); {place} holds "
        f"about {float(f'{bound:.1g}'):,.0f} million",
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    if free < LOW_DISK_GIB:
        return Finding("disk", "warning", f"{free:.1f} GiB free here", "free some space, or run in another folder")
    return Finding("disk", "ok", f"{free:.0f} GiB free here")


def _build_locks(folder: Path) -> Iterator[Finding]:
    """Yield lock files of torch extensions: a killed build leaves one, and every later run waits for it silently."""
    for lock in sorted(folder.glob("**/lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        yield Finding(
            "build lock",
            "warning",
            f"{lock}, {minutes:.0f} min old; runs that need this op wait for it",
            f"if no build is running: rm {lock}",
        )


def _extensions_dir() -> Path:
    """Where torch builds extensions, DeepSpeed's ops among them."""
    cache = os.path.join(os.path.expanduser("~"), ".cache")  # as torch does; it needs no home folder
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions"))


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _show(findings: list[Finding]) -> None:
    """Print the findings, then what to do; a path or a command stays in one line, to be copied."""
    from rich.console import Console
    from rich.text import Text

    marks = {
        "ok": ("ok", "green"),
        "missing": ("missing", "bold red"),
        "optional": ("-", "dim"),
        "warning": ("!", "yellow"),
    }
    console = Console()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = marks[finding.status]
        line = f"{mark:7}  {finding.name:{width}}  {finding.found}"
        if console.is_terminal:  # which would break a path in mid-word
            line = textwrap.fill(
                line, console.width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
            )
        console.print(Text.assemble((line[:7], style), line[7:]), soft_wrap=True)
    remedies = [finding for finding in findings if finding.remedy]
    if remedies:
        console.print("\nWhat to do:")
    for finding in remedies:
        console.print(Text(f"  {finding.name:{width}}  {finding.remedy}"), soft_wrap=True)
