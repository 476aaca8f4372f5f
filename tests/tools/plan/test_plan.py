"""`moe-lm plan`, and what `--dry-run` says of memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.tools.plan.devices import find_device
from moe_lm.train import preflight
from tests.processes import ROOT

MoeLm = Callable[..., Any]
BFLOAT16 = "train.precision=bfloat16"
FEW = (
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "model.n_routed_experts=2",
    "model.num_experts_per_tok=1",
)
SHARDED = (BFLOAT16, "parallel.engine=deepspeed", "parallel.expert_parallel_size=2")


def test_a_plan_says_whether_a_run_fits_how_long_it_takes_and_what_it_costs(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lm.tools.plan.report.SHOWN", 1)
    given = (*SHARDED, *FEW, "train.micro_batch_size=2")
    command = ("plan", tiny_pretrain, *given, "--gpus", 2, "--gpu", "h200", "--tokens", "1e9", "--price", "2.5")
    done = moe_lm(*command, "--json", tmp_path / "plan.json")
    assert done.code == 0, done.err
    for said in (
        "2 x h200",
        "fits",
        "activations",
        "MFU",
        "tokens/s",
        "1B tokens in",
        "at 2.5 an hour",
        "a checkpoint",
        "train.micro_batch_size=2, and a rank has 1 of the rows of a step",
    ):
        assert said in done.out
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    own, best = plan["own"], plan["layouts"][0]
    assert f"({len(plan['layouts']) - 1} more are in --json FILE)" in " ".join(done.out.split())
    assert own["layout"]["expert_parallel"] == 2
    assert sum(own["seconds_by_cause"].values()) == pytest.approx(own["step_seconds"])
    assert sum(own["seconds_by_part"].values()) == pytest.approx(own["step_seconds"])
    assert own["days"] * own["tokens_a_day"] == pytest.approx(1e9)
    assert own["cost"] == pytest.approx(own["days"] * 24 * 2 * 2.5)
    assert best["fits"]
    assert best["step_seconds"] <= own["step_seconds"]
    assert f"The fastest: moe-lm pretrain {tiny_pretrain} {' '.join(SHARDED)} " in done.out
    for item in plan["layouts"][:2]:  # a run takes these settings
        settings = [f"{key}={value}" for key, value in item["settings"].items()]
        dry = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", BFLOAT16, *FEW, *settings, "--dry-run")
        tried = moe_lm(*dry, "--gpu", "h200", "--processes", 2)
        assert tried.code == 0, tried.err
        assert "on each device of 2" in tried.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "h300"), "--gpu h300 is not known (did you mean h200?)"),
        (("--gpus", 3), "train.global_batch_size=8 is not divisible by the 3 processes"),
        (("--gpus", 6, *SHARDED, "parallel.expert_parallel_size=4"), "does not divide the 6 processes"),
        (("--network", "token-ring"), "--network token-ring is not known"),
        (("--rate", "memory=80"), "--rate memory=80 is in bytes; 80 GB is --rate memory=80e9"),
        (("--rate", "inside=nvlink9"), "is neither a network (nvlink3, nvlink4,"),
        (("--rate", "per_node=0"), "is not a number above 0; give it like --rate per_node=8"),
        (("--measure", "--gpu", "h100"), "--measure measures this machine, and --gpu h100 names another one"),
        (("--json", "no/such/folder.json"), "--json no/such/folder.json cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_to_give(
    tiny_pretrain: Path, moe_lm: MoeLm, arguments: tuple[object, ...], said: str
) -> None:
    done = moe_lm("plan", tiny_pretrain, *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_plan_in_which_no_layout_fits_says_so_and_ends_with_1(tiny_pretrain: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("plan", tiny_pretrain, BFLOAT16, *FEW, "--rate", "memory=2e6", "--json", "-")
    assert done.code == 1
    assert all(item["reason"].endswith("GiB of 0.0") for item in json.loads(done.out)["layouts"])


def test_a_dry_run_says_in_a_line_whether_the_layout_fits(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", BFLOAT16, *FEW, "--dry-run", "--gpu", "a100-40")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("memory ")]
    assert line.endswith("at the peak on each device of 1, of 36.2 GiB (92% of the memory of a100-40): fits")


def test_a_model_whose_experts_are_taken_away_is_dense_to_a_dry_run_too(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    settings = (f"run_dir={tmp_path / 'run'}", "model.n_routed_experts=0", "train.steps=1", "train.eval_batches=1")
    for dry in (True, False):
        done = moe_lm("pretrain", tiny_pretrain, *settings, *(["--dry-run"] if dry else []))
        assert (done.code, done.err) == (0, "")


def test_a_dry_run_refuses_what_does_not_fit_with_the_nearest_layout_that_does(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    device = tmp_path / "small.yaml"
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", BFLOAT16, *FEW, "train.micro_batch_size=2")
    command += ("--dry-run", "--gpu", device)

    def with_memory(size: float) -> Any:
        device.write_text(f"memory: {size}\npeak: 1e12\ncopy: 1e11\n", encoding="utf-8")
        return moe_lm(*command)

    line = next(line for line in with_memory(1e9).out.splitlines() if line.startswith("memory "))
    peak = float(line.split()[1]) * 2**20
    refused, hopeless = with_memory(0.9995 * peak / 0.92), with_memory(2e6)
    assert (refused.code, refused.out, hopeless.code) == (2, "", 2)
    assert "this run needs" in refused.err
    assert "the nearest layout that fits needs" in refused.err
    assert "train.micro_batch_size=" in refused.err or "train.activation_checkpointing=" in refused.err
    assert "no layout of as many devices fits; take more of them, or larger ones" in hopeless.err
    assert f"moe-lm plan CONFIG --gpus 2 --gpu {device}" in hopeless.err


def test_a_run_in_float32_is_planned_for_a_gpu_too(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm(
        "pretrain", tiny_pretrain, f"run_dir={tmp_path}", "train.precision=float32", "--dry-run", "--gpu", "h200"
    )
    assert done.code == 0, done.err
    assert "(92% of the memory of h200): fits" in done.out


@pytest.mark.slow
def test_a_gpu_that_is_not_here_is_planned_for_though_the_config_asks_for_it(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the data type that the GPU multiplies, whatever this processor does."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = (tiny_pretrain, f"run_dir={tmp_path / 'run'}", *FEW, "parallel.device=cuda")
    lines = []
    for precision in ("auto", "bfloat16", "float32"):
        done = moe_lm("pretrain", *config, f"train.precision={precision}", "--dry-run", "--gpu", "h100")
        assert done.code == 0, done.err
        lines.append(next(line for line in done.out.splitlines() if line.startswith("memory ")))
    assert lines[0] == lines[1] != lines[2]
    done = moe_lm("plan", *config, "train.precision=auto", "--gpu", "h100", "--gpus", 2)
    assert done.code == 0, done.err


def test_the_attention_kernel_of_the_config_is_planned_with_and_one_of_other_devices_refused(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    config = (tiny_pretrain, f"run_dir={tmp_path / 'run'}", *FEW, BFLOAT16)
    for command in (("plan", *config), ("pretrain", *config, "--dry-run")):
        done = moe_lm(*command, "parallel.attention_kernel=cpp", "--gpu", "h100")
        assert (done.code, done.out) == (2, "")
        assert "parallel.attention_kernel=cpp does not run on cuda; choose one of auto, flash_attn_3" in done.err
    elsewhere = ("parallel.device=auto", "--dry-run")
    on_login_node = moe_lm("pretrain", *config, "parallel.attention_kernel=flash_attn_3", *elsewhere)
    assert on_login_node.code == 0, on_login_node.err


def test_rates_of_this_machine_that_take_too_long_are_given_up_with_what_to_change(
    tiny_pretrain: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU they are those of the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("moe_lm.tools.plan.measure.TIMEOUT_SECONDS", 0)
    done = moe_lm("plan", tiny_pretrain, *FEW, "--measure")
    assert (done.code, done.out) == (1, "")
    assert "1 processes were not done after 0 s; measure smaller products (train.micro_batch_size," in done.err


@pytest.mark.slow
def test_a_run_that_starts_on_a_gpu_warns_of_a_step_that_it_cannot_hold(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("pretrain", tiny_pretrain, "train.steps=1", "checkpoint.every=0")
    small = replace(find_device("h100"), memory=1000)
    monkeypatch.setattr("moe_lm.tools.plan.plan._device_to_fill", lambda *_: (small, torch.device("cpu")))
    quiet = moe_lm(*command, f"run_dir={tmp_path / 'cpu'}")
    assert (quiet.code, "warning" in quiet.err) == (0, False), "a CPU's run starts without a simulation"
    monkeypatch.setattr(preflight, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(preflight, "lacking", lambda *_: ([], []))
    warned = moe_lm(*command, f"run_dir={tmp_path / 'gpu'}")
    assert warned.code == 0, warned.err
    assert "warning: this run needs" in warned.err
    assert "moe-lm plan has the layouts that fit" in warned.err


def test_a_run_that_starts_has_a_device_and_takes_no_other(tiny_pretrain: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", tiny_pretrain, "--gpu", "h100")
    assert done.code == 2
    assert "--gpu h100 has no meaning for a run that starts" in done.err


def test_adapters_are_refused_before_their_start_is_looked_for_and_a_model_is_no_run(moe_lm: MoeLm) -> None:
    adapters = moe_lm("plan", ROOT / "configs" / "finetune" / "lora.yaml")
    assert adapters.code == 2
    assert "adapters (lora) and preferences are not planned" in adapters.err
    file = ROOT / "configs" / "model" / "deepseekmoe-16b.yaml"
    model = moe_lm("plan", file)
    assert model.code == 2
    assert model.err == (
        f"error: {file} is a model, not a run; take it as the model of a run's config: "
        f"configs/pretrain/deepseekmoe-2b.yaml model={file}\n"
    )


def test_the_recipe_of_16b_fits_8_devices_of_80_gb(moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", ROOT / "configs" / "pretrain" / "deepseekmoe-16b.yaml", "--dry-run", "--gpu", "h100")
    assert done.code == 0, done.err
    assert "at the peak on each device of 8, of 72.9 GiB (92% of the memory of h100): fits" in done.out
    assert "not here" not in done.out, "this machine's disk is not the run's"
