"""A few inputs for every reader; `python tests/fuzz/run.py --minutes 10` tries as many as it can."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz.frame import Figures, all_readers, inputs, try_one

READERS = all_readers()


@pytest.mark.parametrize("name", READERS)
def test_every_input_is_read_or_refused_in_words_in_time_and_in_memory(name: str, tmp_path: Path) -> None:
    reader, figures = READERS[name], Figures()
    read, seeds = reader.prepare(tmp_path), len(reader.seeds())
    for number, data in enumerate(islice(inputs(reader, seed=1), seeds + reader.inputs_in_ci)):
        try_one(reader, read, data, figures, must_read=number < seeds)
        assert not figures.failures, f"input {number}: {figures.failures[0]}"
    assert figures.refused
