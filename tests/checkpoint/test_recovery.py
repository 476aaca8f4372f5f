"""Going on past damage by itself (FAULTS rows 5 to 7): the newest sound checkpoint, the damaged ones moved aside."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lm.checkpoint import checkpoint, recovery, retain, write
from moe_lm.checkpoint.recovery import KEEP_DAMAGED, newest_sound
from moe_lm.common import integrity
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import CheckpointConfig
from tests.checkpoint.conftest import state_of

MODEL_FILE = "model/shard-00001-model-00001-of-00001.safetensors"
OPTIMIZER_FILE = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda folder: flip(folder / MODEL_FILE), f"{MODEL_FILE} does not have the checksum"),
    "a bit of the moments": (lambda folder: flip(folder / OPTIMIZER_FILE), "does not have the checksum"),
    "a bit of the manifest": (lambda folder: flip(folder / "manifest.json"), "manifest.json does not have the sha256"),
    "an empty file": (lambda folder: (folder / MODEL_FILE).write_bytes(b""), "has 0 bytes, expected"),
    "a missing file": (lambda folder: (folder / OPTIMIZER_FILE).unlink(), f"{OPTIMIZER_FILE} is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "No such file"),
    "no COMPLETE": (lambda folder: (folder / "COMPLETE").unlink(), "has no COMPLETE beside it"),
    "an empty COMPLETE": (lambda folder: (folder / "COMPLETE").write_bytes(b""), "does not have the sha256"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_the_newest_sound_one_is_taken_and_the_damaged_one_moved_aside(
    checkpoints: Path, newest: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(newest)
    found = newest_sound(checkpoints)
    assert found.folder == checkpoints / "step-00000500"
    assert list(found.damaged) == ["step-00001000"]
    assert said in found.damaged["step-00001000"]
    assert said in (checkpoints / "step-00001000.damaged" / "DAMAGED").read_text()
    assert names(checkpoints) == ["step-00000500", "step-00001000.damaged"]
    (line,) = found.lines.values()
    assert line.startswith("the checkpoint step-00001000 is damaged: ")
    assert line.endswith("it is now step-00001000.damaged, and training goes on from step-00000500")


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes so many reads of files fail with an error of the storage."""
    checksum_of, left = integrity.checksum_of, []

    def failing(path: Path, kind: str) -> str:
        if left:
            error = left.pop()
            raise OSError(error, os.strerror(error), str(path))
        return checksum_of(path, kind)

    monkeypatch.setattr(integrity, "checksum_of", failing)
    monkeypatch.setattr(recovery, "RETRY_SECONDS", 0.01)
    return lambda error, times: left.extend([error] * times)


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_read_that_fails_once_is_tried_again(
    checkpoints: Path, newest: Path, unreadable: Callable[[int, int], None], error: int
) -> None:
    unreadable(error, 1)
    assert newest_sound(checkpoints) == (newest, {})


def test_a_read_that_goes_on_failing_is_no_damage(
    checkpoints: Path, newest: Path, unreadable: Callable[[int, int], None]
) -> None:
    unreadable(errno.EIO, 99)
    with pytest.raises(MoeLmError, match=r"step-00001000/.* cannot be read: Input/output error; .* move .* away"):
        newest_sound(checkpoints)
    assert names(checkpoints) == ["step-00000500", "step-00001000"]


def test_a_sound_newest_is_taken_and_nothing_moved(checkpoints: Path, newest: Path) -> None:
    assert newest_sound(checkpoints) == (newest, {})
    assert newest_sound(checkpoints.parent / "absent") == (None, {})
    assert names(checkpoints) == ["step-00000500", "step-00001000"]


def test_one_that_was_not_verified_is_never_taken(checkpoints: Path, newest: Path) -> None:
    """The older one is damaged too: nothing is moved, and nothing begins anew."""
    flip(newest / MODEL_FILE)
    flip(checkpoints / "step-00000500" / OPTIMIZER_FILE)
    for _ in range(2):
        with pytest.raises(MoeLmError) as raised:
            newest_sound(checkpoints)
        for said in ("is sound: step-00001000 (", MODEL_FILE, "step-00000500 (", OPTIMIZER_FILE, "begin anew"):
            assert said in str(raised.value)
        assert names(checkpoints) == ["step-00000500", "step-00001000"]


def test_a_run_of_which_only_damaged_ones_are_left_does_not_begin_anew(checkpoints: Path, newest: Path) -> None:
    flip(newest / MODEL_FILE)
    newest_sound(checkpoints)
    shutil.rmtree(checkpoints / "step-00000500")
    with pytest.raises(MoeLmError, match=r"is sound: step-00001000\.damaged \(model/.* checksum.*begin anew"):
        newest_sound(checkpoints)


def test_by_choice_damage_is_an_error(checkpoints: Path, newest: Path) -> None:
    flip(newest / MODEL_FILE)
    with pytest.raises(MoeLmError, match=r"step-00001000 \(.*\); step-00000500 is sound, and checkpoint.on_damage=pr"):
        newest_sound(checkpoints, "stop")
    assert names(checkpoints) == ["step-00000500", "step-00001000"]


def test_the_one_that_makes_room_is_taken_when_its_successor_is_damaged(checkpoints: Path, newest: Path) -> None:
    shutil.copytree(newest, checkpoints / "step-00001000.replaced")
    flip(newest / MODEL_FILE)
    found = newest_sound(checkpoints)
    assert found.folder == checkpoints / "step-00001000.replaced"
    assert checkpoint.latest(checkpoints) == found.folder
    assert names(checkpoints) == ["step-00000500", "step-00001000.damaged", "step-00001000.replaced"]


def test_cleaning_keeps_damaged_ones_and_does_not_count_them(checkpoints: Path, newest: Path) -> None:
    flip(newest / MODEL_FILE)
    newest_sound(checkpoints)
    write.save(checkpoints, 600, state_of(600), {})
    retain.clean(checkpoints, CheckpointConfig(keep=2))
    assert names(checkpoints) == ["step-00000500", "step-00000600", "step-00001000.damaged"]
    assert checkpoint.latest(checkpoints) == checkpoints / "step-00000600"
    assert checkpoint.resolve(checkpoints.parent) == checkpoints / "step-00000600"


def test_damaged_ones_are_few(checkpoints: Path) -> None:
    for step in range(2000, 2000 + KEEP_DAMAGED + 2):
        flip(write.save(checkpoints, step, state_of(step), {}) / MODEL_FILE)
        assert newest_sound(checkpoints).folder == checkpoints / "step-00001000"
    damaged = [name for name in names(checkpoints) if name.endswith(".damaged")]
    assert damaged == [f"step-{step:08d}.damaged" for step in range(2002, 2005)]


def test_the_same_step_damaged_again_replaces_the_one_aside(checkpoints: Path, newest: Path) -> None:
    for value in (1, 2):
        write.save(checkpoints, 1000, state_of(value), {})
        flip(newest / MODEL_FILE)
        newest_sound(checkpoints)
    assert names(checkpoints) == ["step-00000500", "step-00001000.damaged"]
