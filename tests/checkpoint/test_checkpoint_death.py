"""A save that fails, dies or is killed leaves a whole checkpoint (FAULTS rows 1, 2, 8, 9); so do several ranks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lm
from moe_lm.checkpoint import checkpoint, read, retain, write
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import CheckpointConfig
from tests.checkpoint.conftest import state_of

# Failures while saving


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failed_save_says_why_and_leaves_the_old_checkpoints(
    checkpoints: Path, newest: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(MoeLmError, match=r"step-00001500: No space left on device"):
        write.save(checkpoints, 1500, state_of(1), {})
    monkeypatch.undo()
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000500", "step-00001000"]
    read.load(newest, state_of(0))
    write.save(checkpoints, 1500, state_of(1), {})


def test_a_full_disk_says_so(checkpoints: Path, newest: Path) -> None:
    """A real file-size limit, met in the middle of a tensor file."""
    program = (
        "import resource, signal, sys; from pathlib import Path; import torch\n"
        "from moe_lm.checkpoint import checkpoint, read, write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write.save(Path(sys.argv[1]), 1500, {'model.a': torch.zeros(100_000)}, {})\n"
    )
    _, _, errors = finish(start_python("-c", program, str(checkpoints)))
    assert "WriteError: cannot write the checkpoint" in errors
    assert "File too large" in errors
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000500", "step-00001000"]
    read.load(newest, state_of(0))


def test_an_interrupted_save_is_an_interrupt(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write.save(checkpoints, 1500, state_of(1), {})
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000500", "step-00001000"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(MoeLmError, match=r"checkpoints/step-00000001: Not a directory"):
        write.save(tmp_path / "checkpoints", 1, state_of(1), {})


# On the disk


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "the same step again"])
def test_every_file_and_folder_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_step: bool
) -> None:
    """What a power cut leaves: fsync of each file and folder, COMPLETE after all others, and the folder around them."""
    checkpoints, done = tmp_path / "checkpoints", list[tuple[str, str]]()
    fsync, rename = os.fsync, os.rename
    write.save(checkpoints, 1, state_of(1), {})

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), checkpoints)))

    def noted_rename(old: Any, new: Any) -> None:
        rename(old, new)
        done.append(("rename", f"{Path(old).name} {Path(new).name}"))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    step = 1 if same_step else 2
    folder = write.save(checkpoints, step, state_of(2), {"config.yaml": "a: 1\n", "tokenizer/a.json": "{}"})
    named = done.index(("rename", f"{folder.name}.tmp {folder.name}"))
    synced = [path for kind, path in done[:named] if kind == "fsync"]
    content = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    assert {f"{folder.name}.tmp/{name}" for name in content} <= set(synced)
    order = [synced.index(f"{folder.name}.tmp/{name}") for name in content if name != "COMPLETE"]
    assert max(order) < synced.index(f"{folder.name}.tmp/COMPLETE") < len(synced) - 1
    assert synced[-1] == f"{folder.name}.tmp"  # its entry COMPLETE
    assert ("fsync", ".") in done[named + 1 :]


# Death while saving


class Died(BaseException):
    """Stands for the end of the process: nothing after it reaches the disk."""


class Death:
    """Lets so many file operations below a folder happen, then none any more.

    Python reports opening, creating, renaming and deleting to audit hooks before it does them; `os.fsync` is
    patched, for the deaths after a write and before its fsync. A hook stays for good, so it asks whether it is armed.
    """

    def __init__(self) -> None:
        self.root: str | None = None
        self.left = 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        below = self.root is not None and self.root in str(arguments)
        if (below and event in {"open", "os.mkdir", "os.rename"}) or (event in {"os.remove", "os.rmdir"}):
            self.operation()

    def operation(self) -> None:
        if self.root is None:
            return
        if self.left == 0:
            raise Died
        self.left -= 1


@pytest.fixture(scope="session")
def death_hook() -> Death:
    return Death()


@pytest.fixture
def death(death_hook: Death, monkeypatch: pytest.MonkeyPatch) -> Iterator[Death]:
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        death_hook.operation()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    yield death_hook
    death_hook.root = None


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "the same step again"])
def test_death_after_any_file_operation_leaves_a_checkpoint(tmp_path: Path, death: Death, same_step: bool) -> None:
    for allowed in range(1000):
        checkpoints = tmp_path / f"{allowed}"
        write.save(checkpoints, 1, state_of(1), {})
        death.root, death.left = str(checkpoints), allowed
        finished = False
        try:
            write.save(checkpoints, 1 if same_step else 2, state_of(2), {"config.yaml": "a: 1\n"})
            retain.clean(checkpoints, CheckpointConfig(keep=1))
            finished = True
        except Died:
            pass
        death.root = None
        folder = checkpoint.latest(checkpoints)
        assert folder is not None
        loaded = state_of(0)
        read.load(folder, loaded)
        value = int(loaded["model.weight"][0, 0])
        assert all(torch.equal(tensor, state_of(value)[name]) for name, tensor in loaded.items())
        retain.clean(checkpoints, CheckpointConfig(keep=1))
        assert list(checkpoints.iterdir()) == [folder]
        if finished:
            assert value == 2
            break
    assert 20 < allowed < 999


def test_fifty_kills_each_leave_a_verified_checkpoint(tmp_path: Path) -> None:
    _, output, errors = finish(start_python(str(Path(__file__).parent / "killed_saves.py"), str(tmp_path), "50"))
    results = [json.loads(line) for line in output.splitlines()]
    assert len(results) == 50, errors
    for result in results:
        assert result["whole"]
        assert result["loaded"] >= result["acknowledged"]
        assert result["after_clean"] == [Path(result["latest_after_clean"]).name]
    assert any(result["leftovers"] for result in results)


# Several ranks


def test_two_ranks_save_together_and_any_layout_loads(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "checkpoint_over_ranks.py")
    ranks = [start_python(script, str(tmp_path), str(rank)) for rank in range(2)]
    for process in ranks:
        code, _, errors = finish(process)
        assert code == 0, errors
    folder = checkpoint.resolve(tmp_path / "run")
    assert len(list(folder.glob("*/shard-*.safetensors"))) == 4
    loaded = {
        "model.experts": torch.zeros(4, 3, 2),
        "model.norm": torch.zeros(5),
        "exp_avg.experts": torch.zeros(4, 3, 2),
        "exp_avg.norm": torch.zeros(5),
    }
    read.load(folder, loaded)
    assert torch.equal(loaded["model.experts"], torch.arange(24.0).view(4, 3, 2))
    assert torch.equal(loaded["exp_avg.experts"], -torch.arange(24.0).view(4, 3, 2))
    assert torch.equal(loaded["model.norm"], torch.ones(5))


def start_python(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(moe_lm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a process that ends by itself."""
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, errors
