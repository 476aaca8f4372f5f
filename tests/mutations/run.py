"""Try mutations: `python tests/mutations/run.py [NAME ...] [--json FILE]`.

A NAME may be a part of one, or the beginning of a file's: `engine/`. Each mutation is applied to a copy of the
project, in which its tests run: one that fails kills it. They run once without any mutation before, because a test that
fails anyway kills nothing. The exit code is 0 if all were killed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mutations.frame import ROOT, Mutation, all_mutations

PARTS = ("moe_lm", "tests", "tokenizer", "configs", "launch", "docs", "eval", "pyproject.toml", "README.md")
HANG = 900  # seconds, on a machine that is busy with other things
KILLED, SURVIVED, STALE, BROKEN = "killed", "SURVIVED", "stale", "BROKEN"
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", re.M)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--list", action="store_true", help="show the mutations, try none")
    options = parser.parse_args()
    chosen = [mutation for mutation in all_mutations().values() if _is_chosen(mutation, options.names)]
    if not chosen:
        parser.error(f"no mutation is called {' or '.join(options.names)}; --list shows them")
    if options.list:
        print("\n".join(f"{mutation.file}: {mutation.name}" for mutation in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = _copy_of_project(Path(folder))
        code, said = _run_tests(copy, sorted({test for mutation in chosen for test in mutation.tests}), slow=False)
        if code:
            print(f"{said}\nthese tests fail without any mutation (exit code {code}); mend them first")
            return 2
        results = {mutation.name: _try(mutation, copy) for mutation in chosen}
    counts = Counter(result["result"] for result in results.values())
    line = ", ".join(f"{counts[kind]} {kind}" for kind in (KILLED, SURVIVED, STALE, BROKEN))
    print(f"{len(results)} mutations: {line}")
    if options.json:
        figures = {"date": datetime.date.today().isoformat(), "counts": dict(counts), "mutations": results}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
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


def _try(mutation: Mutation, copy: Path) -> dict[str, str]:
    """Apply a mutation, run its tests, take it back; a test that hangs has noticed nothing."""
    file = copy / "moe_lm" / mutation.file
    sound = file.read_text(encoding="utf-8")
    by = ""
    try:
        file.write_text(mutation.mutated(copy), encoding="utf-8")
        code, said = _run_tests(copy, mutation.tests, mutation.slow)
        result = {0: SURVIVED, 1: KILLED}.get(code, BROKEN)  # of any other code: nothing ran, or without an end
        failed = FAILED_TEST.search(said)
        by = failed[1] if failed and result == KILLED else "" if result == SURVIVED else said[-2000:]
    except ValueError as error:
        result, by = STALE, str(error)
    finally:
        file.write_text(sound, encoding="utf-8")
    print(f"{result:8}  {mutation.name}{f'  ({by})' if by else ''}", flush=True)
    return {"file": mutation.file, "result": result, "by": by}


def _run_tests(copy: Path, tests: list[str], slow: bool) -> tuple[int, str]:
    """Pytest's exit code and output; a negative code when it hung."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += [] if slow else ["-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *tests], cwd=copy, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return -1, f"{said}\nno end within {HANG} s"
    return process.returncode, said


if __name__ == "__main__":
    sys.exit(main())
