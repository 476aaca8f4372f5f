"""Try mutations: `python tests/mutations/run.py [NAME ...] [--json FILE]`.

A NAME may be a part of one, or the beginning of a file's: `engine/`. Each mutation is applied to a copy of the
project, in which its tests run: one that fails kills it. They run once without any mutation before, because a test that
fails anyway kills nothing. The exit code is 0 if all were killed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mutations.frame import ROOT, Mutation, all_mutations

PARTS = ("moe_lm", "tests", "tokenizer", "configs", "launch", "docs", "eval", "pyproject.toml", "README.md")
TODAY = datetime.date.today()
HANG = 900  # seconds, on a machine that is busy with other things
KILLED, SURVIVED, STALE, BROKEN = "killed", "SURVIVED", "stale", "BROKEN"
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", re.M)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    parser.add_argument("--json", type=Path, help="put the results into this file, in place of earlier ones")
    parser.add_argument("--list", action="store_true", help="show the mutations, try none")
    options = parser.parse_args()
    chosen = [mutation for mutation in all_mutations().values() if _is_chosen(mutation, options.names)]
    if not chosen:
        parser.error(f"no mutation is called {' or '.join(options.names)}; --list shows them")
    if options.list:
        print("\n".join(f"{mutation.file}: {mutation.name}" for mutation in chosen))
        return 0
    results = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = _copy_of_project(Path(folder))
        fail_anyway = _failing(copy, sorted({test for mutation in chosen for test in mutation.tests}))
        for mutation in chosen:
            result, why = _try(mutation, copy, fail_anyway)
            print(f"{result:8}  {mutation.name}{f'  ({why})' if why else ''}", flush=True)
            results[mutation.name] = {"file": mutation.file, "result": result, "by": why, "date": f"{TODAY}"}
            if options.json:
                _put(results, options.json)
    counts = Counter(result["result"] for result in results.values())
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in (KILLED, SURVIVED, STALE, BROKEN))
    print(f"{len(results)} mutations: {kinds}")
    return int(counts[KILLED] != len(results))


def _is_chosen(mutation: Mutation, names: Iterable[str]) -> bool:
    return not names or any(name in mutation.name or mutation.file.startswith(name) for name in names)


def _copy_of_project(folder: Path) -> Path:
    copy = folder / "project"
    copy.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / part, copy / part)
    return copy


def _failing(copy: Path, tests: list[str]) -> list[str]:
    """The tests that fail without any mutation."""
    code, said = _run_tests(copy, tests, "-m", "not slow", seconds=None)
    failing = FAILED_TEST.findall(said)
    if code and not failing:
        raise SystemExit(f"{said}\nthe tests do not run without any mutation (exit code {code}); mend that first")
    return failing


def _try(mutation: Mutation, copy: Path, fail_anyway: Iterable[str]) -> tuple[str, str]:
    """Apply a mutation, run its tests, take it back; returns the result and what it is from.

    A test that hangs has noticed nothing.
    """
    file = copy / "moe_lm" / mutation.file
    sound = file.read_text(encoding="utf-8")
    if failing := [test for test in fail_anyway if test.startswith(tuple(mutation.tests))]:
        return BROKEN, f"{failing[0]} fails without it"
    try:
        file.write_text(mutation.mutated(copy), encoding="utf-8")
        code, said = _run_tests(copy, mutation.tests, "-x", *([] if mutation.slow else ["-m", "not slow"]))
    except ValueError as error:
        return STALE, str(error)
    finally:
        file.write_text(sound, encoding="utf-8")
    failed = FAILED_TEST.search(said)
    if code == 1 and failed:
        return KILLED, failed[1]
    return (SURVIVED, "") if code == 0 else (BROKEN, said.strip().rpartition("\n")[2])  # nothing ran, or without an end


def _put(results: Mapping[str, dict[str, str]], path: Path) -> None:
    """Put results beside those that a file has of other mutations."""
    earlier = json.loads(path.read_text(encoding="utf-8"))["mutations"] if path.exists() else {}
    found = {name: (earlier | results).get(name) for name in all_mutations()}
    known = {name: result for name, result in found.items() if result is not None}
    counts = Counter(result["result"] for result in known.values())
    figures = {"counts": dict(counts), "mutations": known}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _run_tests(copy: Path, tests: list[str], *options: str, seconds: float | None = HANG) -> tuple[int, str]:
    """Pytest's exit code and output; a negative code when it hung."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "--show-capture=no", *options]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *tests], cwd=copy, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        said += f"\nno end within {seconds} s"
    with contextlib.suppress(ProcessLookupError):  # what a test has started and did not see end
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


if __name__ == "__main__":
    sys.exit(main())
