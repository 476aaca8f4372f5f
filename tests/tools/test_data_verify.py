"""`moe-lm data verify`: sound shards, a damaged one, and two ranks of which each reads its share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from tests.train.test_damaged_runs import flip_a_byte

MoeLm = Callable[..., Any]


@pytest.fixture
def shards(tiny_pretrain: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_pretrain.parent / "shards", tmp_path / "shards")
    return tmp_path / "shards"


def test_sound_shards_and_damaged_ones(tiny_pretrain: Path, shards: Path, moe_lm: MoeLm) -> None:
    command = ("data", "verify", tiny_pretrain, f"data.shards={shards}")
    done = moe_lm(*command)
    assert (done.code, [line.rpartition(": ")[2] for line in done.out.splitlines()]) == (0, ["sound", "sound"])
    flip_a_byte(shards / "text" / "train-00000.bin")
    (shards / "text" / "validation-00000.index").unlink()
    done = moe_lm(*command)
    assert done.code == 1
    assert f"shard {shards / 'text' / 'train-00000.bin'} is corrupt: xxh3_128" in done.out
    assert f"shard {shards / 'text' / 'validation-00000.index'} is missing" in done.out


def test_a_source_without_a_sound_manifest_is_damaged_and_the_others_are_verified(
    tiny_pretrain: Path, shards: Path, moe_lm: MoeLm
) -> None:
    for name in ("cut", "lost"):
        shutil.copytree(shards / "text", shards / name)
    manifest = (shards / "cut" / "manifest.json").read_bytes()
    (shards / "cut" / "manifest.json").write_bytes(manifest[: len(manifest) // 2])
    (shards / "lost" / "manifest.json").unlink()
    sources = ", ".join(f"{{name: {name}, path: {name}.txt}}" for name in ("cut", "text", "lost"))
    done = moe_lm("data", "verify", tiny_pretrain, f"data.shards={shards}", f"data.sources=[{sources}]")
    cut, cut_why, lost, lost_why, train, validation = done.out.splitlines()
    assert done.code == 1
    assert (cut, lost) == (f"{shards}/cut: damaged: 1", f"{shards}/lost: damaged: 1")
    assert cut_why.startswith(f"{shards}/cut/manifest.json is damaged: JSON: ")
    assert lost_why == (
        f"{shards}/lost/manifest.json is missing beside the token files; bring it back, or delete {shards}/lost and "
        "run moe-lm prepare"
    )
    assert train.startswith(f"{shards}/text: 1 train shard, ")
    assert (train.endswith("sound"), validation.endswith("sound")) == (True, True)


def test_a_token_outside_the_vocabulary_is_found_too(tiny_pretrain: Path, shards: Path, moe_lm: MoeLm) -> None:
    """Its checksum fits: whoever wrote the shard wrote the token."""
    file = shards / "text" / "train-00000.bin"
    tokens = np.fromfile(file, "<u2")
    tokens[17] = 5000
    tokens.tofile(file)
    manifest = json.loads((shards / "text" / "manifest.json").read_text())
    manifest["train"][0]["xxh3_128"] = xxh3_128_hexdigest(tokens.tobytes())
    (shards / "text" / "manifest.json").write_text(json.dumps(manifest))
    done = moe_lm("data", "verify", tiny_pretrain, f"data.shards={shards}")
    assert (done.code, f"{file}: token 5000 at offset 17 is outside the vocabulary of 1024" in done.out) == (1, True)


@pytest.mark.slow
def test_ranks_of_a_launcher_verify_a_share_each_and_all_learn_of_the_damage(tiny_pretrain: Path, shards: Path) -> None:
    flip_a_byte(shards / "text" / "train-00000.bin")
    command = ["-m", "moe_lm", "data", "verify", str(tiny_pretrain), f"data.shards={shards}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done
    assert done.stdout.count("train-00000.bin is corrupt") == 1
