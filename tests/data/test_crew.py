from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lm.common.errors import MoeLmError
from moe_lm.config.data import DataConfig
from moe_lm.data import crew
from moe_lm.data import prepare as module
from moe_lm.data.chunks import Task, write_piece
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShards, read_index, read_manifest
from moe_lm.text import pieces

TOKENIZER = Path(__file__).parents[2] / "tokenizer" / "tiny"


def test_what_is_cut_in_the_end_is_not_overwritten_by_one_that_had_stalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked at its claim before another took the piece over, and renames its files only when all is finished."""

    def cut(shards: Path) -> DataConfig:
        source = {"name": "corpus", "path": str(tmp_path / "rows.jsonl"), "max_bytes": 12_000}
        values = {"sources": [source], "tokenizer": TOKENIZER, "shards": shards, "workers": 1}
        return DataConfig.model_validate(values | {"validation_fraction": 0.1})

    monkeypatch.setattr(pieces, "SMALLEST", 4000)
    rows = [{"text": f"Row {number}: " + "the quick brown fox " * (number % 7)} for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    prepare(cut(tmp_path / "undisturbed"))
    (last,) = {shard.name[-5:] for shard in read_manifest(tmp_path / "undisturbed" / "corpus").train[-1:]}
    remove_shards, tasks = module._remove_shards, list[Task]()

    def work_on(task: Task, *arguments: Any) -> int:
        died = crew.work_on(task, *arguments)
        (task.claims / f"{last}.1").touch()
        tasks.append(task)
        return died

    def come_back(folder: Path, keep: Collection[str]) -> None:
        remove_shards(folder, keep)
        if tasks:
            write_piece(tasks[0], int(last))

    monkeypatch.setattr(module, "work_on", work_on)
    monkeypatch.setattr(module, "_remove_shards", come_back)
    prepare(cut(tmp_path / "stalled"))
    for split in ("train", "validation"):
        undisturbed, stalled = (
            TokenShards.open(tmp_path / name / "corpus", split, verify=True) for name in ("undisturbed", "stalled")
        )
        assert np.array_equal(undisturbed.tokens(0, undisturbed.num_tokens), stalled.tokens(0, stalled.num_tokens))
        assert np.array_equal(*(read_index(shards.folder, shards.shards) for shards in (undisturbed, stalled)))


class Waited:
    """A job of one piece that another process has claimed and does not end."""

    max_bytes = None

    def __init__(self, claims: Path) -> None:
        self.claims = claims

    def __len__(self) -> int:
        return 1

    def is_done(self, number: int) -> bool:
        return False

    def text_bytes(self, number: int) -> int:
        return 0

    def do(self, number: int, tell: crew.Tell, is_mine: Callable[[], bool]) -> None:
        raise AssertionError("it is another's")


def test_a_piece_whose_work_failed_is_free_again(tmp_path: Path) -> None:
    claim = crew.Claims(tmp_path).take("00000")
    assert claim is not None
    with pytest.raises(OSError, match="disk"), crew.beating(claim):
        raise OSError("disk")
    assert crew.Claims(tmp_path).take("00000") == claim


def test_what_another_rank_failed_with_ends_the_waiting_for_its_piece(tmp_path: Path) -> None:
    def look() -> None:
        raise MoeLmError("rank 1: the disk is full")

    assert crew.Claims(tmp_path).take("00000") is not None
    with pytest.raises(MoeLmError, match="the disk is full"):
        crew.work_on(Waited(tmp_path), 1, lambda done: None, look)
