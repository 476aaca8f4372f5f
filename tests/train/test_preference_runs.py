"""Preference tuning as a run: the same over layouts and after a stop, its reference kept; margins rise."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file as load_arrays

from moe_lm.train import reference
from tests.processes import metrics
from tests.runs import MoeLm, assert_same_run

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "apple river stone cloud paper green seven table horse music window garden silver orange".split()
RECIPE = Path(__file__).parents[2] / "configs" / "finetune" / "dpo.yaml"
FIGURES = ("margin", "accuracy", "reward_chosen", "reward_rejected")


@pytest.fixture
def config_file(pretrained: Path, tmp_path: Path) -> Path:
    """A config beside 80 pairs, of which the politer answer is preferred, two in ten held out."""
    draw, lines = random.Random(1), []
    for number in range(80):
        first, second = draw.choice(WORDS), draw.choice(WORDS)
        asked, answer = f"say {first} then {second} {number}", f"{first} and {second}"
        pair = {"prompt": asked, "chosen": f"of course: {answer}.", "rejected": f"if I must: {answer}!"}
        lines.append(json.dumps(pair) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    values = {
        "run_dir": str(tmp_path / "run"),
        "start_from": str(pretrained),
        "preference": {"beta": 0.5},
        "data": {"train": [str(tmp_path / "pairs.jsonl")], "validation_fraction": 0.2, "sequence_length": 48},
        "train": {
            "steps": 8, "global_batch_size": 4, "precision": "float32", "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 2}, "balance": {"batch_loss": 1e-3},
        },
        "parallel": {"device": "cpu"},
    }  # fmt: skip
    file = tmp_path / "prefer.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], relative: float = 1e-5) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in ("loss", "balance_loss", "grad_norm", "val_loss", *FIGURES, *(f"val_{name}" for name in FIGURES)):
            assert (name in line) == (name in other)
            # Before the first update every margin is rounding alone.
            if name in line and not (line["step"] <= 1 and name.endswith("accuracy")):
                assert line[name] == pytest.approx(other[name], rel=relative, abs=1e-5), (line["step"], name)


def test_margin_and_accuracy_rise_on_held_out_pairs(config_file: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    assert moe_lm("finetune", config_file, "train.steps=20").code == 0
    lines = metrics(tmp_path / "run")
    assert lines[0].keys() == {"step", "val_loss", "time", "tokens_so_far", *(f"val_{name}" for name in FIGURES)}
    assert lines[0]["val_loss"] == pytest.approx(0.693147, abs=1e-5)  # the policy is its reference
    assert lines[0]["val_margin"] == pytest.approx(0, abs=1e-4)
    assert lines[1]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert all(name in line for line in lines[1:] for name in FIGURES)
    last = lines[-1]
    assert last["val_margin"] > 0.5
    assert last["val_accuracy"] > 0.9
    assert last["val_loss"] < 0.5
    assert last["val_margin"] == pytest.approx(last["val_reward_chosen"] - last["val_reward_rejected"], rel=1e-5)


@pytest.mark.slow
def test_accumulation_and_two_processes_are_one(
    config_file: Path, tmp_path: Path, moe_lm: MoeLm, run_ranks: Callable[..., list[Any]]
) -> None:
    assert moe_lm("finetune", config_file, f"run_dir={tmp_path / 'one'}", "checkpoint.every=4").code == 0
    expected = metrics(tmp_path / "one")
    assert moe_lm("finetune", config_file, f"run_dir={tmp_path / 'cut'}", "train.micro_batch_size=1").code == 0
    assert_close(metrics(tmp_path / "cut"), expected)
    for name, settings in (
        ("two", ()),
        ("experts", ("parallel.engine=deepspeed", "parallel.expert_parallel_size=2", "parallel.zero_stage=2")),
    ):
        ranks = run_ranks(2, "finetune", config_file, f"run_dir={tmp_path / name}", *settings)
        assert [(rank.code, rank.err) for rank in ranks] == [(0, ""), (0, "")]
        assert_close(metrics(tmp_path / name), expected)
        found, kept = (load_arrays(tmp_path / run / reference.FILE)["log_probs"] for run in (name, "one"))
        assert found == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [pytest.param((), marks=pytest.mark.slow), ("lora={rank: 4, dropout: 0.1}", "train.optimizer.lr=0.02")],
)
def test_a_killed_run_resumes_to_the_bit_with_the_reference_it_has(
    config_file: Path, tmp_path: Path, moe_lm: MoeLm, settings: tuple[str, ...]
) -> None:
    """Without it too: what training starts from is still there, below the adapters or in `start_from`."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert moe_lm("finetune", config_file, f"run_dir={whole}", *settings).code == 0
    assert metrics(whole)[0]["val_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert metrics(whole)[-1]["val_margin"] > 0.1
    command = ("finetune", config_file, f"run_dir={parted}", "checkpoint.every=4", "checkpoint.keep=9", *settings)
    for lose_the_reference in (False, True):
        assert moe_lm(*command).code == 0
        shutil.rmtree(parted / "checkpoints" / "step-00000008")
        if lose_the_reference:
            (parted / reference.FILE).unlink()
        done = moe_lm(*command)
        assert "going on after step 4 of 8" in done.out
        assert_same_run(whole, parted)
        assert (parted / reference.FILE).read_bytes() == (whole / reference.FILE).read_bytes()


def test_a_run_goes_on_with_the_reference_it_began_with_whatever_became_of_its_start(
    config_file: Path, tmp_path: Path, pretrained: Path, tiny_pretrain: Path, moe_lm: MoeLm
) -> None:
    """The start is trained on, which gives it a newer checkpoint; then it is deleted; then the reference is lost."""
    base, run_dir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(pretrained, base)
    command = ("finetune", config_file, f"start_from={base}", "checkpoint.every=4", "checkpoint.keep=9")
    assert moe_lm(*command).code == 0
    expected = metrics(run_dir)
    more = ("train.steps=32", "checkpoint.every=1", "checkpoint.allow_changes=true", "checkpoint.keep=9")
    assert moe_lm("pretrain", tiny_pretrain, f"run_dir={base}", *more).code == 0
    for trouble in ("a newer start", "a newer start, no reference", "no start"):
        shutil.rmtree(run_dir / "checkpoints" / "step-00000008")
        if "no reference" in trouble:
            (run_dir / reference.FILE).unlink()
        if trouble == "no start":
            shutil.rmtree(base)
        done = moe_lm(*command)
        assert done.code == 0, (trouble, done.err)
        assert "going on after step 4 of 8" in done.out
        assert [line["loss"] for line in metrics(run_dir)[1:]] == [line["loss"] for line in expected[1:]], trouble
    shutil.rmtree(run_dir / "checkpoints" / "step-00000008")
    (run_dir / reference.FILE).unlink()
    done = moe_lm(*command)
    assert done.code == 2
    assert f"the model that it began with, {base / 'checkpoints' / 'step-00000030'}" in done.err


@pytest.mark.slow
def test_a_reference_that_is_damaged_or_of_other_pairs_is_computed_again(
    config_file: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    run_dir = tmp_path / "run"
    assert moe_lm("finetune", config_file, "train.steps=1").code == 0
    right = (run_dir / reference.FILE).read_bytes()
    other_pairs = bytearray(right)
    place = other_pairs.index(b'"sha256":"') + 10
    other_pairs[place : place + 1] = b"g"
    for wrong in (right[:-1], right[:-1] + bytes([right[-1] ^ 1]), bytes(other_pairs), b""):
        shutil.rmtree(run_dir / "checkpoints")
        (run_dir / reference.FILE).write_bytes(wrong)
        assert moe_lm("finetune", config_file, "train.steps=1").code == 0
        assert (run_dir / reference.FILE).read_bytes() == right


def test_a_dry_run_counts_the_room_of_both_answers(config_file: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("finetune", config_file, "--dry-run")
    assert "4 sequences, 384 tokens" in done.out


def test_what_was_skipped_is_said(config_file: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "say a", "chosen": "a", "rejected": "a"}) + "\n")
    done = moe_lm("finetune", config_file, "train.steps=1")
    assert "1 skipped: a preference pair with equal sides (first: pairs.jsonl:81)" in done.out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.separate_documents=false", "data.separate_documents=false does not go with preference"),
        ("data.truncate=left", "data.truncate=left does not go with preference"),
        ("train.scheduled_sampling.share=0.5", "train.scheduled_sampling does not go with preference"),
        ("parallel.sequence_parallel_size=2", "parallel.sequence_parallel_size does not go with preference"),
        ("preference.beta=0", "preference.beta=0"),
        ("preference.label_smoothing=0.5", "preference.label_smoothing=0.5"),
        ("preference.bata=0.1", "did you mean preference.beta?"),
    ],
)
def test_what_does_not_go_together_is_refused(config_file: Path, moe_lm: MoeLm, setting: str, message: str) -> None:
    done = moe_lm("finetune", config_file, setting)
    assert done.code == 2
    assert message in done.err


def test_the_recipe_runs(config_file: Path, pretrained: Path, tmp_path: Path, shared_data: Path, moe_lm: MoeLm) -> None:
    settings = [
        f"run_dir={tmp_path / 'run'}", f"start_from={pretrained}", "train.steps=2", "parallel.device=cpu",
        f"data.train=[{shared_data / 'chat' / 'preferences.json.xz'}]", "train.eval_batches=1",
    ]  # fmt: skip
    done = moe_lm("finetune", RECIPE, *settings)
    assert (done.code, done.err) == (0, "")
    assert metrics(tmp_path / "run")[-1].keys() >= {f"val_{name}" for name in FIGURES}


@pytest.mark.slow
def test_real_preferences(pretrained: Path, tmp_path: Path, shared_data: Path, moe_lm: MoeLm) -> None:
    """1,100 pairs; the model has hardly learnt to write, and yet what is preferred there is learnt for unseen pairs."""
    settings = [
        f"run_dir={tmp_path / 'run'}", f"start_from={pretrained}", "train.optimizer.lr=3e-3", "train.steps=60",
        f"data.train=[{shared_data / 'chat' / 'preferences.json.xz'}]", "parallel.device=cpu",
    ]  # fmt: skip
    assert moe_lm("finetune", RECIPE, *settings).code == 0
    held_out = [line for line in metrics(tmp_path / "run") if "val_margin" in line]
    margins, accuracies = ([line[f"val_{name}"] for line in held_out] for name in ("margin", "accuracy"))
    assert margins == sorted(margins)
    assert margins[-1] > 1
    assert accuracies[-1] > 0.8
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"] - 0.2
