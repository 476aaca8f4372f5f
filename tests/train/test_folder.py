"""The run folder: made and writable before step 1, one job at a time, its config compared (FAULTS rows 10, 32, 33)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import moe_lm
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.train.folder import RunFolder
from moe_lm.train.settings import compare_config

HOLD = (
    "import sys, time; from pathlib import Path; from moe_lm.train.folder import RunFolder\n"
    "with RunFolder(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    """Another process that has the run folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(moe_lm.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_folder_and_its_checkpoints_are_made(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "runs" / "a") as run:
        assert run.path.is_dir()
        assert run.checkpoints == tmp_path / "runs" / "a" / "checkpoints"
        assert run.checkpoints.is_dir()


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = hold_elsewhere(tmp_path)
    try:
        for _ in range(2):  # being refused takes nothing from the holder
            with pytest.raises(MoeLmError, match=rf"in use by process {holder.pid} on .* since 20\d\d-.*run_dir"):
                RunFolder(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_leaves_the_folder_free(tmp_path: Path) -> None:
    holder = hold_elsewhere(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path), pytest.raises(MoeLmError, match=f"process {os.getpid()} "):
        RunFolder(tmp_path).__enter__()
    with RunFolder(tmp_path) as again:
        assert again.path == tmp_path


def test_an_unreadable_note_of_the_holder_does_not_matter(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        for note in ("", "[]", "{}"):
            (run.path / ".lock-holder.json").write_text(note)
            with pytest.raises(MoeLmError, match="in use by another process"):
                RunFolder(tmp_path).__enter__()


def test_a_deleted_lock_is_taken_again_and_a_second_writer_noticed(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as first:
        first.keep_lock()
        (tmp_path / ".lock").unlink()
        first.keep_lock()
        with pytest.raises(MoeLmError, match="is in use by process"):
            RunFolder(tmp_path).__enter__()
        (tmp_path / ".lock").unlink()
        with RunFolder(tmp_path), pytest.raises(MoeLmError, match=f"deleted, and process {os.getpid()} .*trains"):
            first.keep_lock()


def test_a_full_disk_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(tmp_path) as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(MoeLmError, match=r"cannot write .*config\.yaml: No space left on device; make room"):
            run.write_config("a: 1")


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/run: Not a directory"):
        RunFolder(tmp_path / "file" / "run").__enter__()


def test_a_read_only_folder_is_named_with_the_reason(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(UsageError, match=r"run/checkpoints: Permission denied"):
        RunFolder(tmp_path / "run").__enter__()


def test_a_read_only_file_system_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UsageError, match=f"cannot write to the run folder {tmp_path}: Read-only file system"):
        RunFolder(tmp_path).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A launcher starts the run again, for there may be room by then."""

    def full(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(MoeLmError, match=f"cannot write to the run folder {tmp_path}: .*; make room") as raised:
        RunFolder(tmp_path).__enter__()
    assert raised.value.exit_code == 1


def test_the_config_is_kept_and_replaced(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        for text in ("train:\n  steps: 10\n", "train:\n  steps: 20 # 字\n"):
            run.write_config(text)
            assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == text
    assert not (tmp_path / "config.yaml.tmp").exists()


def test_compare_config_lists_what_differs() -> None:
    old = {"run_dir": "a", "model": {"hidden_size": 32, "gone": 1}, "train": {"optimizer": {"betas": [0.9, 0.95]}}}
    new = {"run_dir": "a", "model": {"hidden_size": 64}, "train": {"optimizer": {"betas": [0.9, 0.99]}, "seed": None}}
    assert compare_config(old, new) == [
        "model.hidden_size: 32 -> 64",
        "train.optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "train.seed: (absent) -> None",
        "model.gone: 1 -> (absent)",
    ]
    assert compare_config(old, old) == []
