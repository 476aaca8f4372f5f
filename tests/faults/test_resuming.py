"""Runs that go on: in the same layout and in another, past damage, with other settings (rows 3 to 7, 32, 33)."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import SHORT, Program, done, losses_of, start_ranks, steps
from tests.faults.harming import flip_a_bit
from tests.processes import layout, wait_until
from tests.runs import assert_same_run, figures, tensors

MUON = ("train.optimizer.name=muon",)
IN_BACKGROUND = ("checkpoint.background=true",)
STOPPED = 75  # everything is saved; the same command goes on


def run_of(program: Program, world_size: int, *arguments: object, code: int = 0) -> None:
    ranks = start_ranks(program, world_size, *arguments) if world_size > 1 else [program(*arguments)]
    for rank in ranks:
        done(rank, code)


@pytest.mark.slow
@pytest.mark.row(3)
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, IN_BACKGROUND),
        pytest.param(1, (*MUON, "train.precision=bfloat16"), marks=pytest.mark.slow),
        pytest.param(1, ("train.optimizer.name=lamb",), marks=pytest.mark.slow),
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(2, layout(2, 1), marks=pytest.mark.slow),
        pytest.param(2, (*layout(2, 2), "train.precision=bfloat16", *IN_BACKGROUND), marks=pytest.mark.slow),
        pytest.param(2, layout(2, 3), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_twice_is_the_one_that_was_not(
    tiny_pretrain: Path, tmp_path: Path, program: Program, world_size: int, settings: tuple[str, ...]
) -> None:
    parted, undivided = tmp_path / "parted", tmp_path / "undivided"
    run_of(program, world_size, "pretrain", tiny_pretrain, f"run_dir={undivided}", *SHORT, *settings)
    command = ("pretrain", tiny_pretrain, f"run_dir={parted}", *SHORT, *settings)
    for until in (7, 25):
        ranks = start_ranks(program, world_size, *command) if world_size > 1 else [program(*command)]
        wait_until(lambda: len(steps(parted)) >= until or ranks[0].poll() is not None, f"{until} steps")  # noqa: B023
        ranks[-1].send_signal(signal.SIGTERM)
        for rank in ranks:
            done(rank, STOPPED)
        assert len(steps(parted)) < 60
    run_of(program, world_size, *command)
    assert_same_run(undivided, parted)


@pytest.mark.slow
@pytest.mark.row(4)
@pytest.mark.parametrize(
    "layouts",
    [
        ((2, layout(2, 2)), (1, ())),
        pytest.param(((1, ()), (2, layout(2, 2)), (4, layout(4, 3)), (2, ()), (1, ())), marks=pytest.mark.slow),
        pytest.param(((4, layout(2, 1)), (1, layout(1, 2)), (2, layout(1, 3))), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_changes_its_layout_sees_the_same_tokens_and_losses(
    whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program, layouts: tuple[tuple[int, tuple[str, ...]], ...]
) -> None:
    run_dir = tmp_path / "run"
    for number, (world_size, settings) in enumerate(layouts, 1):
        until = 60 * number // len(layouts)
        command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, *settings, "parallel.device=cpu")
        ranks = start_ranks(program, world_size, *command) if world_size > 1 else [program(*command)]
        if number < len(layouts):
            wait_until(lambda: len(steps(run_dir)) >= until or ranks[0].poll() is not None, f"{until} steps")  # noqa: B023
            ranks[0].send_signal(signal.SIGTERM)
        for rank in ranks:
            done(rank, STOPPED if number < len(layouts) else 0)
    assert [line["tokens"] for line in steps(run_dir)] == [line["tokens"] for line in steps(whole)]
    assert losses_of(run_dir) == pytest.approx(losses_of(whole), rel=1e-6)


# Past damage


def flipped(folder: Path) -> str:
    file = next((folder / "model").glob("*.safetensors"))
    flip_a_bit(file)
    return f"model/{file.name}"


def flipped_moment(folder: Path) -> str:
    file = next((folder / "optimizer").glob("*.safetensors"))
    flip_a_bit(file)
    return f"optimizer/{file.name}"


def cut(folder: Path) -> str:
    file = next((folder / "model").glob("*.safetensors"))
    os.truncate(file, 1000)
    return f"model/{file.name}"


def empty(folder: Path) -> str:
    file = next((folder / "optimizer").glob("*.safetensors"))
    os.truncate(file, 0)
    return f"optimizer/{file.name}"


def missing(folder: Path) -> str:
    file = next((folder / "model").glob("*.safetensors"))
    file.unlink()
    return f"model/{file.name}"


def another_manifest(folder: Path) -> str:
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-20])
    return "manifest.json"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flipped, marks=pytest.mark.row(5)),
        pytest.param(flipped_moment, marks=[pytest.mark.row(5), pytest.mark.slow]),
        pytest.param(cut, marks=[pytest.mark.row(6), pytest.mark.slow]),
        pytest.param(empty, marks=pytest.mark.row(6)),
        pytest.param(missing, marks=[pytest.mark.row(7), pytest.mark.slow]),
        pytest.param(another_manifest, marks=[pytest.mark.row(6), pytest.mark.slow]),
    ],
    ids=lambda damage: damage.__name__,
)
def test_the_same_command_goes_on_from_the_newest_checkpoint_that_verifies(
    broken_off: Path, whole: Path, tiny_pretrain: Path, program: Program, damage: Callable[[Path], str]
) -> None:
    newest = broken_off / "checkpoints" / "step-00000040"
    name = damage(newest)
    process = done(program("pretrain", tiny_pretrain, f"run_dir={broken_off}", *SHORT))
    assert "going on after step 20 of 60" in process.out
    said = process.out + process.err
    assert newest.name in said
    assert name in said
    assert losses_of(broken_off) == losses_of(whole)


@pytest.mark.slow
@pytest.mark.row(5)
@pytest.mark.row(6)
def test_two_damaged_checkpoints_are_passed_over_for_a_third(
    broken_off: Path, whole: Path, tiny_pretrain: Path, program: Program
) -> None:
    folder = broken_off / "checkpoints"
    flipped(folder / "step-00000040")
    shutil.copytree(folder / "step-00000040", folder / "step-00000045")
    done(program("pretrain", tiny_pretrain, f"run_dir={broken_off}", *SHORT))
    assert losses_of(broken_off) == losses_of(whole)


@pytest.mark.row(5)
@pytest.mark.row(6)
@pytest.mark.row(7)
def test_when_none_verifies_nothing_is_begun_anew(broken_off: Path, tiny_pretrain: Path, program: Program) -> None:
    before = figures(broken_off)
    for folder in (broken_off / "checkpoints").iterdir():
        flipped(folder)
    process = done(program("pretrain", tiny_pretrain, f"run_dir={broken_off}", *SHORT), 1)
    assert "is sound" in process.err
    assert "internal error" not in process.err
    assert figures(broken_off) == before


@pytest.mark.row(7)
@pytest.mark.slow
def test_two_ranks_agree_on_the_checkpoint_when_a_file_of_one_is_missing(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    run_dir = tmp_path / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, *layout(2, 2))
    run_of(program, 2, *command, "checkpoint.keep=9")
    expected = losses_of(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000060")
    max((run_dir / "checkpoints" / "step-00000040" / "optimizer").glob("*.safetensors")).unlink()
    run_of(program, 2, *command)
    assert losses_of(run_dir) == expected


@pytest.mark.row(5)
def test_a_damaged_checkpoint_is_not_sampled_from(broken_off: Path, program: Program) -> None:
    newest = broken_off / "checkpoints" / "step-00000040"
    name = flipped(newest)
    process = program("sample", broken_off, "--prompt", "a", "--max-new-tokens", "3")
    assert process.wait() == 1
    assert name in process.err
    assert "step-00000020" in process.err


# One folder, one job, one config


@pytest.mark.row(32)
def test_the_second_job_on_a_folder_is_told_who_holds_it(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, "train.steps=100000")
    first = program(*command)
    wait_until(lambda: len(steps(tmp_path / "run")) > 3, "steps")
    for stopped in (False, True):
        if stopped:
            first.send_signal(signal.SIGSTOP)
        second = program(*command)
        assert second.wait() in (1, 2)
        assert f"is in use by process {first.pid}" in second.err
    first.kill()
    first.wait()
    for file in (tmp_path / "run").glob("*.jsonl"):
        file.unlink()
    third = program(*command)
    wait_until(lambda: len(steps(tmp_path / "run")) > 3 or third.poll() is not None, "the third to train")
    third.send_signal(signal.SIGINT)
    done(third, STOPPED)


@pytest.mark.slow
@pytest.mark.row(33)
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.seed=5", "train.seed"),
        ("model.num_experts_per_tok=3", "model.num_experts_per_tok: 2 -> 3"),
        ("train.optimizer.lr=0.5", "train.optimizer.lr"),
    ],
)
def test_another_config_is_refused_with_the_difference_unless_forced(
    broken_off: Path, tiny_pretrain: Path, program: Program, setting: str, said: str
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={broken_off}", *SHORT, setting)
    before = tensors(broken_off / "checkpoints" / "step-00000040")
    process = done(program(*command), 2)
    assert said in process.err
    assert "checkpoint.allow_changes=true" in process.err
    assert before.keys() == tensors(broken_off / "checkpoints" / "step-00000040").keys()
    forced = done(program(*command, "checkpoint.allow_changes=true"))
    assert said.split(":")[0] in forced.out


@pytest.mark.row(33)
def test_another_tokenizer_is_refused(broken_off: Path, tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    from tests.processes import ROOT

    other = shutil.copytree(ROOT / "tokenizer" / "tiny", tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"th"', '"??"', 1).replace('"he"', '"th"', 1), encoding="utf-8")
    process = program("pretrain", tiny_pretrain, f"run_dir={broken_off}", *SHORT, f"data.tokenizer={other}")
    assert process.wait() in (1, 2)
    assert "tokenizer" in process.err
    assert "internal error" not in process.err
