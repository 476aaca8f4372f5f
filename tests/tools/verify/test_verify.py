"""The parity check: it passes on this code, and each of six errors planted into its processes makes it fail."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.training import TrainConfig
from moe_lm.model.layers import Head, chunk_loss, summed_nll
from moe_lm.tools.verify.layouts import all_layouts
from moe_lm.tools.verify.parity import choose_world_sizes
from moe_lm.tools.verify.scale import small_model
from moe_lm.tools.verify.worker import loss_in_chunks
from tests.conftest import MoeLm
from tests.processes import ROOT

CONFIG = ROOT / "configs" / "pretrain" / "deepseekmoe-2b.yaml"
PLANTED = Path(__file__).parent / "planted"

Start = Callable[..., "subprocess.Popen[str]"]


def verify(start: Start, code: int, *arguments: object, **environment: object) -> tuple[str, str]:
    """Run `moe-lm verify` on CONFIG, which must end with this exit code; returns its output and its errors."""
    process = start("verify", CONFIG, *arguments, **environment)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err
    return out, err


def test_every_layout_equals_one_process(start_moe_lm: Start, tmp_path: Path) -> None:
    out, _ = verify(start_moe_lm, 0, "--quick", "--json", tmp_path / "report.json", COLUMNS=120)
    assert "2 x DeepSpeed, EP 2, ZeRO 3" in out
    assert "FAIL" not in out
    report = json.loads((tmp_path / "report.json").read_text())
    layouts = {layout["name"]: layout for layout in report["layouts"]}
    assert report["ok"]
    assert report["notes"] == []
    assert all(layout["counts_equal"] and layout["worst"]["loss"] <= 1e-6 for layout in layouts.values())
    assert all(max(layout["worst"].values()) <= 1e-5 for layout in layouts.values())
    for name in (
        "2 x DeepSpeed, EP 1, ZeRO 1",
        "2 x DeepSpeed, EP 2, ZeRO 2 after 4 processes",
        "2 x DeepSpeed, EP 2, ZeRO 1, selective checkpointing",
        "4 x DeepSpeed, EP 2, ZeRO 3",
        "2 x DeepSpeed, EP 2, ZeRO 3, offload, after ZeRO 2",
        "2 x DeepSpeed, EP 2, ZeRO 2, SP 2",
        "1 process after DeepSpeed",
        "documents in rows of their own",
        "loss in chunks",
        "2 x torch, Muon",
        "2 x DeepSpeed, EP 2, ZeRO 2, Muon",
        "accumulation, LAMB",
    ):
        assert name in layouts


@pytest.mark.slow
def test_latent_attention_with_sharded_experts_and_weights_equals_one_process(start_moe_lm: Start) -> None:
    model, name = f"model={ROOT / 'configs' / 'model' / 'deepseek-v3.yaml'}", "2 x DeepSpeed, EP 2, ZeRO 3"
    out, _ = verify(start_moe_lm, 0, model, "--world-sizes", "2", "--only", name, "--json", "-")
    layouts = {layout["name"]: layout for layout in json.loads(out)["layouts"]}
    assert layouts[name]["ok"]


@pytest.mark.slow
def test_compiled_layouts_equal_one_process_that_is_not(start_moe_lm: Start, tmp_path: Path) -> None:
    names = ("compiled", "2 x DeepSpeed, EP 2, ZeRO 1, compiled")
    only = ("--world-sizes", "1,2", *(word for name in names for word in ("--only", name)))
    out, _ = verify(start_moe_lm, 0, *only, "--json", "-")
    assert {layout["name"]: layout["ok"] for layout in json.loads(out)["layouts"]} == dict.fromkeys(names, True)
    (tmp_path / "refuses.py").write_text(
        "import functools, torch\n"
        "def refuse(graph, inputs): raise RuntimeError('there is a graph')\n"
        "torch.compile = functools.partial(torch.compile, backend=refuse)\n"
    )
    _, err = verify(start_moe_lm, 1, *only, "--sabotage", tmp_path / "refuses.py")
    assert "there is a graph" in err


def test_the_loss_in_chunks_is_that_of_a_few_positions_at_a_time() -> None:
    head, seen = Head(4, 8), []

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(targets))
        return chunk_loss(logits, targets)

    def positions_at_once(positions: int | None) -> list[int]:
        seen.clear()
        with loss_in_chunks(positions):
            head(torch.zeros(2, 25, 4), summed_nll, torch.zeros(2, 25, dtype=torch.int64), loss)
        return list(seen)

    assert positions_at_once(None) == [50]
    assert positions_at_once(20) == [16, 17, 17]


def test_in_bfloat16_muon_has_no_rows() -> None:
    model = load_config(ModelConfig, ROOT / "configs" / "model" / "deepseek-v3.yaml")
    for precision, titles in (("float32", {"Muon", "LAMB"}), ("bfloat16", {"LAMB"})):
        train = TrainConfig(steps=1, global_batch_size=8, precision=precision)
        names = [layout.name for layout in all_layouts(small_model(model), train, [2], True)]
        assert {title for title in ("Muon", "LAMB") if f"2 x torch, {title}" in names} == titles


@pytest.mark.parametrize(
    ("planted", "layout", "named", "precision"),
    [
        ("norm_without_experts", "2 x DeepSpeed, EP 2, ZeRO 1", "step 0: gradient norm: expected", "float32"),
        pytest.param(
            "balance_times_ranks", "2 x torch", "step 0: balance loss: expected", "float32", marks=pytest.mark.slow
        ),
        pytest.param(
            "balance_times_ranks", "2 x torch", "step 0: balance loss: expected", "bfloat16", marks=pytest.mark.slow
        ),
        pytest.param(
            "muon_in_bfloat16", "2 x torch, Muon", "step 0: weight model.layers.", "float32", marks=pytest.mark.slow
        ),
        pytest.param(
            "counts_of_a_part",
            "2 x torch, SP 2",
            "step 0: balance loss: expected",
            "float32",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "bias_from_local_counts",
            "2 x torch",
            "step 0: router bias model.layers.",
            "float32",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "moments_of_another_expert",
            "2 x DeepSpeed, EP 2, ZeRO 3 after ZeRO 2",
            "step 2: weight model.layers.0.mlp.experts.",
            "float32",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_planted_error_is_found_and_named(
    start_moe_lm: Start, planted: str, layout: str, named: str, precision: str
) -> None:
    sabotage = ("--sabotage", PLANTED / f"{planted}.py", f"train.precision={precision}")
    out, err = verify(start_moe_lm, 1, "--world-sizes", "2", "--only", layout, "--json", "-", *sabotage)
    report = next(item for item in json.loads(out)["layouts"] if item["name"] == layout)
    assert not report["ok"]
    line = next(line for line in err.splitlines() if line.startswith(f"{layout} is not like 'one process"))
    assert named in line


@pytest.mark.slow
def test_what_a_failed_rank_said_last_is_shown(start_moe_lm: Start, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise RuntimeError('the cable is loose')\n")
    _, err = verify(start_moe_lm, 1, "--world-sizes", "1", "--quick", "--sabotage", tmp_path / "fails.py")
    assert "error: rank 0 of 1 failed with exit code 1; its last lines:" in err
    assert "RuntimeError: the cable is loose" in err


@pytest.mark.slow
def test_bfloat16_is_compared_with_its_own_tolerance(start_moe_lm: Start) -> None:
    layout = ("--world-sizes", "2", "--only", "2 x DeepSpeed, EP 2, ZeRO 2")
    out, _ = verify(start_moe_lm, 0, "train.precision=bfloat16", *layout, "--json", "-")
    report = json.loads(out)
    assert report["precision"] == "bfloat16"
    (layout,) = report["layouts"]
    assert 1e-6 < layout["worst"]["loss"] <= 1e-2, "it was not computed in bfloat16"
    assert max(layout["worst"].values()) <= 2e-2
    assert layout["like"] == "one process, experts in 2 groups"


@pytest.mark.slow
def test_nothing_is_left_behind_when_it_is_told_to_stop(start_moe_lm: Start, tmp_path: Path) -> None:
    process = start_moe_lm("verify", CONFIG, "--world-sizes", "2", TMPDIR=tmp_path)
    workers: list[str] = []
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(workers) < 2:
        assert time.monotonic() < deadline
        workers = children.read_text().split()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list(tmp_path.glob("moe-lm-verify-*"))


def test_more_processes_than_devices_are_refused_when_asked_for() -> None:
    assert choose_world_sizes(None, devices=2) == [1, 2]
    assert choose_world_sizes("1,2", devices=2) == [1, 2]
    with pytest.raises(UsageError, match="--world-sizes 4 needs 4 CUDA devices, and this machine has 2"):
        choose_world_sizes("1,4", devices=2)


@pytest.mark.parametrize("sizes", ["3", "two", ""])
def test_world_sizes_that_it_does_not_know(moe_lm: MoeLm, sizes: str) -> None:
    done = moe_lm("verify", CONFIG, "--world-sizes", sizes)
    assert done.code == 2
    assert done.err.startswith(f"error: --world-sizes {sizes} is not a choice of 1, 2, 4")
