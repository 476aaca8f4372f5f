"""Fuzz readers for minutes: `python tests/fuzz/run.py --minutes 10 [READER ...]`.

Each reader is fuzzed in a process of its own, one after the other. A traceback, a hang, a crash, or more time or memory
than an input may take is a failure: the input is kept in --keep, its reason is printed, and the exit code is 1.
`--input FILE READER` tries one kept input again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz.frame import Figures, Reader, all_readers, inputs, try_one

HANG = 120  # seconds without a new input, on a machine that is busy with other things
MOST_FAILURES = 10  # of a reader, which then ends
CURRENT = "current"  # the input that is being read
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk takes longer than most readers
SPARE_BYTES = 8 << 30  # of address space beside what a reader needs to start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(all_readers())}; all by default")
    parser.add_argument("--minutes", type=float, default=10, help="for each reader (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other inputs (default: 0)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder of the inputs that failed")
    parser.add_argument("--input", type=Path, help="try this input alone")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.readers) - all_readers().keys()
    if unknown:
        parser.error(f"there is no reader {min(unknown)}; expected {', '.join(all_readers())}")
    readers = [all_readers()[name] for name in options.readers or all_readers()]
    if options.input:
        return _try_again(readers[0], options.input)
    if options.here:
        return _fuzz(readers[0], options)
    return max(_watch(reader, options) for reader in readers)


def _watch(reader: Reader, options: argparse.Namespace) -> int:
    """Fuzz in a process of its own, and end it when it hangs."""
    options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        return _watch_in(Path(folder), reader, options)


def _watch_in(folder: Path, reader: Reader, options: argparse.Namespace) -> int:
    current = folder / CURRENT
    command = [
        sys.executable, __file__, reader.name, "--here", str(folder), "--minutes", str(options.minutes),
        "--seed", str(options.seed), "--keep", str(options.keep),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    seen, since = None, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = current.stat().st_mtime_ns if current.exists() else None
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > HANG:
            process.kill()
            process.wait()
    if process.returncode < 0:
        kept = _keep(current.read_bytes(), reader, options)
        what = f"no answer in {HANG} s" if process.returncode == -9 else f"ended by signal {-process.returncode}"
        print(f"{reader.name}: {what}; {_how_to_see(reader, kept)}", flush=True)
    return int(process.returncode != 0)


def _fuzz(reader: Reader, options: argparse.Namespace) -> int:
    figures, deadline = Figures(), time.monotonic() + 60 * options.minutes
    seeds = len(reader.seeds())
    work = options.here / "work"
    work.mkdir()
    read = reader.prepare(work)
    limit = _address_space() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number, data in enumerate(inputs(reader, options.seed)):
        (options.here / CURRENT).write_bytes(data)
        failed = len(figures.failures)
        try_one(reader, read, data, figures, must_read=number < seeds)
        for failure in figures.failures[failed:]:
            kept = _keep(data, reader, options)
            print(f"{reader.name}: {failure.strip()}\n  {_how_to_see(reader, kept)}", flush=True)
        if time.monotonic() > deadline or len(figures.failures) >= MOST_FAILURES:
            break
    print(f"{reader.name}: {figures}", flush=True)
    return int(bool(figures.failures))


def _try_again(reader: Reader, file: Path) -> int:
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        try_one(reader, reader.prepare(Path(folder)), file.read_bytes(), figures)
    print("\n".join([*figures.failures, f"{reader.name}: {figures}"]))
    return int(bool(figures.failures))


def _how_to_see(reader: Reader, file: Path) -> str:
    return f"again: python tests/fuzz/run.py --input {file} {reader.name}"


def _keep(data: bytes, reader: Reader, options: argparse.Namespace) -> Path:
    kept: Path = options.keep / f"{reader.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    kept.write_bytes(data)
    return kept


def _address_space() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
