"""A few inputs for every reader; `python tests/fuzz/run.py --minutes 10` tries as many as it can."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz.frame import Figures, Reader, all_readers, inputs, try_one

READERS = all_readers()


@pytest.mark.parametrize("name", READERS)
def test_every_input_is_read_or_refused_in_words_in_time_and_in_memory(name: str, tmp_path: Path) -> None:
    reader, figures = READERS[name], Figures()
    read, seeds = reader.prepare(tmp_path), len(reader.seeds())
    for number, data in enumerate(islice(inputs(reader, seed=1), seeds + reader.inputs_in_ci)):
        try_one(reader, read, data, figures, must_read=number < seeds)
        assert not figures.failures, f"input {number}: {figures.failures[0]}"
    assert figures.refused


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time\nwhile time.process_time() < 0.6: pass", "s of processor time for 5 bytes"),
        ("held = b'x' * (100 << 20)", "MiB for 5 bytes"),
    ],
    ids=["time", "memory"],
)
def test_what_a_reader_leaves_to_another_process_counts(program: str, said: str) -> None:
    command = [sys.executable, "-S", "-c", f"{program}\nprint(flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        output = process.stdout
        assert output is not None
        assert process.stdin is not None
        reader = Reader("another process", lambda _: print, list, seconds=0.3)
        figures = Figures()
        try_one(reader, lambda _: output.readline(), b"input", figures)
        process.stdin.close()
    assert [said in failure for failure in figures.failures] == [True]
