"""`prepare` over two ranks: they end quietly, and when rank 0 is refused, both say the one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import ROOT, Start, start_ranks


@pytest.mark.slow
def test_ranks_part_without_a_word_and_a_refusal_is_said_once(start_moe_lm: Start, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text(f"The fox jumps {number} times.")
    sources = json.dumps([{"name": "text", "path": str(tmp_path / "text")}])
    config = ROOT / "configs" / "pretrain" / "quickstart.yaml"
    settings = [f"data.tokenizer={ROOT / 'tokenizer' / 'tiny'}", f"data.shards={tmp_path / 'shards'}"]

    def prepare(*more: str) -> tuple[list[int], list[str]]:
        """The exit codes, and what the ranks said in stderr."""
        ranks = start_ranks(start_moe_lm, 2, "prepare", config, *settings, f"data.sources={sources}", *more)
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
        return [rank.returncode for rank in ranks], said

    assert prepare("data.workers=1") == ([0, 0], ["", ""])
    codes, (of_first, of_other) = prepare("data.workers=1", "data.validation_fraction=0.3")
    assert (codes, of_other) == ([2, 2], "")
    (line,) = of_first.splitlines()
    assert line.startswith(f"error: {tmp_path / 'shards' / 'text'} was prepared from something else: validation_frac")
