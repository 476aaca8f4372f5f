"""Compiles the C++ of this package once per machine, in three seconds, and loads it; nothing here needs torch.

The library lies in the user's cache under a name that is a hash of everything that it depends on. It is written under
another name and then renamed, so that several processes may build at once and a killed one leaves no lock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path

from moe_lm.common.environment import local_cache
from moe_lm.common.files import whole_file

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "few_rows.cpp", FOLDER / "attention.cpp")
HEADERS = (FOLDER / "products.hpp", FOLDER / "threads.hpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
THREADS = ("-fopenmp",)  # tells how many threads torch was told to use, because torch has loaded the same library
TIMEOUT = 120  # seconds, for a machine that is busy with other things
OFF = "MOE_LM_NATIVE"  # "0" in the environment: everything runs in torch


class UnavailableError(Exception):
    """The reason why there is no library; everything works without it, slower."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of the C++, or None if they cannot be built."""
    try:
        return load()
    except UnavailableError:
        return None


def load() -> ctypes.CDLL:
    """The functions of the C++; raises UnavailableError with the reason if they cannot be built."""
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # as on a disk that is mounted noexec
        raise UnavailableError(f"it cannot be loaded: {error}; XDG_CACHE_HOME can name another folder") from error


def start() -> None:
    """Begin to build in the background, to be ready when torch is imported and the weights are read."""
    threading.Thread(target=_try_to_build, daemon=True).start()


def _try_to_build() -> None:
    try:
        build()
    except UnavailableError:
        return  # `library` finds the same


_building = threading.Lock()


def build() -> Path:
    """The compiled library; raises UnavailableError with the reason."""
    if os.environ.get(OFF) == "0":
        raise UnavailableError(f"{OFF}=0 turns it off")
    compiler = compiler_path()
    if compiler is None:
        raise UnavailableError("no C++ compiler")
    with _building:
        try:
            target = cache_folder() / f"kernels-{_key(compiler)}.so"
            if not target.exists():
                _compile(compiler, target)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(str(error)) from error
        return target


def cache_folder() -> Path:
    """On a disk of this machine. Raises UnavailableError for a user without a home folder, as containers have."""
    try:
        return local_cache()
    except RuntimeError as error:
        raise UnavailableError("no home folder; XDG_CACHE_HOME can name one for the cache") from error


def compiler_path() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=False).stdout
    sources = (file.read_bytes() for file in (*SOURCES, *HEADERS))
    parts = (*sources, version, repr((FLAGS, THREADS)).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The processor, on which -march=native depends: machines with different ones can share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target, contested=True) as library:
        for flags in ((*FLAGS, *THREADS), FLAGS):  # Apple's compiler has no OpenMP
            command = [compiler, *flags, *map(str, SOURCES), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
            if done.returncode == 0:
                return
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise UnavailableError(f"{compiler} fails: {said[0]}")
