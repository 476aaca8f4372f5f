"""Pretraining through the command line: resumed to the bit, stopped by signals, refused when something does not fit."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.batches import Batch
from moe_lm.data.prepare import prepare
from moe_lm.model.size import count_parameters
from moe_lm.parallel.topology import Topology
from moe_lm.train import pretrain
from moe_lm.train.folder import RunFolder
from tests.processes import ENVIRONMENT, metrics, runs, wait_until
from tests.runs import assert_same_run, figures, last_checkpoint, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
MoeLm = Callable[..., Any]
Start = Callable[..., subprocess.Popen[str]]
SHORT = ("train.steps=12", "checkpoint.keep=9", "train.eval_batches=1")


def held_out_batches(config: PretrainConfig) -> list[Batch]:
    shards = pretrain.open_shards(config, "validation", pretrain.load_tokenizer(config))
    by_source = pretrain.validation_batches(config, shards, Topology())
    return [batch for batches in by_source.values() for batch in batches]


# Resume


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adamw", "bfloat16"),
        ("muon", "float32"),
        pytest.param("adamw", "float32", marks=pytest.mark.slow),
        pytest.param("lamb", "bfloat16", marks=pytest.mark.slow),
        pytest.param("muon", "bfloat16", marks=pytest.mark.slow),
        pytest.param("lamb", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_bit_in_a_new_process(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, start_moe_lm: Start, optimizer: str, precision: str
) -> None:
    """12 steps at once, against 12 with a SIGKILL after the third (FAULTS row 3)."""
    settings = [*SHORT, f"train.optimizer.name={optimizer}", f"train.precision={precision}"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert moe_lm("pretrain", tiny_pretrain, f"run_dir={whole}", *settings).code == 0
    command = ("pretrain", tiny_pretrain, f"run_dir={parted}", "checkpoint.every=3", *settings)
    first = start_moe_lm(*command)
    wait_until(lambda: runs(first) and (parted / "checkpoints" / "step-00000003").is_dir(), "the first checkpoint")
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    done = moe_lm(*command)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"going on after step (3|6|9) of 12", done.out)
    assert [line["step"] for line in metrics(parted)] == list(range(1, 13))
    assert_same_run(whole, parted)


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit(tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start) -> None:
    """As the quickstart trains: compiled, in bfloat16, with Muon."""
    settings = [*SHORT, "train.compile=true", "train.optimizer.name=muon", "train.precision=bfloat16"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    command = ("pretrain", tiny_pretrain, f"run_dir={parted}", "checkpoint.every=6", *settings)
    for arguments in (("pretrain", tiny_pretrain, f"run_dir={whole}", *settings), command, command):
        shutil.rmtree(parted / "checkpoints" / "step-00000012", ignore_errors=True)
        process = start_moe_lm(*arguments)
        _, err = process.communicate()
        assert (process.returncode, err) == (0, "")
    assert_same_run(whole, parted)


@pytest.fixture(scope="module")
def uninterrupted(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 60 steps at once."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain.run(load_config(PretrainConfig, tiny_pretrain, [f"run_dir={run_dir}", "train.steps=60"]))
    torch.set_num_threads(threads)
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start, uninterrupted: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "a run"  # a space, which the printed command has to quote
    command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", "train.steps=60")
    process = start_moe_lm(*command)
    wait_for_step(process, run_dir, 3)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, err) == (75, "")
    stopped_at = len(metrics(run_dir))
    assert 3 <= stopped_at < 60
    message, _, typed = out.splitlines()[-1].partition(", run again: ")
    assert message == f"stopped after step {stopped_at}; to go on"
    assert last_checkpoint(run_dir).name == f"step-{stopped_at:08d}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    again = subprocess.run(typed, shell=True, capture_output=True, text=True, env=environment)
    assert (again.returncode, again.stderr) == (0, "")
    assert_same_run(uninterrupted, run_dir)
    biases = [tensor for name, tensor in tensors(last_checkpoint(run_dir)).items() if "e_score_correction" in name]
    assert any(bias.any() for bias in biases)  # they have moved, so that equal ones say something


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_closed_terminal_saves_and_the_log_says_so(tiny_pretrain: Path, tmp_path: Path) -> None:
    """FAULTS row 35. Its live bar is still shown when there is nothing left to show it on."""
    master, terminal = pty.openpty()

    def login() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "moe_lm", "pretrain", str(tiny_pretrain), f"run_dir={tmp_path}"]
    environment = os.environ | ENVIRONMENT | {"TERM": "xterm"}
    process = subprocess.Popen(
        [*command, "train.steps=100000"], stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=login,
        env=environment, text=True,
    )  # fmt: skip
    os.close(terminal)
    wait_for_step(process, tmp_path, 3)
    os.close(master)
    assert process.wait(timeout=60) == 75
    stopped_at = len(metrics(tmp_path))
    assert last_checkpoint(tmp_path).name == f"step-{stopped_at:08d}"
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert f"stopping after step {stopped_at}: SIGHUP, the terminal was closed\n" in log
    assert f"stopped after step {stopped_at}; to go on, run again: " in log


def test_a_run_needs_no_folder_of_temporary_files(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tidied while a run of weeks goes on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, "checkpoint.every=5")
    assert (done.code, done.err) == (0, "")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def test_a_finished_run_says_so_and_does_nothing(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT)
    first = moe_lm(*command)
    assert first.code == 0
    loss = figures(tmp_path)[-1]["val_loss"]
    assert f"lowest held-out loss: {loss:.4f} after step 12 ({last_checkpoint(tmp_path)})" in first.out
    assert f"next: moe-lm sample {tmp_path} --prompt TEXT, moe-lm eval {tmp_path}, moe-lm finetune CONFIG" in first.out
    before = figures(tmp_path)
    done = moe_lm(*command)
    assert (done.code, done.err) == (0, "")
    assert "this run is finished: all 12 steps are done" in done.out
    assert figures(tmp_path) == before


def test_an_epoch_reads_every_row_once(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    """The shards say how many steps, in a run as in a dry run."""
    settings = [f"run_dir={tmp_path}", "train.epochs=0.1", "train.eval_batches=1"]
    config = load_config(PretrainConfig, tiny_pretrain, settings)
    [shards] = pretrain.open_shards(config, "train", pretrain.load_tokenizer(config))
    steps = -(-((shards.num_tokens - 1) // 64) // (8 * 10))
    assert f"the run         {steps} steps" in moe_lm("pretrain", tiny_pretrain, *settings, "--dry-run").out
    assert moe_lm("pretrain", tiny_pretrain, *settings).code == 0
    assert len(metrics(tmp_path)) == steps
    train = load_config(PretrainConfig, tmp_path / "config.yaml").train
    assert (train.steps, train.epochs) == (steps, None)
    assert f"this run is finished: all {steps} steps are done" in moe_lm("pretrain", tiny_pretrain, *settings).out


def test_an_unfinished_newest_checkpoint_is_passed_over(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    """FAULTS row 8: what a killed save leaves goes; a folder whose COMPLETE is gone is damaged."""
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "checkpoint.every=5")
    assert moe_lm(*command).code == 0
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000012" / "COMPLETE").unlink()
    (checkpoints / "step-00000010").rename(checkpoints / "step-00000011.tmp")
    done = moe_lm(*command)
    assert done.code == 0
    assert "going on after step 5 of 12" in done.out
    steps = [f"step-{step:08d}" for step in (5, 10, 12)]
    assert sorted(path.name for path in checkpoints.iterdir()) == [*steps, "step-00000012.damaged"]


# Another config, another tokenizer (FAULTS row 33)


@pytest.fixture
def trained(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> tuple[Any, ...]:
    """The command of a finished run."""
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT)
    assert moe_lm(*command).code == 0
    return command


def test_another_config_is_refused_with_every_difference(
    trained: tuple[Any, ...], tmp_path: Path, moe_lm: MoeLm
) -> None:
    config = (tmp_path / "run" / "config.yaml").read_text()
    done = moe_lm(*trained, "model.hidden_size=64", "train.optimizer.lr=0.1", "train.steps=20")
    assert done.code == 2
    assert done.err == (
        f"error: {tmp_path / 'run'} holds a run with other settings (model.hidden_size: 32 -> 64; "
        "train.steps: 12 -> 20; train.optimizer.lr: 0.003 -> 0.1); set run_dir to a new folder, undo the changes, or "
        "keep them with checkpoint.allow_changes=true\n"
    )
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert len(metrics(tmp_path / "run")) == 12


def test_another_config_is_taken_when_it_is_asked_for(trained: tuple[Any, ...], tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm(*trained, "train.optimizer.lr=0.1", "train.steps=20", "checkpoint.allow_changes=true")
    assert done.code == 0, done.err
    assert "going on after step 12 of 20" in done.out
    assert "with other settings than before" in done.out
    assert "train.steps: 12 -> 20; train.optimizer.lr: 0.003 -> 0.1" in done.out
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 21))
    kept = load_config(PretrainConfig, tmp_path / "run" / "config.yaml")
    assert (kept.train.steps, kept.train.optimizer.lr) == (20, 0.1)


def test_another_shape_is_refused_all_the_same(trained: tuple[Any, ...], tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm(*trained, "model.hidden_size=64", "train.steps=20", "checkpoint.allow_changes=true")
    assert done.code == 1
    assert "expected [1024, 64]; the model settings differ from those it was trained with" in done.err
    assert load_config(PretrainConfig, tmp_path / "run" / "config.yaml").model.hidden_size == 32


def test_another_tokenizer_under_the_same_path_is_refused(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    config = load_config(PretrainConfig, tiny_pretrain)
    shutil.copytree(config.data.tokenizer, tmp_path / "tokenizer")
    overrides = [f"data.tokenizer={tmp_path / 'tokenizer'}", f"data.shards={tmp_path / 'shards'}"]
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *overrides, *SHORT)
    prepare(load_config(PretrainConfig, tiny_pretrain, overrides).data)
    assert moe_lm(*command).code == 0
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content), encoding="utf-8")
    done = moe_lm(*command)
    assert done.code == 2  # the shards are the old tokenizer's
    assert "tokenizer" in done.err
    shutil.rmtree(tmp_path / "shards")
    prepare(load_config(PretrainConfig, tiny_pretrain, overrides).data)
    done = moe_lm(*command)
    assert done.code == 2
    assert "holds a run with other settings (the tokenizer is another one" in done.err


def test_how_a_run_is_watched_and_fitted_to_its_machine_may_change(
    trained: tuple[Any, ...], tmp_path: Path, moe_lm: MoeLm
) -> None:
    changes = (
        "log.every=1", "checkpoint.every=3", "train.eval_every=2", "train.micro_batch_size=2",
        "train.activation_checkpointing=selective", "data.workers=2",
    )  # fmt: skip
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    assert moe_lm(*trained, "checkpoint.every=6").code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    done = moe_lm(*trained, *changes)
    assert (done.code, done.err) == (0, "")
    assert "going on after step 6 of 12" in done.out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["micro_batch_size"] == 2


# Bad input


def test_a_run_folder_in_use_is_refused_and_told_by_whom(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    with RunFolder(tmp_path):
        done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT)
    assert done.code == 1
    assert "is in use by process " in done.err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_folder_that_cannot_be_written_is_named_before_the_first_step(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    (tmp_path / "file").write_text("")
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'file' / 'run'}", *SHORT)
    assert done.code == 2
    assert f"cannot write to the run folder {tmp_path / 'file' / 'run'}: Not a directory" in done.err
    assert done.out == ""


def test_a_model_with_too_few_embeddings_is_refused(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", "model.vocab_size=1000")
    assert done.code == 2
    assert "model.vocab_size=1000 is smaller than the tokenizer's 1024 ids" in done.err
    assert not (tmp_path / "run").exists()


# Settings


def test_dry_run_shows_everything_and_needs_nothing(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    missing = (f"data.shards={tmp_path / 'no-shards'}", f"data.tokenizer={tmp_path / 'no-tokenizer'}")
    command = ("pretrain", tiny_pretrain, "--dry-run", f"run_dir={tmp_path / 'run'}", *missing)
    done = moe_lm(*command, "--settings")
    assert (done.code, done.err) == (0, "")
    figures, _, text = done.out.partition("\n\n")
    assert moe_lm(*command).out == figures + "\n"  # without settings, what one looks for is not below 100 lines of them
    assert "not prepared yet" in figures
    with_shards = moe_lm(*command[:-2], command[-1])
    assert f"is there, but no tokenizer is in {tmp_path / 'no-tokenizer'}" in with_shards.out
    config = load_config(PretrainConfig, tiny_pretrain, [f"run_dir={tmp_path / 'run'}", *missing])
    assert PretrainConfig.model_validate(yaml.safe_load(text)) == config
    counted = count_parameters(config.model)
    assert f"{counted.total:,} in all, {counted.active:,} active" in figures
    assert "100 steps, 51,200 tokens" in figures
    assert list(tmp_path.iterdir()) == []


def test_a_run_and_a_dry_run_say_what_is_read_how_often(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT)
    dry, done = moe_lm(*command, "--dry-run"), moe_lm(*command)
    config = load_config(PretrainConfig, tiny_pretrain)
    counted = count_parameters(config.model)
    opening = done.out.splitlines()[:3]
    assert opening[0] == (
        f"pretrain in {tmp_path / 'run'}: {counted.total:,} parameters, {counted.active:,} active a token"
    )
    assert opening[1].startswith("12 steps of 512 tokens (8 rows of 64): 6,144 tokens, ")
    assert opening[1].endswith("; on cpu in float32")
    assert re.fullmatch(
        r"data            \w+: [\d,]+ tokens, (read [\d.]+ times|of which the run reads [\d.]+%); "
        r"[\d,]+ held out \([\d.]+%\)"
        r"(, which is much: a lower piece_bytes or data\.validation_fraction holds out less)?",
        opening[2],
    )
    assert opening[2] in dry.out
    assert all(f"  {line}\n" in (tmp_path / "run" / "train.log").read_text() for line in opening)


def test_the_limit_of_an_evaluation_counts_global_batches_whatever_the_micro_batches(tiny_pretrain: Path) -> None:
    evaluated = []
    for micro in ("null", "4", "1"):
        config = load_config(PretrainConfig, tiny_pretrain, ["train.eval_batches=2", f"train.micro_batch_size={micro}"])
        batches = held_out_batches(config)
        evaluated.append(torch.cat([batch.input_ids for batch in batches]))
    assert evaluated[0].shape == (16, 64)
    assert torch.equal(evaluated[0], evaluated[1])
    assert torch.equal(evaluated[0], evaluated[2])


def test_every_source_is_mixed_and_evaluated(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    config = load_config(PretrainConfig, tiny_pretrain)
    path = config.data.sources[0].path
    sources = f"data.sources=[{{name: one, path: {path}}}, {{name: two, path: {path}, weight: 3}}]"
    command = (tiny_pretrain, sources, f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}", *SHORT)
    assert moe_lm("prepare", *command).code == 0
    assert moe_lm("pretrain", *command).code == 0
    config = load_config(PretrainConfig, tiny_pretrain, [str(item) for item in command[1:]])
    assert len(held_out_batches(config)) == 2 * 2
    records = metrics(tmp_path / "run")
    assert len(records) == 12
    last = records[-1]
    assert list(last["val_loss_by_source"]) == ["one", "two"]
    # Both have the same text, of which the same batches are evaluated.
    assert last["val_loss_by_source"]["one"] == last["val_loss_by_source"]["two"]
    assert last["val_loss"] == pytest.approx(last["val_loss_by_source"]["one"], rel=1e-12)
