"""Impossible settings and damaged or odd data (rows 24 to 28)."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from xxhash import xxh3_128_hexdigest

from tests.faults.conftest import SHORT, Program, done, losses_of
from tests.faults.harming import flip_a_bit
from tests.processes import ROOT, wait_until


@pytest.mark.row(24)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.num_experts_per_tok=9"], ["num_experts_per_tok=9", "n_routed_experts=8"]),
        (["parallel.engine=deepspeed", "parallel.expert_parallel_size=3"], ["parallel.expert_parallel_size=3", "8"]),
        (["data.sequence_length=100000"], ["data.sequence_length=100000", "max_position_embeddings"]),
        (["model.vocab_size=1000"], ["model.vocab_size=1000", "1024"]),
        (["model.num_attention_heads=3"], ["num_attention_heads", "3"]),
        (["model.n_group=3", "model.topk_group=1"], ["n_group"]),
        (["model.hiden_size=32"], ["hiden_size", "hidden_size"]),
        (["train.optimizer.lr=.inf"], ["train.optimizer.lr", "finite"]),
        (["train.balance.z_loss=.inf"], ["train.balance.z_loss", "finite"]),
        (["model.routed_scaling_factor=.nan"], ["routed_scaling_factor", "finite"]),
        (["train.seed=99999999999999999999999999"], ["train.seed"]),
        (["train.global_batch_size=0"], ["train.global_batch_size"]),
        (["model.hidden_size=1000000"], ["memory"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_by_name_before_anything_is_made(
    tiny_pretrain: Path, tmp_path: Path, program: Program, settings: list[str], said: list[str]
) -> None:
    process = done(program("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, *settings), 2)
    for word in said:
        assert word in process.err
    assert "internal error" not in process.err
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
    dry = program("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, *settings, "--dry-run")
    assert dry.wait() == 2, dry.out


@pytest.mark.row(24)
def test_a_key_that_is_given_twice_is_refused(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    config = tmp_path / "twice.yaml"
    text = tiny_pretrain.read_text(encoding="utf-8")
    config.write_text(text + "\nrun_dir: elsewhere\n", encoding="utf-8")
    process = done(program("pretrain", config, f"run_dir={tmp_path / 'run'}", *SHORT), 2)
    assert "run_dir" in process.err
    assert "twice" in process.err or "already" in process.err or "again" in process.err


# Shards


@pytest.fixture
def shards(tiny_pretrain: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the shards of training text, and the setting that makes a run read it."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_pretrain.parent / "shards", folder)
    return folder, f"data.shards={folder}"


def train_shard(folder: Path) -> Path:
    return next(folder.rglob("train-*.bin"))


@pytest.mark.row(25)
@pytest.mark.parametrize(
    ("claimed", "verify", "offset"),
    [(1024, "true", "12345"), (60000, "false", "")],
    ids=["verified", "when it is read"],
)
def test_a_token_outside_the_vocabulary_is_named_with_its_file_and_offset(
    tiny_pretrain: Path,
    tmp_path: Path,
    program: Program,
    shards: tuple[Path, str],
    claimed: int,
    verify: str,
    offset: str,
) -> None:
    """The checksum is made to fit, as a faulty program would write it; so is the manifest's own vocabulary."""
    folder, setting = shards
    file = train_shard(folder)
    tokens = np.fromfile(file, dtype=np.uint16)
    tokens[12345::64] = 5000
    tokens.tofile(file)
    manifest = next(file.parent.glob("manifest*.json"))
    sign_again(manifest, file, claimed)
    process = program(
        "pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, setting, f"data.verify={verify}"
    )
    assert process.wait() in (1, 2), process.out
    assert "internal error" not in process.err
    assert file.name in process.err
    assert f"token 5000 at offset {offset}" in process.err


def sign_again(manifest: Path, file: Path, vocab_size: int) -> None:
    """Give a manifest the checksum of a changed file and this vocabulary size."""
    values = json.loads(manifest.read_text(encoding="utf-8"))
    (entry,) = [shard for shard in values["train"] if shard["name"] == file.stem]
    entry["xxh3_128"] = xxh3_128_hexdigest(file.read_bytes())
    manifest.write_text(json.dumps(values | {"vocab_size": vocab_size}), encoding="utf-8")


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replaced_by_a_link(file: Path) -> None:
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


@pytest.mark.row(26)
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink, replaced_by_a_link])
def test_a_damaged_shard_is_named(
    tiny_pretrain: Path, tmp_path: Path, program: Program, shards: tuple[Path, str], damage: object
) -> None:
    folder, setting = shards
    file = train_shard(folder)
    damage(file)  # type: ignore[operator]
    process = program("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, setting, "data.verify=true")
    assert process.wait() in (1, 2)
    assert file.name in process.err
    assert "internal error" not in process.err


@pytest.mark.row(26)
def test_a_damaged_shard_is_left_out_by_choice(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    setting = f"data.shards={tmp_path / 'shards'}"
    done(program("prepare", tiny_pretrain, setting, patch="small_shards"))
    damaged = min((tmp_path / "shards").rglob("train-*.bin"))
    flip_a_bit(damaged)
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *SHORT, "train.steps=5", setting)
    command += ("data.verify=true",)
    refused = program(*command)
    assert refused.wait() in (1, 2)
    assert "data.on_damage=leave_out" in refused.err
    process = done(program(*command, "data.on_damage=leave_out"))
    assert damaged.name in process.out
    assert "tokens (" in process.out  # and their share
    assert len(losses_of(tmp_path / "run")) == 5


@pytest.mark.row(26)
def test_a_shard_that_is_cut_while_training_reads_it_is_named(
    tiny_pretrain: Path, tmp_path: Path, program: Program, shards: tuple[Path, str]
) -> None:
    folder, setting = shards
    run_dir = tmp_path / "run"
    process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, "train.steps=100000", setting)
    wait_until(lambda: ((run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 2000)
               or process.poll() is not None, "steps")  # fmt: skip
    file = train_shard(folder)
    os.truncate(file, 100)
    assert process.wait(timeout=60) != 0
    assert file.name in process.err


# Text


@pytest.mark.row(27)
@pytest.mark.slow
def test_odd_bytes_are_counted_and_what_is_kept_round_trips(tmp_path: Path, program: Program) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "good.txt").write_text("A good document.\n\n" * 200, encoding="utf-8")
    (text / "empty.txt").write_bytes(b"")
    (text / "latin.txt").write_bytes("Übergrößen".encode("latin-1") * 100)
    (text / "nul.txt").write_bytes(b"before\0after\n" * 50)
    (text / "surrogate.jsonl").write_text('{"text": "half \\ud800 a pair"}\n{"text": "whole"}\n', encoding="utf-8")
    (text / "broken.jsonl").write_text('{"text": "good"}\n{"text": 5}\n[[[[\n{"other": "x"}\n', encoding="utf-8")
    (text / "fake.parquet").write_bytes(b"PAR1 not parquet PAR1")
    (text / "broken.txt.gz").write_bytes(b"\x1f\x8b\x08\x00 this is not gzip")
    with (text / "line.jsonl").open("wb") as file:
        file.write(b'{"text": "' + b"x" * 100_000_000 + b'"}\n{"text": "after the long line"}\n')
    config = tmp_path / "prepare.yaml"
    source = {"name": "odd", "path": str(text)}
    values = yaml.safe_load((ROOT / "tests/golden/tiny_moe.yaml").read_text(encoding="utf-8"))
    values["data"] |= {
        "sources": [source],
        "tokenizer": str(ROOT / "tokenizer/tiny"),
        "shards": str(tmp_path / "shards"),
    }
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    process = done(program("prepare", config))
    said = process.out + process.err
    for name in ("latin.txt", "broken.jsonl", "fake.parquet", "broken.txt.gz", "line.jsonl"):
        assert name in said
    assert "0 inexact round trips" in said or "round trip" not in said


@pytest.mark.row(28)
@pytest.mark.parametrize("letters", ["a", pytest.param("中", marks=pytest.mark.slow)])
def test_a_million_times_one_letter_takes_linear_time(tmp_path: Path, program: Program, letters: str) -> None:
    seconds = {}
    for millions in (1, 4):
        folder = tmp_path / str(millions)
        folder.mkdir()
        (folder / "text.txt").write_text(letters * (millions * 1_000_000), encoding="utf-8")
        values = yaml.safe_load((ROOT / "tests/golden/tiny_moe.yaml").read_text(encoding="utf-8"))
        values["data"] |= {
            "sources": [{"name": "a", "path": str(folder / "text.txt")}],
            "tokenizer": str(ROOT / "tokenizer/tiny"), "shards": str(folder / "shards"), "validation_fraction": 0,
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        begun = time.monotonic()
        done(program("prepare", folder / "config.yaml"))
        seconds[millions] = time.monotonic() - begun
    assert seconds[4] < 12 * seconds[1] + 5  # quadratic time would be minutes
