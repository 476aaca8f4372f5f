"""Which checkpoints stay: the best beyond the newest; and which give way, one by one, on a full disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_lm.checkpoint import checkpoint, retain, write
from moe_lm.config.run import CheckpointConfig
from tests.checkpoint.conftest import state_of


def save(checkpoints: Path, step: int, loss: float | None = None) -> Path:
    counters = json.dumps({"step": step, "validation_loss": loss})
    return write.save(checkpoints, step, state_of(step), {"trainer.json": counters})


def steps(checkpoints: Path) -> list[int]:
    return sorted(checkpoint.complete_checkpoints(checkpoints))


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 5; that of step 2 is the best, that of step 5 was measured after it was saved."""
    for step, loss in enumerate((3.0, 2.0, 2.5, None), 1):
        save(tmp_path, step, loss)
    retain.note_held_out_loss(save(tmp_path, 5), 2.25)
    return tmp_path


def test_the_best_has_the_lowest_held_out_loss_wherever_it_is_kept(losses: Path) -> None:
    found = [retain.held_out_loss(losses / f"step-0000000{step}") for step in (1, 2, 3, 4, 5)]
    assert found == [3.0, 2.0, 2.5, None, 2.25]
    assert retain.best(losses) == losses / "step-00000002"
    retain.note_held_out_loss(losses / "step-00000004", 2.0)
    assert retain.best(losses) == losses / "step-00000002"  # of equal ones the older
    retain.note_held_out_loss(losses / "step-00000005", 1.0)
    assert retain.best(losses) == losses / "step-00000005"
    assert retain.best(losses / "absent") is None


def test_a_loss_that_is_noted_later_leaves_the_checkpoint_verified(losses: Path) -> None:
    checkpoint.verify(losses / "step-00000005")
    assert (losses / "step-00000005" / retain.HELD_OUT).is_file()


def test_a_doubtful_checkpoint_is_never_the_best(losses: Path) -> None:
    (losses / "step-00000002" / checkpoint.DOUBTFUL).write_text("it was skipped")
    assert retain.best(losses) == losses / "step-00000005"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"validation_loss": "x"}', '{"validation_loss": NaN}', "{}"])
def test_a_note_that_is_not_one_is_no_loss(losses: Path, text: str) -> None:
    (losses / "step-00000005" / retain.HELD_OUT).write_text(text)
    assert retain.held_out_loss(losses / "step-00000005") is None


def test_cleaning_keeps_the_best_beyond_the_newest(losses: Path) -> None:
    retain.clean(losses, CheckpointConfig(keep=1, best=True))
    assert steps(losses) == [2, 5]
    retain.clean(losses, CheckpointConfig(keep=1, best=False))
    assert steps(losses) == [5]


def test_room_is_made_one_by_one_and_the_newest_stays(losses: Path) -> None:
    checkpoint.pin(losses / "step-00000001", "the base of adapters")
    shutil.copytree(losses / "step-00000003", losses / "step-00000009.damaged")
    (losses / "step-00000006.tmp").mkdir()
    gone = []
    while (folder := retain.make_room(losses, keep_best=True)) is not None:
        gone.append(folder.name)
    assert gone == ["step-00000006.tmp", "step-00000009.damaged", "step-00000003", "step-00000004"]
    assert steps(losses) == [1, 2, 5]
    assert retain.make_room(losses, keep_best=False) == losses / "step-00000002"
    assert retain.make_room(losses, keep_best=False) is None


def doubt(checkpoints: Path, step: int) -> None:
    (checkpoints / f"step-{step:08d}" / checkpoint.DOUBTFUL).write_text("the last step was skipped")


def test_doubtful_ones_give_way_first_and_the_newest_good_one_stays(losses: Path) -> None:
    doubt(losses, 4)
    doubt(losses, 5)
    gone = []
    while (folder := retain.make_room(losses, keep_best=False)) is not None:
        gone.append(checkpoint.step_of(folder))
    assert gone == [4, 5, 1, 2]
    assert steps(losses) == [3]


def test_without_a_good_one_the_newest_doubtful_one_stays(losses: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        doubt(losses, step)
    while retain.make_room(losses, keep_best=False) is not None:
        pass
    assert steps(losses) == [5]


def test_what_cannot_be_deleted_is_passed_over(losses: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = checkpoint.delete
    monkeypatch.setattr(checkpoint, "delete", lambda folder: folder.name.endswith("1") or delete(folder))
    assert retain.make_room(losses, keep_best=False) == losses / "step-00000002"
