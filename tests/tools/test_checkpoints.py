"""`moe-lm checkpoint`: what it lists, verifies, compares and deletes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, retain, write
from moe_lm.checkpoint.recovery import newest_sound
from moe_lm.common import integrity
from moe_lm.train.folder import RunFolder

MoeLm = Callable[..., Any]
MODEL_FILE = "model/shard-00001-model-00001-of-00001.safetensors"


def save(run: Path, step: int, held_out: float | None = None, lr: float = 0.1, **changes: Tensor) -> Path:
    state = {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.ones(2), "exp_avg.a": torch.zeros(3, 4)}
    counters = json.dumps({"step": step, "loss": step / 2, "validation_loss": held_out})
    files = {"trainer.json": counters, "config.yaml": f"train:\n  lr: {lr}\n", "model.yaml": "hidden_size: 4\n"}
    return write.save(run / "checkpoints", step, {**state, **changes}, files)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 5: 2 is the best, 1 pinned, 4 moved aside as damaged, 6 unfinished."""
    checkpoint.pin(save(tmp_path, 1), "the base of adapters")
    save(tmp_path, 2, held_out=1.5)
    save(tmp_path, 3, held_out=2.5)
    flip(save(tmp_path, 4) / MODEL_FILE)
    newest_sound(tmp_path / "checkpoints")
    retain.note_held_out_loss(save(tmp_path, 5), 2.0)
    (tmp_path / "checkpoints" / "step-00000006.tmp").mkdir()
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_list_shows_every_checkpoint(run: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("checkpoint", "list", run)
    head, *lines = done.out.splitlines()
    assert head.split() == ["checkpoint", "saved", "MB", "loss", "held-out"]
    assert [line.split()[0] for line in lines] == names(run)
    assert "1.5000  best" in lines[1]
    assert "pinned: the base of adapters" in lines[0]
    assert f"damaged: {MODEL_FILE} does not have the checksum" in lines[3]
    assert lines[4].split()[-2:] == ["2.5000", "2.0000"]
    assert lines[5].endswith("unfinished")


def test_list_names_the_start_of_a_run_that_has_one(run: Path, moe_lm: MoeLm) -> None:
    assert "trained on from" not in moe_lm("checkpoint", "list", run).out
    files = {"start.yaml": "origin: /models/base\nfingerprint: abc\n"}
    write.save(run / "checkpoints", 7, {"model.a": torch.ones(1)}, files)
    assert moe_lm("checkpoint", "list", run).out.endswith("\ntrained on from /models/base\n")


def test_list_as_json_has_the_same(run: Path, moe_lm: MoeLm) -> None:
    rows = json.loads(moe_lm("checkpoint", "list", run, "--json").out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["held_out_loss"] for row in rows] == [None, 1.5, 2.5, None, 2.0, None]
    assert [row["loss"] for row in rows][:3] == [0.5, 1.0, 1.5]
    assert [row["best"] for row in rows] == [False, True, False, False, False, False]
    files = (run / "checkpoints" / "step-00000003").rglob("*")
    assert rows[2]["bytes"] == sum(path.stat().st_size for path in files if path.is_file())


def test_verify_names_every_damaged_file(run: Path, moe_lm: MoeLm) -> None:
    newest = run / "checkpoints" / "step-00000005"
    done = moe_lm("checkpoint", "verify", newest)
    assert (done.code, done.out) == (0, f"{newest}: sound\n")
    flip(newest / MODEL_FILE)
    (newest / "config.yaml").unlink()
    done = moe_lm("checkpoint", "verify", run)
    assert done.code == 1
    assert f"{newest}: {MODEL_FILE} does not have the checksum that the manifest gives\n" in done.out
    assert f"{newest}: config.yaml is missing\n" in done.out
    assert f"{run / 'checkpoints' / 'step-00000003'}: sound\n" in done.out
    assert f"step-00000004.damaged: {MODEL_FILE} does not have" in done.out


def test_diff_of_equal_checkpoints_is_empty(tmp_path: Path, moe_lm: MoeLm) -> None:
    one, other = (save(tmp_path / name, 1) for name in ("one", "other"))
    assert moe_lm("checkpoint", "diff", one, other.parent.parent) == moe_lm("checkpoint", "diff", other, one)
    done = moe_lm("checkpoint", "diff", one, other)
    assert (done.code, done.out) == (0, "equal to the bit\n")


def test_diff_names_settings_shapes_and_the_largest_difference(
    tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lm.checkpoint.safetensors_file.PIECE_BYTES", 16)  # a row at a time
    one = save(tmp_path / "one", 1)
    changed = torch.arange(12.0).view(3, 4)
    changed[0, 1], changed[2, 3] = 1.25, 10.5
    other = save(tmp_path / "other", 1, lr=0.2, **{
        "model.a": changed, "model.b": torch.ones(2).bfloat16(), "exp_avg.a": torch.zeros(4, 3),
        "exp_avg.b": torch.tensor(float("nan")),
    })  # fmt: skip
    done = moe_lm("checkpoint", "diff", one, other)
    assert done.code == 1
    assert done.out.splitlines() == [
        "config.yaml  train.lr: 0.1 -> 0.2",
        "model.a  largest difference 0.5",
        "model.b  float32 -> bfloat16, largest difference 0",
        "exp_avg.a  [3, 4] -> [4, 3]",
        f"exp_avg.b  is in {other} alone",
        "they differ",
    ]


def test_diff_tells_nan_from_numbers(tmp_path: Path, moe_lm: MoeLm) -> None:
    spoiled = torch.arange(12.0).view(3, 4)
    spoiled[0, 0] = float("nan")
    one, other = save(tmp_path / "one", 1), save(tmp_path / "other", 1, **{"model.a": spoiled})
    assert "model.a  largest difference nan" in moe_lm("checkpoint", "diff", one, other).out
    assert moe_lm("checkpoint", "diff", other, other).code == 0


def test_diff_of_a_damaged_checkpoint_is_an_error(tmp_path: Path, moe_lm: MoeLm) -> None:
    one, other = save(tmp_path / "one", 1), save(tmp_path / "other", 1)
    flip(other / MODEL_FILE)
    done = moe_lm("checkpoint", "diff", one, other)
    assert (done.code, done.out) == (2, "")
    assert f"{other} is damaged: {MODEL_FILE} does not have" in done.err


def test_verify_of_a_checkpoint_that_is_not_there_is_misuse(run: Path, moe_lm: MoeLm) -> None:
    absent = run / "checkpoints" / "step-00000099"
    done = moe_lm("checkpoint", "verify", absent)
    assert (done.code, done.out) == (2, "")
    assert f"there is no folder {absent}" in done.err


def test_a_verb_that_uses_a_doubtful_checkpoint_says_so(run: Path, moe_lm: MoeLm) -> None:
    doubtful = save(run, 7)
    (doubtful / checkpoint.DOUBTFUL).write_text("the last step was skipped\n")
    done = moe_lm("checkpoint", "diff", run, run / "checkpoints" / "step-00000005")
    (line,) = done.err.splitlines()
    good = run / "checkpoints" / "step-00000005"
    assert line == f"warning: {doubtful} is doubtful: the last step was skipped; the newest good one is {good}"


def test_verify_names_a_file_that_cannot_be_read(run: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, kind: str) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(integrity, "checksum_of", failing)
    done = moe_lm("checkpoint", "verify", run / "checkpoints" / "step-00000005")
    assert done.code == 1
    assert "cannot be read: Input/output error" in done.out + done.err


def test_prune_keeps_the_newest_the_best_and_pinned_ones(run: Path, moe_lm: MoeLm) -> None:
    before = names(run)
    done = moe_lm("checkpoint", "prune", run, "--keep", "1", "--dry-run")
    gone = ["step-00000003", "step-00000004.damaged", "step-00000006.tmp"]
    folders = [str(run / "checkpoints" / name) for name in gone]
    assert [line.split(", ")[0] for line in done.out.splitlines()] == [f"would delete {folder}" for folder in folders]
    assert names(run) == before
    done = moe_lm("checkpoint", "prune", run, "--keep", "1")
    assert [line.split(", ")[0] for line in done.out.splitlines()] == [f"deleted {folder}" for folder in folders]
    assert names(run) == ["step-00000001", "step-00000002", "step-00000005"]


def test_prune_never_counts_a_doubtful_one(run: Path, moe_lm: MoeLm) -> None:
    """The newest good one is what a rollback needs; the doubtful one after it is what a resumed run goes on from."""
    (save(run, 7) / checkpoint.DOUBTFUL).write_text("the last step was skipped\n")
    assert moe_lm("checkpoint", "list", run).out.splitlines()[-1].endswith("doubtful: the last step was skipped")
    assert moe_lm("checkpoint", "prune", run, "--keep", "1").code == 0
    assert names(run) == ["step-00000001", "step-00000002", "step-00000005", "step-00000007"]


def test_prune_deletes_nothing_if_what_would_stay_is_damaged(run: Path, moe_lm: MoeLm) -> None:
    flip(run / "checkpoints" / "step-00000005" / MODEL_FILE)
    before = names(run)
    done = moe_lm("checkpoint", "prune", run, "--keep", "1")
    assert done.code == 1
    assert f"nothing is deleted, because {run / 'checkpoints' / 'step-00000005'}" in done.err
    assert names(run) == before


def test_prune_leaves_a_run_that_trains_alone(run: Path, moe_lm: MoeLm) -> None:
    with RunFolder(run):
        done = moe_lm("checkpoint", "prune", run, "--keep", "1")
    assert done.code == 1
    assert "is in use by process" in done.err


@pytest.mark.parametrize("verb", [("list",), ("verify",), ("prune", "--keep", "1")])
def test_what_is_no_run_is_named(tmp_path: Path, moe_lm: MoeLm, verb: tuple[str, ...]) -> None:
    done = moe_lm("checkpoint", verb[0], tmp_path, *verb[1:])
    assert done.code == 2
    assert f"{tmp_path} is not a run folder" in done.err
