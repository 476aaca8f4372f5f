"""Plain data parallelism over gloo: several processes train as one does, stop together and share checkpoints."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import (
    ENVIRONMENT,
    Start,
    finish,
    free_port,
    losses,
    metrics,
    runs,
    start_ranks,
    train_alone,
    wait_until,
)
from tests.runs import tensors


def assert_same_training(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name in ("loss", "balance_loss", "val_loss", "grad_norm"):
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), (line["step"], name)
        for name in ("tokens", "targets", "lr", "skipped"):
            assert line.get(name) == other.get(name)
        for layer, other_layer in zip(line.get("experts", ()), other.get("experts", ()), strict=True):
            for name in ("dead_experts", "load"):
                assert layer.pop(name, None) == other_layer.pop(name, None)
            assert layer == pytest.approx(other_layer, rel=1e-6)


SETTINGS = ("train.steps=12", "checkpoint.every=6", "checkpoint.keep=9", "train.eval_every=4")


@pytest.fixture(scope="module")
def one_process(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(tiny_pretrain, tmp_path_factory.mktemp("one"), *SETTINGS)


@pytest.mark.parametrize("ranks_of_a_row", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pretraining_with_2_processes_is_that_with_1_and_either_goes_on_for_the_other(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start, one_process: Path, ranks_of_a_row: int
) -> None:
    """2 ranks train 12 steps; from their checkpoint of step 6 one process goes on, and the other way round."""
    run_dir = tmp_path / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SETTINGS)
    shared = f"parallel.sequence_parallel_size={ranks_of_a_row}"
    out, silent = finish(start_ranks(start_moe_lm, 2, *command, shared))
    assert out.startswith(f"pretrain in {run_dir}: ")
    assert re.search("\nkernels: attention [a-z]+, experts bucketed\nwarm-up too long: .*\npretrain 1/12", out)
    assert silent == ""
    assert_same_training(metrics(run_dir), metrics(one_process))
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    (out,) = finish([start_moe_lm(*command)])
    assert "going on after step 6 of 12" in out
    assert_same_training(metrics(run_dir), metrics(one_process))

    run_dir = tmp_path / "other"
    shutil.copytree(one_process, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SETTINGS, shared)
    out, _ = finish(start_ranks(start_moe_lm, 2, *command))
    assert "going on after step 6 of 12" in out
    assert_same_training(metrics(run_dir), metrics(one_process))
    one, two = (tensors(folder / "checkpoints" / "step-00000012") for folder in (one_process, run_dir))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        exact = name.endswith("correction_bias")
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0 if exact else 1e-5)


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "train.steps=500")
    ranks = start_ranks(start_moe_lm, 2, *command)
    wait_until(lambda: len(losses(tmp_path)) >= 2 or not all(map(runs, ranks)), "two steps")
    ranks[1].send_signal(signal.SIGTERM)
    out, silent = finish(ranks, code=75)
    stopped_at = len(metrics(tmp_path))
    assert stopped_at < 500
    assert out.splitlines()[-1].startswith(
        f"stopped after step {stopped_at}; to go on, run again: {sys.executable} -m moe_lm pretrain"
    )
    assert silent == ""
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{stopped_at:08d}"]


def deepspeeds_launcher() -> list[str]:
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    meeting = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return ["deepspeed.launcher.launch", f"--world_info={world}", *meeting, "--no_local_rank", "--module", "moe_lm"]


def torchs_launcher() -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "moe_lm"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("launcher", [pytest.param(torchs_launcher, marks=pytest.mark.slow), deepspeeds_launcher])
def test_no_rank_outlives_its_launcher(tiny_pretrain: Path, tmp_path: Path, launcher: Callable[[], list[str]]) -> None:
    command = [sys.executable, "-m", *launcher(), "pretrain", str(tiny_pretrain), f"run_dir={tmp_path}"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "train.steps=100000"], stdout=output, stderr=output, env=os.environ | ENVIRONMENT
        )
    begun, output = (tmp_path / "metrics.jsonl").exists, (tmp_path / "output").read_text
    wait_until(lambda: begun() or process.poll() is not None, "training", output, seconds=90)
    assert process.poll() is None, output()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "the ranks to end", seconds=60)


def test_a_batch_that_the_processes_cannot_share_is_refused_by_all(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start
) -> None:
    settings = ("train.global_batch_size=7", "train.micro_batch_size=1")
    ranks = start_ranks(start_moe_lm, 2, "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings)
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "train.global_batch_size=7 is not divisible by the 2 processes of this run; choose a multiple" in errors[0]
    assert errors[1] == ""  # rank 0 speaks for all
    assert not (tmp_path / "checkpoints").exists()
