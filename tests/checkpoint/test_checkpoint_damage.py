"""Damaged and hostile checkpoints are refused, the file named, nothing touched (FAULTS rows 5-7, 29-31)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.checkpoint import checkpoint, read, write
from moe_lm.checkpoint.lineage import fingerprint, is_model
from moe_lm.checkpoint.placement import INDEX
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import sync
from tests.checkpoint.conftest import state_of

MODEL_FILE = "model/shard-00001-model-00001-of-00001.safetensors"
OPTIMIZER_FILE = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def assert_refused(folder: Path, *words: str) -> None:
    """`load` names the damage, offers the previous checkpoint, and touches no tensor."""
    target = state_of(0)
    with pytest.raises(MoeLmError) as raised:
        read.load(folder, target)
    for word in (*words, "step-00000500"):
        assert word in str(raised.value)
    assert not any(tensor.any() for tensor in target.values())


def test_a_flipped_bit_is_refused(newest: Path) -> None:
    for name in (MODEL_FILE, OPTIMIZER_FILE, "config.yaml"):
        content = bytearray((newest / name).read_bytes())
        for position in (0, len(content) // 2, len(content) - 1):
            content[position] ^= 1
            (newest / name).write_bytes(content)
            assert_refused(newest, name, "checksum", "the newest sound one before it")
            content[position] ^= 1
        (newest / name).write_bytes(content)
    read.load(newest, state_of(0))


def test_a_bit_flipped_between_memory_and_file_is_found(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum is of the tensor, not of what the file got."""

    def flip(path: Path) -> None:
        if path.name == Path(MODEL_FILE).name:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        sync(path)

    monkeypatch.setattr(write, "sync", flip)
    folder = write.save(checkpoints, 1500, state_of(1500), {})
    with pytest.raises(MoeLmError, match=f"{MODEL_FILE} does not have the checksum"):
        read.load(folder, state_of(0))


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make manifest and COMPLETE agree with the files, as an attacker would, or a version that wrote SHA-256."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        content = (folder / name).read_bytes()
        manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_manifests_with_sha256_are_read_and_verified(newest: Path) -> None:
    before = fingerprint(newest)
    sign(newest)
    loaded = state_of(0)
    read.load(newest, loaded)
    assert torch.equal(loaded["model.weight"], state_of(1000)["model.weight"])
    assert fingerprint(newest) != before
    assert is_model(newest, before)
    content = bytearray((newest / MODEL_FILE).read_bytes())
    content[-1] ^= 1
    (newest / MODEL_FILE).write_bytes(content)
    assert_refused(newest, MODEL_FILE, "checksum")


def test_a_model_is_known_by_fingerprints_of_old_and_new_checksums(checkpoints: Path) -> None:
    """What is read is the model, so a copy that another version wrote is the same model."""
    new, old, other = (write.save(checkpoints.parent / name, 1, state_of(1), {}) for name in ("new", "old", "other"))
    sign(old)
    assert fingerprint(old) != fingerprint(new) == fingerprint(other)
    assert is_model(new, fingerprint(old))
    assert is_model(old, fingerprint(new))
    assert not is_model(checkpoints / "step-00000500", fingerprint(old))


def test_a_flipped_bit_in_a_kept_file_is_refused_when_read(newest: Path) -> None:
    (newest / "config.yaml").write_text("step: 1001\n")
    with pytest.raises(MoeLmError, match=r"config\.yaml does not have the checksum"):
        checkpoint.read_text(newest, "config.yaml")


@pytest.mark.parametrize("size", [0, 1, 40])
def test_a_truncated_file_is_refused(newest: Path, size: int) -> None:
    os.truncate(newest / MODEL_FILE, size)
    assert_refused(newest, MODEL_FILE, f"has {size} bytes")


def test_a_missing_file_is_refused(newest: Path) -> None:
    (newest / MODEL_FILE).unlink()
    assert_refused(newest, MODEL_FILE, "missing")


def test_a_changed_or_missing_manifest_is_refused(newest: Path) -> None:
    path = newest / "manifest.json"
    path.write_text(path.read_text() + " ")
    assert_refused(newest, "manifest.json", "sha256")
    path.unlink()
    assert_refused(newest, "manifest.json")


def test_a_tensor_file_that_the_manifest_does_not_know_is_refused(newest: Path) -> None:
    shutil.copy(newest / MODEL_FILE, newest / "model" / "more.safetensors")
    assert_refused(newest, "more.safetensors", "not in the manifest")


def test_a_tokenizer_file_that_the_manifest_does_not_know_is_refused(checkpoints: Path) -> None:
    """A chat template, say, that nobody signed."""
    newest = write.save(checkpoints, 1500, state_of(1500), {"tokenizer/tokenizer.json": "{}"})
    for make in (lambda path: path.write_text("{{ messages }}"), lambda path: path.symlink_to("/etc/hostname")):
        make(newest / "tokenizer" / "chat_template.jinja")
        with pytest.raises(MoeLmError, match=r"tokenizer/chat_template\.jinja is not in the manifest"):
            checkpoint.verified_path(newest, "tokenizer")
        (newest / "tokenizer" / "chat_template.jinja").unlink()
    assert checkpoint.verified_path(newest, "tokenizer") == newest / "tokenizer"


def test_without_an_older_checkpoint_the_error_says_so(newest: Path) -> None:
    shutil.rmtree(newest.parent / "step-00000500")
    (newest / MODEL_FILE).unlink()
    with pytest.raises(MoeLmError, match="no sound checkpoint is before it"):
        read.load(newest, {})


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "model/../../step-00000500/config.yaml"])
def test_path_traversal_in_the_manifest_is_refused(newest: Path, name: str) -> None:
    (newest.parent.parent / "secret").write_text("x")
    sign(newest, lambda manifest: manifest.update({name: {"size": 1, "sha256": "0"}}))
    assert_refused(newest, name, "leads out")


def test_symbolic_links_are_refused(newest: Path) -> None:
    model = newest / "model"
    elsewhere = newest.parent.parent / "elsewhere"
    model.rename(elsewhere)
    model.symlink_to(elsewhere)
    assert_refused(newest, f"model/{INDEX}", "symbolic link")
    model.unlink()
    model.mkdir()
    (elsewhere / INDEX).rename(model / INDEX)
    (newest / MODEL_FILE).symlink_to(elsewhere / Path(MODEL_FILE).name)
    assert_refused(newest, MODEL_FILE, "symbolic link")


@pytest.mark.parametrize("entry", [None, 3, {}, {"size": "x"}, {"size": -1, "sha256": 0}])
def test_a_manifest_of_another_shape_is_refused(newest: Path, entry: object) -> None:
    sign(newest, lambda manifest: manifest.update({MODEL_FILE: entry, "a\0b": entry}))
    assert_refused(newest, MODEL_FILE)


def header(length: int, content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", length or len(text)) + text


HOSTILE = {
    "absurd length": header(1 << 62, {}),
    "longer than the file": header(10_000, {}),
    "overlapping offsets": header(
        0,
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("model.a", "model.b")},
    )
    + bytes(8),
    "offsets beyond the file": header(
        0, {"model.a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ),
    "not JSON": struct.pack("<Q", 8) + b"deadbeef",
    "nonsense of the sharding": header(
        0,
        {
            "__metadata__": {"DCP_SHARDING_INFO": "[]"},
            "model.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
    )
    + bytes(8),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_safetensors_header_is_refused(newest: Path, content: bytes) -> None:
    (newest / MODEL_FILE).write_bytes(content)
    assert_refused(newest, MODEL_FILE)  # by its checksum, before anything parses it
    sign(newest)
    with pytest.raises(MoeLmError, match=str(newest / "model")):
        read.load(newest, state_of(0))
