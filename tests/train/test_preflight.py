"""What cannot become a run is refused before it starts, by `--dry-run` and by the start itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.parallel.topology import Topology
from moe_lm.train import preflight
from moe_lm.train.cost import cost

MoeLm = Callable[..., Any]
# A run weighs what is there in every step; a dry run all of a step.
IN_A_DRY_RUN = (" for weights, gradients and optimizer", " at the peak on each device of 1")
SHARDED = ("parallel.engine=deepspeed", "parallel.expert_parallel_size=4")

SHARED_ROWS = ("parallel.sequence_parallel_size=2",)


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.optimizer.lr=.inf"], "train.optimizer.lr=inf"),
        (["train.balance.z_loss=.nan"], "train.balance.z_loss=nan"),
        (["model.routed_scaling_factor=.inf"], "model.routed_scaling_factor=inf"),
        (["train.seed=9223372036854775808"], "train.seed=9223372036854775808"),
        (["model.hidden_size=200000"], "GiB for weights, gradients and optimizer"),
        (
            ["train.steps=20000000", "checkpoint.every=2", "checkpoint.keep=9999998"],
            "9999999 checkpoints of 1.5 MiB need",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, settings: list[str], said: str, extra: tuple[str, ...]
) -> None:
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", "train.steps=1", *settings, *extra)
    assert done.code == 2, done.out
    assert (said if extra == () else said.replace(*IN_A_DRY_RUN)) in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_folder_of_something_else_is_not_trained_in(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, extra: tuple[str, ...]
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "merges.bin", "train.log", ".git"):
        (tmp_path / name).touch()
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *extra)
    assert done.code == 2
    assert "holds config.json, merges.bin, model.safetensors and more, which no run made" in done.err


@pytest.mark.parametrize(
    "name", ["out.log", "output", "notes.txt", "copy.yaml", ".hidden", "metrics.jsonl", "config.yaml"]
)
def test_a_folder_with_logs_or_an_earlier_run_is_free(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    preflight.check_folder(tmp_path)
    preflight.check_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("processes", "settings", "said"),
    [
        (6, SHARDED, "parallel.expert_parallel_size=4 does not divide the 6 processes of this run"),
        (
            16,
            SHARDED,
            "train.global_batch_size=8 is not divisible by the 16 processes of this run; choose a multiple of 16",
        ),
        (2, ("train.micro_batch_size=8",), None),
        (4, ("train.global_batch_size=24", "train.micro_batch_size=4"), "train.micro_batch_size=4 does not divide"),
        (8, SHARDED, None),
        (3, SHARED_ROWS, "parallel.sequence_parallel_size=2 does not divide the 3 processes"),
        (6, SHARED_ROWS, "train.global_batch_size=8 is not divisible by the 3 sequence-parallel groups"),
        (8, (*SHARED_ROWS, *SHARDED, "train.micro_batch_size=2"), None),
    ],
)
def test_a_dry_run_refuses_a_layout_that_the_launch_would_refuse(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, processes: int, settings: tuple[str, ...], said: str | None
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings)
    done = moe_lm(*command, "--dry-run", "--processes", processes)
    if said is None:
        assert done.code == 0, done.err
        assert f"on each device of {processes}" in done.out
    else:
        assert done.code == 2
        assert said in done.err


def test_a_dry_run_elsewhere_says_what_this_machine_lacks_and_is_no_error(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "parallel.device=auto", "model.hidden_size=200000")
    done = moe_lm(*command, "--dry-run")
    assert done.code == 0
    assert "not here        this run needs" in done.out
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert moe_lm(*command, "--dry-run").code == 2


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ("every=0", 1),
        ("every=500", 1),
        ("every=30", 3),  # after steps 30, 60, 90 and 100, of which 2 are kept
        ("every=60", 2),
        ("every=10 keep=20", 10),
        ("every=10 best=true", 4),
        ("every=10 archive_every=20", 8),
        ("every=10 archive_every=10", 10),
        ("every=0 archive_every=30", 4),
        ("every=0 best=true", 4),  # at evaluations, of which there are 10
    ],
)
def test_the_most_checkpoints_at_once_are_known_before(tiny_pretrain: Path, settings: str, most: int) -> None:
    given = [f"checkpoint.{setting}" for setting in settings.split()]
    config = load_config(
        PretrainConfig, tiny_pretrain, ["run_dir=run", "train.steps=100", "train.eval_every=10", *given]
    )
    assert preflight.most_checkpoints(config) == most


def test_a_run_that_is_started_again_on_a_fuller_disk_is_warned_and_not_refused(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requeued job would end for good, where one that runs lets older checkpoints give way."""
    settings = ("train.steps=3", "checkpoint.every=1", "train.eval_batches=1")
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *settings)
    assert moe_lm(*command).code == 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    said = "3 checkpoints of 1.5 MiB need"
    again, dry, elsewhere = moe_lm(*command), moe_lm(*command, "--dry-run"), moe_lm(*command, f"run_dir={tmp_path}/new")
    assert (again.code, dry.code, elsewhere.code) == (0, 0, 2)
    assert f"warning: {said}" in again.err
    assert f"not here        {said}" in dry.out
    assert said in elsewhere.err


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_the_memory_of_a_machine_is_that_of_all_its_ranks(
    tiny_pretrain: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = load_config(PretrainConfig, tiny_pretrain, ["run_dir=run"])
    needs = cost(config, config.model, None, Topology())
    monkeypatch.setattr(preflight, "host_memory", lambda: 3 * needs.memory.total)
    for other in preflight.RANKS_HERE:
        monkeypatch.delenv(other, raising=False)
    assert preflight.lacking_memory(config, needs, Topology(world_size=8)) is None
    monkeypatch.setenv(name, "4")
    assert "4 processes of this machine need" in str(preflight.lacking_memory(config, needs, Topology(world_size=8)))
    assert preflight.lacking_memory(config, needs, Topology()) is None, "one process, in a job for several"


@pytest.mark.parametrize(
    ("own", "limited", "expected"),
    [
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "2048", "other/memory.max": "1"}, 2048),
        ("0::/\n", {"memory.max": "4096"}, 4096),
        ("3:cpu:/a\n2:memory,x:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "4096", "a/memory.max": "1"}, 4096),
    ],
)
def test_the_memory_of_the_host_is_that_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, limited: dict[str, str], expected: int
) -> None:
    (tmp_path / "own").write_text(own)
    for name, limit in limited.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(limit)
    monkeypatch.setattr(preflight, "CGROUPS", tmp_path)
    monkeypatch.setattr(preflight, "OWN_CGROUPS", tmp_path / "own")
    assert preflight.host_memory() == expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_the_size_of_a_checkpoint_is_known_before(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, optimizer: str
) -> None:
    settings = [f"run_dir={tmp_path}", "train.steps=1", "train.eval_batches=1", f"train.optimizer.name={optimizer}"]
    config = load_config(PretrainConfig, tiny_pretrain, settings)
    assert moe_lm("pretrain", tiny_pretrain, *settings).code == 0
    tensors = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors"))
    expected = preflight.checkpoint_bytes(config, cost(config, config.model, None, Topology()))
    assert expected <= tensors < 1.2 * expected


def test_copies_of_saves_that_the_host_cannot_hold_are_warned_of(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.5 MiB beside the 2 MiB of weights, gradients and moments."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(preflight, "host_memory", lambda: 3 << 20)
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "parallel.device=auto", "--dry-run")
    said = "saves in the background copy 1.5 MiB into the memory of this host"
    assert said in moe_lm(*command).out
    assert said not in moe_lm(*command, "checkpoint.background=false").out
    monkeypatch.setattr(preflight, "host_memory", lambda: 4 << 20)
    assert said not in moe_lm(*command).out
