"""Folders with the names that `transformers` 5 has in memory: experts as stacks, as state dicts of FSDP keep them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lm.checkpoint.safetensors_file import Stored
from moe_lm.common.errors import MoeLmError
from moe_lm.config.model import ModelConfig
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.hf_folder import HFFolder
from moe_lm.tools.interop.hf_tensors import check_counts
from moe_lm.tools.interop.importing import import_folder
from tests.tools.interop.folders import FAMILIES, tensors_of, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = ["dots1", "glm4_moe", "deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe some dense", "mixtral", "olmoe"]
STEP = Path("checkpoints") / "step-00000000" / "model"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def fused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Any:
    """Makes the folder of a variant with the names and stacks that its class has in memory."""

    def make(variant: str) -> Path:
        return write_folder(tmp_path / "hf", variant, tiny_tokenizer, save_original_format=False)

    return make


def assert_same_run(found: Path, wanted: Path) -> None:
    ours, theirs = tensors_of(found / STEP), tensors_of(wanted / STEP)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("variant", SPARSE)
def test_stacked_experts_are_those_of_the_published_names(
    variant: str, fused: Any, imported_run: Any, tmp_path: Path
) -> None:
    folder = fused(variant)
    stacks = [name for name in tensors_of(folder) if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    layers = (
        3 - FAMILIES[variant][1].get("first_k_dense_replace", 0) - len(FAMILIES[variant][1].get("mlp_only_layers", []))
    )
    assert len(stacks) == 2 * layers
    import_folder(folder, tmp_path / "run", proof_bytes=0)
    assert_same_run(tmp_path / "run", imported_run(variant))


def test_stack_is_read_an_expert_at_a_time(fused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fused("mixtral")
    read, rows = [], Stored.rows

    def counted(stored: Stored, start: int, stop: int) -> torch.Tensor:
        if stored.name.endswith("gate_up_proj"):
            read.append(stop - start)
        return rows(stored, start, stop)

    monkeypatch.setattr(Stored, "rows", counted)
    import_folder(folder, tmp_path / "run", proof_bytes=0)
    assert set(read) == {1}


def test_experts_of_a_stack_count_as_many(tmp_path: Path) -> None:
    """A folder with far too few tensors is refused before names are made; stacks are few, and hold many."""
    save_file({"mlp.experts.down_proj": torch.zeros(3000, 1, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    shape = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "head_dim": 4}
    small, large = (ModelConfig(**shape, num_hidden_layers=layers, n_routed_experts=3000) for layers in (1, 5))
    check_counts(HFFolder(tmp_path), small, "hf")
    with pytest.raises(MoeLmError, match="holds 3000 tensors, but num_hidden_layers=5 and 3000 experts"):
        check_counts(HFFolder(tmp_path), large, "hf")


@pytest.mark.parametrize("variant", ["dots1", "mixtral"])
def test_stacked_experts_are_proven_with_transformers(variant: str, fused: Any, tmp_path: Path) -> None:
    proof = import_folder(fused(variant), tmp_path / "run")
    assert proof.layers == "3 of 3"
    assert all(comparison.equal and comparison.other_experts == 0 for comparison in proof.logits)
    assert proof.not_proven == []


def test_mixtrals_experts_one_by_one_in_another_layers_name(hf_folder: Any, imported_run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_folder("mixtral"), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("block_sparse_moe.", "mlp."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    import_folder(folder, tmp_path / "run", proof_bytes=0)
    assert_same_run(tmp_path / "run", imported_run("mixtral"))


def test_stack_of_another_shape_is_refused(fused: Any, tmp_path: Path) -> None:
    """Transposed, as other libraries stack them."""
    folder = fused("dots1")
    tensors = load_file(folder / "model.safetensors")
    down = GATE_UP.replace("gate_up", "down")
    tensors[down] = tensors[down].mT.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoeLmError, match=rf"tensor {down} is \[8, 16, 32\], expected \[8, 32, 16\] by config.json"):
        import_folder(folder, tmp_path / "run", proof_bytes=0)
    assert not list(tmp_path.glob("run*"))


def test_names_that_are_there_instead_are_said(fused: Any, tmp_path: Path) -> None:
    folder = fused("dots1")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.w13"] = tensors.pop(GATE_UP)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoeLmError) as refusal:
        import_folder(folder, tmp_path / "run", proof_bytes=0)
    assert "lacks 16 tensors that its config.json promises: model.layers.1.mlp.experts.0.gate_proj" in str(
        refusal.value
    )
    assert str(refusal.value).endswith("; there instead: model.layers.1.mlp.experts.w13")
