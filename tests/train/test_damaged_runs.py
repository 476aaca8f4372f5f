"""A run whose newest checkpoints are damaged, through the command line (FAULTS rows 5 to 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import events
from tests.runs import figures

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]
SHORT = ("train.steps=12", "checkpoint.keep=9", "train.eval_batches=1")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize("part", ["model", "optimizer", "trainer.json"])
def test_a_damaged_checkpoint_is_named_and_moved_aside_and_the_one_before_it_taken(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, part: str
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "checkpoint.every=6")
    assert moe_lm(*command).code == 0
    whole, checkpoints = figures(tmp_path), tmp_path / "checkpoints"
    newest, older = (checkpoints / f"step-000000{step}" for step in ("12", "06"))
    file = newest / part if part.endswith("json") else next((newest / part).iterdir())
    flip_a_byte(file)

    refused = moe_lm("sample", tmp_path, "--prompt", "a")
    if part == "model":  # sampling reads nothing else
        assert refused.code == 1
        assert refused.err.startswith(f"error: the checkpoint {newest} is damaged: {file.relative_to(newest)} does not")
        assert f"; use {older}, the newest sound one before it" in refused.err
    stopped = moe_lm(*command, "checkpoint.on_damage=stop")
    assert stopped.code == 1
    assert f"{newest.name} ({file.relative_to(newest)} does not have the checksum" in stopped.err

    done = moe_lm(*command)
    assert (done.code, done.err) == (0, "")
    said = f"warning: the checkpoint {newest.name} is damaged: {file.relative_to(newest)} does not have the checksum"
    assert said in done.out
    assert "going on after step 6 of 12" in done.out
    (event,) = events(tmp_path, "damaged_checkpoint")
    assert (event["step"], event["checkpoint"]) == (6, newest.name)
    assert sorted(path.name for path in checkpoints.iterdir()) == [older.name, newest.name, f"{newest.name}.damaged"]
    assert figures(tmp_path) == whole


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "checkpoint.every=6")
    assert moe_lm(*command).code == 0
    for folder in (tmp_path / "checkpoints").iterdir():
        flip_a_byte(next((folder / "model").iterdir()))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    done = moe_lm(*command)
    assert done.code == 1
    assert f"no checkpoint in {tmp_path / 'checkpoints'} is sound: step-00000012 (" in done.err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
