"""A run whose newest checkpoints are damaged, through the command line (FAULTS rows 5 to 7)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.checkpoint import write
from moe_lm.common.errors import MoeLmError
from moe_lm.train.checkpoints import read_counters
from tests.processes import events
from tests.runs import figures

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]
SHORT = ("train.steps=12", "checkpoint.keep=9", "train.eval_batches=1")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize("part", ["model", pytest.param("optimizer", marks=pytest.mark.slow), "trainer.json"])
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"step": -5}', "trainer.json is of step -5; expected the folder's; copy the checkpoint again"),
        ('{"step": 7}', "trainer.json is of step 7; expected the folder's"),
        ('{"step": null}', "trainer.json does not say how many steps were done; copy it again"),
        ("[1]", "trainer.json does not say how many steps were done"),
        ("{", "trainer.json does not say how many steps were done"),
    ],
)
def test_a_step_that_is_not_the_folders_is_refused_however_it_is_signed(tmp_path: Path, text: str, said: str) -> None:
    folder = write.save(tmp_path, 6, {"model.weight": torch.ones(2)}, {"trainer.json": text})
    with pytest.raises(MoeLmError) as refused:
        read_counters(folder)
    assert said in str(refused.value)


def test_a_fine_tuning_goes_on_past_damage_without_the_run_it_began_with(
    finetune_config: Path, tmp_path: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    """Its shape and tokenizer come from its own checkpoint, which must not be the damaged one."""
    start = shutil.copytree(pretrained, tmp_path / "start")
    run = tmp_path / "run"
    settings = (f"start_from={start}", f"run_dir={run}", "train.steps=4", "checkpoint.every=2", "checkpoint.keep=9")
    assert moe_lm("finetune", finetune_config, *settings).code == 0
    whole = figures(run)
    shutil.rmtree(start)
    flip_a_byte(next((run / "checkpoints" / "step-00000004" / "model").iterdir()))
    done = moe_lm("finetune", finetune_config, *settings)
    assert (done.code, done.err) == (0, "")
    assert "going on after step 2 of 4" in done.out
    assert figures(run) == whole
