"""Imported, upcycled and finished models go on on text: they learn, resume to the bit, and export as what they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moe_lm.checkpoint.read import CheckpointTensors
from moe_lm.config.generation import UpcycleConfig
from moe_lm.generate.session import Session
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.upcycle import upcycle
from tests.conftest import Done, MoeLm
from tests.processes import layout, metrics
from tests.runs import assert_same_run, last_checkpoint, tensors
from tests.tiny import logits_of

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]
SLOW = ("finished run", "deepseek_v3", "qwen3_moe", "upcycled sigmoid")
YARN = {"rope_type": "yarn", "factor": 4.0}  # the trained length is the start's


def write_config(folder: Path, tiny_pretrain: Path, start_from: Path, **settings: Any) -> Path:
    """A config that leaves model and tokenizer to its start."""
    data = yaml.safe_load(tiny_pretrain.read_text())["data"]
    del data["tokenizer"]
    values = {
        "run_dir": str(folder / "run"),
        "start_from": str(start_from),
        "data": data | settings.pop("data", {}),
        "train": {
            "steps": 6, "global_batch_size": 4, "precision": "float32", "eval_batches": 1, "optimizer": {"lr": 0.01},
            "schedule": {"name": "constant", "warmup_steps": 1},
        },
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": 3, "keep": 9},
    } | settings  # fmt: skip
    file = folder / "continue.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def start_from(request: pytest.FixtureRequest, imported_run: Folder, pretrained: Path, tmp_path: Path) -> Path:
    """Imported, upcycled with a softmax (no family of which has router biases) or a sigmoid, and a finished run."""
    kind = request.param
    if kind == "finished run":
        return pretrained
    if kind.startswith("upcycled"):
        cut = {"split": 3, "shared": 1} if kind == "upcycled sigmoid" else {}
        upcycle(imported_run("qwen3"), tmp_path / kind, UpcycleConfig(experts=8, per_token=2, **cut))
        return tmp_path / kind
    return imported_run(kind)


STARTS = ["upcycled", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)]


@pytest.mark.parametrize("start_from", STARTS, indirect=True)
def test_a_start_goes_on_resumes_to_the_bit_and_exports(
    start_from: Path, tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    config, run = write_config(tmp_path, tiny_pretrain, start_from), tmp_path / "run"
    done = moe_lm("pretrain", config)
    assert (done.code, done.err) == (0, "")
    start = last_checkpoint(start_from)
    assert f"starts from {start.absolute()} (fingerprint " in done.out
    figures = metrics(run)
    assert figures[0]["step"] == 0  # the start itself, evaluated
    assert figures[-1]["val_loss"] < figures[0]["val_loss"] - 0.3
    assert yaml.safe_load((last_checkpoint(run) / "start.yaml").read_text())["origin"] == str(start.absolute())
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["model"] == yaml.safe_load((start / "model.yaml").read_text())

    shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    done = moe_lm("pretrain", config)
    assert "going on after step 3 of 6" in done.out, done.err
    assert_same_run(tmp_path / "whole", run)

    biases = [layer.gate.e_score_correction_bias for layer in Session.load(run, device="cpu").model.moe_layers]
    assert all(bool(bias.any()) == (start_from.name not in ("qwen3_moe", "upcycled")) for bias in biases)
    proof = export_run(run, tmp_path / "out")
    assert all(comparison.largest_difference <= 1e-5 for comparison in proof.logits)


def test_longer_positions_of_a_start_are_those_of_transformers(
    tiny_pretrain: Path, tmp_path: Path, imported_run: Folder, moe_lm: MoeLm
) -> None:
    """YaRN over a start of 160 positions, trained on rows of 256, compared over 480 positions."""
    model = {"rope_parameters": {"rope_theta": 10000.0, **YARN}, "max_position_embeddings": 640}
    start = imported_run("qwen3")
    config = write_config(tmp_path, tiny_pretrain, start, model=model, data={"sequence_length": 256})
    done = moe_lm("pretrain", config, "train.steps=3")
    assert (done.code, done.err) == (0, "")
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert (kept["hidden_size"], kept["max_position_embeddings"]) == (32, 640)
    assert {name: value for name, value in kept["rope_scaling"].items() if value} == {
        **YARN, "original_max_position_embeddings": 160, "truncate": True,
    }  # fmt: skip
    undone = moe_lm("pretrain", config, "train.steps=5", "model={max_position_embeddings: 640}")
    assert undone.code == 2
    assert "model.rope_scaling.rope_type: yarn -> (absent)" in undone.err

    proof = export_run(tmp_path / "run", tmp_path / "out", "qwen3")
    assert all(comparison.largest_difference <= 1e-5 for comparison in proof.logits)
    ids = torch.randint(1024, (480,), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        ours = logits_of(Session.load(tmp_path / "run", device="cpu").model, ids.tolist())
        assert (ours - theirs(ids[None]).logits[0]).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("start_from", ["finished run", "qwen3_moe", "upcycled"], indirect=True)
def test_experts_on_two_ranks_go_on_as_in_one_process(
    start_from: Path, tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, run_ranks: Callable[..., list[Done]]
) -> None:
    """With positions of its own, and the moments of a start that has them."""
    model = {"rope_scaling": YARN, "max_position_embeddings": 16384}
    moments = start_from.name not in ("qwen3_moe", "upcycled")
    config = write_config(tmp_path, tiny_pretrain, start_from, model=model, start_with_optimizer=moments)
    assert moe_lm("pretrain", config, f"run_dir={tmp_path / 'one'}").code == 0
    for rank in run_ranks(2, "pretrain", config, f"run_dir={tmp_path / 'two'}", *layout(2, 2)):
        assert rank.code == 0, rank.err
    for name, lines in (("loss", slice(1, None)), ("grad_norm", slice(1, None)), ("val_loss", slice(0, None, 6))):
        one, two = ([line[name] for line in metrics(tmp_path / run)[lines]] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-6)
    for part in ("model", "optimizer"):
        found = CheckpointTensors(last_checkpoint(tmp_path / "two"), part)
        for name, tensor in tensors(last_checkpoint(tmp_path / "one"), part).items():
            if not name.startswith("random."):
                rows = found.rows(name, 0, len(tensor) if tensor.ndim else 1).view(tensor.shape)
                torch.testing.assert_close(rows, tensor, rtol=0, atol=1e-5)
