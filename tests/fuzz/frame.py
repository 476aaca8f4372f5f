"""Fuzzing: a reader gets mutations of valid inputs, and must read or refuse each in words, in time and in memory.

A file in `readers/` describes one reader as `READER`. `run.py` fuzzes for minutes, each reader in a process of its own;
`test_fuzz.py` tries a few inputs of each in every CI.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from moe_lm.common.errors import MoeLmError
from tests.fuzz.mutations import mutate_bytes

READERS = Path(__file__).with_name("readers")
LARGEST_INPUT = 1 << 20  # bytes
Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Reader:
    """A reader of the program and what it is given.

    `prepare(folder)` is called once with an empty folder, and returns the function that reads one input; what that
    raises must be one of `refusals`, with a message. `seeds()` are inputs that must be read; `mutate` makes another
    input of one. `seconds` of processor time and `memory` bytes beyond `memory_per_byte` times the input are allowed;
    what the reader leaves to processes of its own counts as well.
    """

    name: str
    prepare: Callable[[Path], Read]
    seeds: Callable[[], Sequence[bytes]]
    mutate: Callable[[Random, bytes, Sequence[bytes]], bytes] = mutate_bytes
    refusals: tuple[type[Exception], ...] = (MoeLmError,)
    seconds: float = 2.0
    seconds_per_megabyte: float = 10.0
    memory: int = 64 << 20
    memory_per_byte: int = 64
    inputs_in_ci: int = 60


@dataclass
class Figures:
    """What was tried: numbers of inputs, and the worst of them."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds of processor time
    most_memory: int = 0  # bytes that one input added to the peak
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.inputs:,} inputs, {self.read:,} read, {self.refused:,} refused, slowest {self.slowest:.2f} s, "
            f"most memory {self.most_memory / (1 << 20):.0f} MiB, {len(self.failures)} failed"
        )


def all_readers() -> dict[str, Reader]:
    """The readers by name."""
    found = {}
    for path in sorted(READERS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"tests.fuzz.readers.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up
        spec.loader.exec_module(module)
        found[module.READER.name] = module.READER
    return found


def inputs(reader: Reader, seed: int, start: int = 0) -> Iterable[bytes]:
    """The seeds, then mutations of them without end; the same ones for the same `seed`. `start` leaves out the first.

    Every input has its own random numbers, so that the hundredth can be made without the others.
    """
    seeds = list(reader.seeds())
    if start < len(seeds):
        yield from seeds[start:]
    number = max(0, start - len(seeds))
    while True:
        draw = Random(f"{seed}/{reader.name}/{number}")
        data = draw.choice(seeds)
        for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
            data = reader.mutate(draw, data, seeds)
        yield data[:LARGEST_INPUT]
        number += 1


def try_one(reader: Reader, read: Read, data: bytes, figures: Figures, must_read: bool = False) -> None:
    """Read one input and count it; what went wrong goes into `figures.failures`, a sentence or a traceback each."""
    figures.inputs += 1
    before = reset_peak()
    started = processor_time()
    try:
        read(data)
        figures.read += 1
    except reader.refusals as error:
        figures.refused += 1
        if must_read or not str(error).strip():
            figures.failures.append(f"refused, and should be read: {error!r}")
    except Exception:
        figures.failures.append(traceback.format_exc())
    seconds, added = processor_time() - started, peak() - before
    figures.slowest, figures.most_memory = max(figures.slowest, seconds), max(figures.most_memory, added)
    if seconds > reader.seconds + reader.seconds_per_megabyte * len(data) / 1e6:
        figures.failures.append(f"took {seconds:.1f} s of processor time for {len(data)} bytes")
    if added > reader.memory + reader.memory_per_byte * len(data):
        figures.failures.append(f"took {added >> 20} MiB for {len(data)} bytes")


def processor_time() -> float:
    """Seconds of processor time of this process and its children, of those that have ended too."""
    ended, ticks = resource.getrusage(resource.RUSAGE_CHILDREN), os.sysconf("SC_CLK_TCK")
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in children():
        with suppress(OSError):
            fields = (
                Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            )
            total += (int(fields[11]) + int(fields[12])) / ticks  # utime, stime
    return total


def reset_peak() -> int:
    """Begin a new peak of the memory of this process and its children (Linux); returns what they have now, in bytes."""
    for process in ("self", *children()):
        with suppress(OSError):
            Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """The most memory that this process and its children had since `reset_peak`, in bytes, each at its own time."""
    total = 0
    for process in ("self", *children()):
        with suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) << 10
    return total or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def children() -> list[str]:
    """The processes that this one has started and that have not ended (Linux)."""
    with suppress(OSError):
        return [number for file in Path("/proc/self/task").glob("*/children") for number in file.read_text().split()]
    return []
