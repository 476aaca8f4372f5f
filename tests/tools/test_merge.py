"""`moe-lm merge`: the average that it writes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.checkpoint import checkpoint
from moe_lm.generate.session import Session
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools import merge
from moe_lm.tools.merge import weights_of
from tests.runs import last_checkpoint, tensors
from tests.tiny import tiny_model, write_run

MoeLm = Callable[..., Any]
STEPS = (10, 20, 30)


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    for step in STEPS:
        model = tiny_model(seed=step, vocab_size=tiny_tokenizer.vocab_size)
        write_run(tmp_path / "run", model, tiny_tokenizer, step=step)
    return tmp_path / "run"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return tensors(run / "checkpoints" / f"step-{step:08d}", "model")


@pytest.mark.parametrize(
    ("given", "shares"),
    [("equal", (1 / 3, 1 / 3, 1 / 3)), ("linear", (1 / 6, 2 / 6, 3 / 6)), ("exponential", (1 / 7, 2 / 7, 4 / 7)),
     ("3,0,1", (3 / 4, 0, 1 / 4))],
)  # fmt: skip
def test_the_average_is_that_of_the_checkpoints(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, shares: tuple[float, ...]
) -> None:
    monkeypatch.setattr("moe_lm.checkpoint.safetensors_file.PIECE_BYTES", 1000)  # several pieces a tensor
    merge.merge([run], tmp_path / "merged", last=3, weights=given)
    found = tensors(last_checkpoint(tmp_path / "merged"), "model")
    parts = [weights(run, step) for step in STEPS]
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        expected = sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.as_tensor(expected).float()), name


def test_the_merged_run_is_a_run(run: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("merge", run, "--last", "2", "--run-dir", tmp_path / "merged")
    assert "0.5000" in done.out
    assert "step-00000010" not in done.out
    folder = checkpoint.resolve(tmp_path / "merged")
    assert checkpoint.step_of(folder) == 30
    checkpoint.verify(folder)
    entries = checkpoint.read_text(folder, merge.MERGED)
    assert entries.count("weight: 0.5") == 2
    assert Session.load(tmp_path / "merged").model.config == Session.load(run).model.config


def test_runs_are_merged_by_their_newest_checkpoints(run: Path, tmp_path: Path) -> None:
    said = merge.merge([run / "checkpoints" / "step-00000010", run], tmp_path / "merged")
    assert "step-00000010" in said
    assert "step-00000030" in said


def test_models_of_another_shape_are_refused(
    run: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, moe_lm: MoeLm
) -> None:
    other = tiny_model(vocab_size=tiny_tokenizer.vocab_size, num_experts_per_tok=1)
    write_run(tmp_path / "other", other, tiny_tokenizer)
    done = moe_lm("merge", run, tmp_path / "other", "--run-dir", tmp_path / "merged")
    assert done.code == 2
    assert "hold models of other shapes (num_experts_per_tok: 3 -> 1)" in done.err
    assert not (tmp_path / "merged").exists()


def test_a_damaged_checkpoint_leaves_nothing(run: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    file = next((run / "checkpoints" / "step-00000020").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    done = moe_lm("merge", run, "--last", "3", "--run-dir", tmp_path / "merged")
    assert done.code == 1
    assert "is damaged" in done.err
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--last", "5"], "holds 3 good checkpoints, --last asks for 5"),
        ([], "is one checkpoint, and merging takes two or more"),
        (["--last", "3", "--weights", "1,2"], "are 2 numbers for 3 checkpoints"),
        (["--last", "3", "--weights", "some"], "expected equal, linear, exponential, or numbers"),
        (["--last", "3", "--weights", "1,-1,0"], "add up to 0"),
    ],
)
def test_what_cannot_be_merged(run: Path, tmp_path: Path, moe_lm: MoeLm, arguments: list[str], said: str) -> None:
    done = moe_lm("merge", run, *arguments, "--run-dir", tmp_path / "merged")
    assert done.code == 2
    assert said in done.err


def test_exponential_weights_double() -> None:
    assert weights_of("exponential", 2) == [1 / 3, 2 / 3]


def test_the_moving_average_becomes_a_run(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    """Of the weights after 3 steps, with shares 1, 2 and 4 of 7; tied weights and router biases are there too."""
    settings = ("train.steps=3", "train.optimizer.ema_decay=0.5", "model.tie_word_embeddings=true")
    saving = ("checkpoint.every=1", "checkpoint.keep=3", f"run_dir={tmp_path / 'run'}")
    assert moe_lm("pretrain", tiny_pretrain, *settings, *saving, "train.eval_batches=1").code == 0
    done = moe_lm("merge", tmp_path / "run", "--ema", "--run-dir", tmp_path / "average")
    assert done.code == 0, done.err
    found = tensors(last_checkpoint(tmp_path / "average"), "model")
    of_steps = [weights(tmp_path / "run", step) for step in (1, 2, 3)]
    assert found.keys() == of_steps[-1].keys()
    for name, tensor in found.items():
        parts = of_steps[-1:] if "bias" in name else of_steps
        shares = torch.tensor([1, 2, 4][-len(parts) :], dtype=torch.float64)
        expected = torch.tensordot(shares / shares.sum(), torch.stack([part[name].double() for part in parts]), dims=1)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_without_a_moving_average(run: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("merge", run, "--ema", "--run-dir", tmp_path / "average")
    assert done.code == 2
    assert "has no moving average; train with train.optimizer.ema_decay, like 0.999" in done.err
    done = moe_lm("merge", run, "--ema", "--last", "2", "--run-dir", tmp_path / "average")
    assert "--ema takes the average that one run kept" in done.err
