"""Files that someone else wrote (rows 29 to 31), and sampling from what they hold (row 34)."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from tests.faults.conftest import Program, done
from tests.faults.nursery import Started

SAMPLE = ("--prompt", "a", "--max-new-tokens", "3")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def stranger(broken_off: Path) -> Path:
    """A checkpoint from elsewhere."""
    return broken_off / "checkpoints" / "step-00000040"


def sign(folder: Path, *names: str) -> None:
    """Give the manifest the checksums of changed or added files, as whoever wrote them would."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    kinds = {name for entry in manifest.values() for name in entry} - {"size"}
    for name in names:
        content = (folder / name).read_bytes()
        sums = {"sha256": hashlib.sha256(content).hexdigest(), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        manifest[name] = {"size": len(content)} | {kind: sums[kind] for kind in kinds}
    sign_manifest(folder, manifest)


def sign_manifest(folder: Path, manifest: object) -> None:
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    length = len((folder / "COMPLETE").read_text().strip())
    whole = hashlib.sha256(text).hexdigest() if length == 64 else xxhash.xxh3_128_hexdigest(text)
    (folder / "COMPLETE").write_text(whole + "\n")


def refused(process: Started) -> str:
    assert process.wait(timeout=60) in (1, 2), process.out
    assert "internal error" not in process.err
    assert "Traceback" not in process.err
    return process.err


@pytest.mark.row(29)
def test_no_file_of_a_checkpoint_is_executed(
    stranger: Path, tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    mark = tmp_path / "executed"
    code = pickle.dumps(Evil(mark))
    (stranger / "model" / "evil.pt").write_bytes(code)
    (stranger / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (stranger / "pytorch_model.bin").write_bytes(code)
    program("sample", stranger, *SAMPLE).wait()
    weights = next((stranger / "model").glob("*.safetensors"))
    weights.write_bytes(code)
    sign(stranger, f"model/{weights.name}")
    refused(program("sample", stranger, *SAMPLE))
    config = stranger / "model.yaml"
    config.write_text(f"!!python/object/apply:os.system ['touch {mark}']\n")
    sign(stranger, "model.yaml")
    refused(program("sample", stranger, *SAMPLE))
    assert not mark.exists()


@pytest.mark.row(29)
def test_no_code_of_a_hugging_face_folder_is_executed(tmp_path: Path, program: Program) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}})
    )
    refused(program("import", folder, "--run-dir", tmp_path / "run"))
    assert not mark.exists()


@pytest.mark.row(30)
@pytest.mark.parametrize("length", [2**40, 2**62, 2**64 - 1, 99_000_000])
def test_an_absurd_header_allocates_nothing(stranger: Path, program: Program, length: int) -> None:
    weights = next((stranger / "model").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(struct.pack("<Q", length) + content[8:])
    sign(stranger, f"model/{weights.name}")
    process = program("sample", stranger, *SAMPLE, patch="limited_memory")
    assert weights.name in refused(process)


@pytest.mark.row(30)
@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 10]},
        {"shape": [2**40, 2**40]},
        {"shape": [int("9" * 4299)] * 50},
        {"data_offsets": [0, 2**63]},
        {"dtype": "F7"},
    ],
    ids=["overlap", "shape", "long numbers", "offsets", "type"],
)
def test_a_header_that_lies_is_refused(stranger: Path, program: Program, change: dict[str, Any]) -> None:
    weights = next((stranger / "model").glob("*.safetensors"))
    content = weights.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = max(header)
    header[name] |= change
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    sign(stranger, f"model/{weights.name}")
    process = program("sample", stranger, *SAMPLE, patch="limited_memory")
    assert weights.name in refused(process)


@pytest.mark.row(31)
@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname", "model/../../../../outside"])
def test_a_manifest_that_leads_out_is_refused(stranger: Path, program: Program, name: str) -> None:
    manifest = json.loads((stranger / "manifest.json").read_text(encoding="utf-8"))
    weights = next(listed for listed in manifest if listed.startswith("model/"))
    manifest[f"model/../{name}" if name.startswith("..") else name] = manifest.pop(weights)
    sign_manifest(stranger, manifest)
    said = refused(program("sample", stranger, *SAMPLE))
    assert "leads out of the checkpoint" in said or "is not in the manifest" in said


@pytest.mark.row(31)
@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "model.yaml"])
def test_a_symbolic_link_in_a_checkpoint_is_refused(
    stranger: Path, tmp_path: Path, program: Program, name: str
) -> None:
    outside = tmp_path / "outside"
    (stranger / name).rename(outside)
    (stranger / name).symlink_to(outside)
    assert "symbolic link" in refused(program("sample", stranger, *SAMPLE))


@pytest.mark.row(31)
def test_a_template_that_the_manifest_does_not_list_is_not_read(
    stranger: Path, tmp_path: Path, program: Program
) -> None:
    (tmp_path / "secret").write_text("TOP SECRET")
    manifest = json.loads((stranger / "manifest.json").read_text(encoding="utf-8"))
    manifest.pop("tokenizer/chat_template.jinja", None)
    (stranger / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    (stranger / "tokenizer" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    sign_manifest(stranger, manifest)
    said = refused(program("sample", stranger, *SAMPLE))
    assert "chat_template.jinja" in said
    assert "TOP SECRET" not in said


# Sampling


@pytest.mark.row(34)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "0"], None),
        (["--temperature", "1e-30"], None),
        (["--temperature", "1e30"], None),
        (["--top-k", "100000000"], None),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "2"], "--top-p"),
        (["--prompt", ""], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_extreme_settings_give_a_text_or_a_sentence(
    whole: Path, program: Program, options: list[str], said: str | None
) -> None:
    process = program("sample", whole, *SAMPLE, "--seed", "1", *options)
    if said is None:
        done(process)
    else:
        assert said in refused(process)


@pytest.mark.row(34)
@pytest.mark.parametrize("verb", ["sample", "eval"])
def test_weights_that_are_not_numbers_are_said(stranger: Path, program: Program, tmp_path: Path, verb: str) -> None:
    weights = next((stranger / "model").glob("*.safetensors"))
    found = load_file(weights)
    name = next(name for name in found if "embed" in name)
    found[name] = torch.full_like(found[name], float("nan"))
    save_file(found, weights)
    sign(stranger, f"model/{weights.name}")
    (tmp_path / "text.txt").write_text("some text to evaluate on " * 20)
    arguments = SAMPLE if verb == "sample" else (tmp_path / "text.txt",)
    said = refused(program(verb, stranger, *arguments))
    assert "nan" in said.lower() or "finite" in said.lower() or "not a number" in said.lower()
