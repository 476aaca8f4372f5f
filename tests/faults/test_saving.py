"""Saves that are killed, fail, or are slow (rows 1, 2, 8 to 12)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_lm.checkpoint import checkpoint
from tests.faults.conftest import SHORT, Program, done, events, losses_of, steps
from tests.processes import wait_until
from tests.runs import assert_same_run

Harm = Callable[..., dict[str, object]]


def verified_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, every byte of which is as it was written."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    checkpoint.verify(newest)
    return int(json.loads((newest / "trainer.json").read_text(encoding="utf-8"))["step"])


@pytest.mark.row(1)
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_kill_while_saving_loses_one_interval_at_most(
    tiny_pretrain: Path, tmp_path: Path, program: Program, kills: int, background: bool
) -> None:
    draw, run_dir = random.Random(kills + background), tmp_path / "run"
    settings = (*SHORT, "train.steps=100000", "checkpoint.every=1", f"checkpoint.background={background}")
    for _ in range(kills):
        process = program(
            "pretrain", tiny_pretrain, f"run_dir={run_dir}", *settings, f"checkpoint.keep={draw.choice([1, 2])}"
        )
        before = len(steps(run_dir))
        wait_until(lambda: process.poll() is not None or len(steps(run_dir)) > before + 2, "steps")  # noqa: B023
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.err
        under_way = 1 if background else 0  # a save in the background, while the next step is trained
        assert verified_step(run_dir) >= len(steps(run_dir)) - 1 - under_way
    done(
        program(
            "pretrain",
            tiny_pretrain,
            f"run_dir={run_dir}",
            *settings,
            f"train.steps={len(steps(run_dir)) + 3}",
            "checkpoint.allow_changes=true",
        )
    )
    losses_of(run_dir)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


@pytest.fixture
def operations(broken_off: Path, tiny_pretrain: Path, program: Program, harm: Harm, tmp_path: Path) -> int:
    """The file operations of the save at step 60, the deletion of the checkpoint before included."""
    counted = tmp_path / "counted"
    shutil.copytree(broken_off, counted)
    how = harm(mode="count", under=counted / "checkpoints", count=tmp_path / "count")
    done(program("pretrain", tiny_pretrain, f"run_dir={counted}", *SHORT, "checkpoint.keep=1", **how))
    return int((tmp_path / "count").read_text())


def at_operations(operations: int, thorough: bool) -> Iterator[int]:
    return iter(range(1, operations + 1, 1 if thorough else operations // 3))


@pytest.mark.slow
@pytest.mark.row(2)
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("mode", ["kill", "half"])
def test_death_after_any_operation_of_a_save_or_half_way_in_it(
    broken_off: Path, whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program, harm: Harm,
    operations: int, thorough: bool, mode: str,
) -> None:  # fmt: skip
    assert operations > 20
    for number in at_operations(operations, thorough):
        run_dir = tmp_path / f"run-{number}"
        shutil.copytree(broken_off, run_dir)
        how = harm(mode=mode, under=run_dir / "checkpoints", at=number)
        command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, "checkpoint.keep=1")
        assert program(*command, **how).wait() in (-signal.SIGKILL, 0)
        assert verified_step(run_dir) >= 40
        done(program(*command))
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000060"]
        assert_same_run(whole, run_dir)
        shutil.rmtree(run_dir)


@pytest.mark.slow
@pytest.mark.row(8)
def test_leftovers_of_unfinished_saves_are_ignored_and_removed(
    broken_off: Path, whole: Path, tiny_pretrain: Path, program: Program
) -> None:
    folder = broken_off / "checkpoints"
    for name in ("step-00000055.tmp", "step-00000050.replaced.tmp"):
        shutil.copytree(folder / "step-00000040", folder / name)
    shutil.copytree(folder / "step-00000040", folder / "step-00000052")
    (folder / "step-00000052" / "COMPLETE").unlink()
    process = done(program("pretrain", tiny_pretrain, f"run_dir={broken_off}", *SHORT))
    assert "going on after step 40 of 60" in process.out
    assert not list(folder.glob("*.tmp"))
    assert (folder / "step-00000052.damaged").is_dir()  # no save of this program leaves such a one, so a person decides
    assert losses_of(broken_off) == losses_of(whole)


@pytest.mark.slow
@pytest.mark.row(9)
@pytest.mark.parametrize("mode", ["enospc", "eio"])
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_any_operation_of_a_save_may_fail(
    broken_off: Path, whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program, harm: Harm,
    operations: int, thorough: bool, mode: str,
) -> None:  # fmt: skip
    """A save in the middle fails: training goes on, the older checkpoint stays, the losses are the same."""
    for number in at_operations(operations, thorough):
        run_dir = tmp_path / f"run-{number}"
        shutil.copytree(broken_off, run_dir)
        how = harm(mode=mode, under=run_dir / "checkpoints/step-00000050", at=number)
        command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, "checkpoint.every=10")
        process = done(program(*command, **how))
        assert "internal error" not in process.err
        assert verified_step(run_dir) == 60
        assert losses_of(run_dir) == losses_of(whole)
        shutil.rmtree(run_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 14 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "none", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
@pytest.mark.row(9)
def test_training_goes_on_with_a_full_disk_and_saves_when_there_is_room(
    whole: Path, tiny_pretrain: Path, small_disk: Path, program: Program
) -> None:
    run_dir = small_disk / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT)
    done(program(*command, "train.steps=60", "checkpoint.every=60"))
    shutil.rmtree(run_dir)
    filling = small_disk / "filling"
    process = program(*command)
    wait_until(
        lambda: (run_dir / "checkpoints/step-00000020/COMPLETE").exists() or process.poll() is not None, "a save"
    )
    process.send_signal(signal.SIGSTOP)
    free = os.statvfs(small_disk)
    filling.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 4096)))
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: "No space left" in process.out + process.err or process.poll() is not None, "a warning")
    assert process.poll() is None, "the last save waits for room"
    filling.unlink()
    assert process.wait(timeout=90) == 0, process.out + process.err
    assert verified_step(run_dir) == 60


@pytest.mark.row(10)
@pytest.mark.parametrize("where", ["run", "checkpoints"])
def test_a_read_only_folder_is_named_before_the_first_step(
    tiny_pretrain: Path, small_disk: Path, program: Program, where: str
) -> None:
    run_dir = small_disk / "run"
    if where == "checkpoints":
        (run_dir / "checkpoints").mkdir(parents=True)
        folder = run_dir / "checkpoints"
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    else:
        folder = small_disk
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    try:
        process = done(program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT), 2)
    finally:
        if where == "checkpoints":
            subprocess.run(["umount", folder], check=True)
    assert str(run_dir) in process.err
    assert "Read-only file system" in process.err
    assert "choose another run_dir" in process.err
    assert "step " not in process.out


@pytest.mark.row(10)
def test_a_disk_without_a_free_byte_is_named_before_the_first_step(
    tiny_pretrain: Path, small_disk: Path, program: Program
) -> None:
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filling").write_bytes(bytes(20_000_000))
    process = program("pretrain", tiny_pretrain, f"run_dir={small_disk / 'run'}", *SHORT)
    assert process.wait() in (1, 2)
    assert str(small_disk) in process.err
    assert "free some space" in process.err or "No space left on device" in process.err
    assert "internal error" not in process.err


@pytest.mark.slow
@pytest.mark.row(11)
def test_a_slow_disk_delays_saves_and_tears_none(
    whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program, harm: Harm
) -> None:
    run_dir = tmp_path / "run"
    how = harm(mode="slow", under=run_dir / "checkpoints")
    settings = (*SHORT, "train.steps=60", "checkpoint.every=10", "checkpoint.background=true")
    process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *settings, **how)
    while process.poll() is None:
        assert len(list((run_dir / "checkpoints").glob("*.tmp"))) <= 1
        time.sleep(0.01)
    assert process.returncode == 0, process.err
    assert verified_step(run_dir) == 60
    assert_same_run(whole, run_dir)


@pytest.mark.row(12)
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_an_error_of_the_saving_thread_ends_the_run(
    tiny_pretrain: Path, tmp_path: Path, program: Program, background: bool
) -> None:
    settings = (*SHORT, f"checkpoint.background={background}")
    process = program("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *settings, patch="saves_raise")
    assert process.wait() == 1
    assert "the saving thread broke" in process.err
    assert 20 <= len(steps(tmp_path / "run")) <= 21
    assert not events(tmp_path / "run", "finished")
