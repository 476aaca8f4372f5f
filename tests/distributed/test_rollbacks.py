"""Going back to a checkpoint with several ranks (FAULTS row 20): together, and to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import finish, start_program


@pytest.mark.slow
def test_ranks_go_back_together_and_go_on_as_a_run_from_that_checkpoint(tmp_path: Path) -> None:
    """In data parallelism, and with 2 expert-parallel ranks under ZeRO 1, 2 and 3."""
    program = Path(__file__).with_name("rollbacks_of_ranks.py")
    first, *_ = finish(start_program(2, program, tmp_path, 0, 1, 2, 3))
    reports = json.loads(first[first.index("found ") + 6 :])
    assert reports.keys() == {"0", "1", "2", "3"}
    for found in reports.values():
        assert found["events"] == [["skip", 4], ["skip", 5], ["rollback", 5]]
        assert found["differ"] == []
        assert found["tensors"] > 40
        back, fresh = found["losses"]
        assert len(back) == 4
        assert back == fresh
