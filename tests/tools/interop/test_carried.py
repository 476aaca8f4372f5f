"""Tensors for multi-token prediction: kept beside an imported model, through training, to the export in its family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lm.checkpoint.carried import is_carrying
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.importing import import_folder
from tests.conftest import MoeLm
from tests.runs import last_checkpoint
from tests.tools.interop.folders import tensors_of
from tests.tools.interop.test_continued import write_config

pytestmark = pytest.mark.usefixtures("one_thread")
EXTRA: dict[str, Tensor] = {
    "model.layers.3.eh_proj.weight": torch.arange(32.0 * 64).view(32, 64),
    "model.layers.3.enorm.weight": torch.ones(32, dtype=torch.bfloat16),
    "model.layers.3.mlp.gate.e_score_correction_bias": torch.arange(8.0),
    "model.mtp_block.0.scale": torch.tensor(3.0),
}


@pytest.fixture
def imported(hf_folder: Any, tmp_path: Path) -> Path:
    folder = shutil.copytree(hf_folder("deepseek_v3"), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    save_file(load_file(folder / "model.safetensors") | EXTRA, folder / "model.safetensors", {"format": "pt"})
    proof = import_folder(folder, tmp_path / "imported", proof_bytes=0)
    named = ", ".join(EXTRA)
    assert proof.notes == [
        f"carried along: 4 tensors for multi-token prediction ({named}); nothing here trains or uses them, and an "
        "export as deepseek_v3 writes them again"
    ]
    return tmp_path / "imported"


def files_in(run: Path) -> list[Path]:
    return sorted((last_checkpoint(run) / "carried").iterdir())


def test_they_go_through_training_and_come_out_in_their_family(
    imported: Path, tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    config = write_config(tmp_path, tiny_pretrain, imported, checkpoint={"every": 1, "keep": 1, "best": False})
    done = moe_lm("pretrain", config)
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "run"
    # No second copy on the disk, and none of the checkpoints that it went through is needed.
    assert [path.stat().st_ino for path in files_in(run)] == [path.stat().st_ino for path in files_in(imported)]
    shutil.rmtree(imported)
    proof = export_run(run, tmp_path / "out", proof_bytes=0)
    assert proof.family == "deepseek_v3"
    assert any(note.startswith("carried along: 4 tensors for multi-token") for note in proof.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    written, before = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "hf")
    assert written.keys() == before.keys()
    for name, tensor in EXTRA.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert not torch.equal(written["lm_head.weight"], before["lm_head.weight"])

    other = export_run(run, tmp_path / "other", "glm4_moe_lite", proof_bytes=0)
    assert any(note.endswith("which came with a deepseek_v3; --format deepseek_v3 writes them") for note in other.notes)
    assert tensors_of(tmp_path / "other").keys() == before.keys() - EXTRA.keys()
    assert "num_nextn_predict_layers" not in json.loads((tmp_path / "other" / "config.json").read_text())


def test_what_is_carried_is_verified_and_proven_beside_the_model(imported: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    proof = export_run(imported, tmp_path / "out")
    assert len(proof.logits) == 2
    assert all(comparison.equal for comparison in proof.logits)
    (file,) = files_in(imported)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert moe_lm("sample", imported, "--prompt", "a", "--max-new-tokens", 1).code == 0
    done = moe_lm("export", imported, tmp_path / "again")
    assert done.code == 1
    assert "carried/model.safetensors" in done.err
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_adapters_leave_them_to_their_base_and_an_average_has_them(
    imported: Path, finetune_config: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    run, values = tmp_path / "run", yaml.safe_load(finetune_config.read_text())
    finetune_config.write_text(yaml.safe_dump(values | {"start_from": str(imported), "lora": {"rank": 2}}))
    done = moe_lm("finetune", finetune_config)
    assert (done.code, done.err) == (0, "")
    assert not is_carrying(last_checkpoint(run))
    proof = export_run(run, tmp_path / "out", proof_bytes=0)
    assert proof.family == "deepseek_v3"
    assert torch.equal(tensors_of(tmp_path / "out")["model.mtp_block.0.scale"], EXTRA["model.mtp_block.0.scale"])
    done = moe_lm("merge", imported, imported, "--run-dir", tmp_path / "merged")
    assert (done.code, done.err) == (0, "")
    assert is_carrying(last_checkpoint(tmp_path / "merged"))
