"""DeepSeek-V3's published form: matrices in 8 bits with a scale for each block, read in bfloat16."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.fp8 import FP8Folder
from moe_lm.tools.interop.importing import import_folder
from tests.tools.interop.folders import DEEPSEEK, FAMILIES, LATENT, SHAPE, tensors_of, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 128
QUANTIZED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
# Published are the projections of attention and of feed-forward layers; here no size but one is whole blocks.
IN_8_BITS = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$|self_attn\.\w+_[ab]_proj\.weight$")
SIZES = {
    "hidden_size": 192, "intermediate_size": 200, "moe_intermediate_size": 136, "kv_lora_rank": 64, "q_lora_rank": 136,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64,
}  # fmt: skip
MATRIX = "model.layers.1.mlp.experts.3.up_proj.weight"


def in_8_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as it is published: the largest value of each block becomes the largest of e4m3, which is 448."""
    rows, columns = matrix.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scale[row, column] = matrix[block].float().abs().max() / 448
            quantized[block] = (matrix[block].float() / scale[row, column]).to(torch.float8_e4m3fn)
    return quantized, scale


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        values = SHAPE | DEEPSEEK | LATENT | SIZES
        patch.setitem(FAMILIES, "wide", ("deepseek_v3", values))
        write_folder(folder, "wide", tiny_tokenizer, dtype=torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if IN_8_BITS.search(name):
            tensors[name], tensors[f"{name}_scale_inv"] = in_8_bits(tensor)
        else:
            tensors[name] = tensor
    # The layer for multi-token prediction has matrices in 8 bits too.
    extra = "model.layers.3.mlp.gate_proj.weight"
    tensors[extra], tensors[f"{extra}_scale_inv"] = in_8_bits(torch.ones(130, 130))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZED}))
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "hf")


def slowly(quantized: Tensor, scale: Tensor) -> np.ndarray[Any, Any]:
    """The matrix in float32, from the bits of its entries: sign, 4 bits of exponent (bias 7), 3 bits of fraction."""
    values = np.empty(256, np.float32)
    for bits in range(256):
        exponent, fraction = bits >> 3 & 15, bits & 7
        size = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
        values[bits] = -size if bits >> 7 else size
    bits_of = quantized.view(torch.uint8).numpy()
    rows, columns = bits_of.shape
    result = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            factor = scale.numpy()[row // BLOCK, column // BLOCK]
            result[row, column] = values[bits_of[row, column]] * factor
    return result


@pytest.mark.parametrize("name", [MATRIX, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"])
def test_rows_are_entries_times_the_scale_of_their_block(published: Path, name: str) -> None:
    stored = load_file(published / "model.safetensors")
    expected = torch.from_numpy(slowly(stored[name], stored[f"{name}_scale_inv"])).bfloat16()
    source = FP8Folder(published)
    assert source.dtype(name) == torch.bfloat16
    rows, columns = source.shape(name)
    for start, stop in ((0, rows), (0, 1), (5, 77), (rows - 3, rows), (min(120, rows - 2), rows)):
        assert torch.equal(source.rows(name, start, stop), expected[start:stop])
    assert torch.equal(source.rows(name, 1, 9, slice(columns - 70, columns)), expected[1:9, columns - 70 :])


def test_published_form_is_imported_and_proven(published: Path, tmp_path: Path) -> None:
    proof = import_folder(published, tmp_path / "run")
    assert proof.layers == "3 of 3"
    assert all(comparison.equal for comparison in proof.logits)
    assert proof.not_proven == []
    assert "dequantised: matrices in 8 bits, with a scale for each block, are bfloat16 here" in proof.notes
    assert any(
        "multi-token prediction" in note and "(model.layers.3.mlp.gate_proj.weight)" in note for note in proof.notes
    )
    (carried,) = tensors_of(tmp_path / "run" / "checkpoints" / "step-00000000" / "carried").values()
    assert carried.dtype == torch.bfloat16
    assert torch.equal(carried, torch.ones(130, 130, dtype=torch.bfloat16))
    assert not any("quantization_config" in note for note in proof.notes)
    stored = load_file(published / "model.safetensors")
    ours = tensors_of(tmp_path / "run" / "checkpoints" / "step-00000000" / "model")
    stack = ours["model.model.layers.1.mlp.experts.up_proj"]
    assert stack.dtype == torch.bfloat16
    wanted = torch.from_numpy(slowly(stored[MATRIX], stored[f"{MATRIX}_scale_inv"])).bfloat16()
    assert torch.equal(stack[3], wanted.mT)


def lose_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{MATRIX}_scale_inv"]


def cut_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MATRIX}_scale_inv"] = tensors[f"{MATRIX}_scale_inv"][:1].clone()


def scale_without_matrix(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)


def scales_in_integers(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MATRIX}_scale_inv"] = torch.ones(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lose_scales,
            rf"{MATRIX} is \[136, 192\] in 8 bits, expected {MATRIX}_scale_inv \[2, 2\] beside it, but there",
        ),
        (cut_scales, rf"{MATRIX} is \[136, 192\] in 8 bits, .* beside it, but it is \[1, 2\]"),
        (scale_without_matrix, r"holds 1 tensors that its config.json does not explain: model.norm.weight_scale_inv"),
        (scales_in_integers, rf"{MATRIX}_scale_inv has dtype I32, expected one of F32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoeLmError, match=said):
        import_folder(folder, tmp_path / "run", proof_bytes=0)
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    ("quantized", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'quant_method': 'gptq'"),
        (QUANTIZED | {"fmt": "e5m2"}, "'fmt': 'e5m2'"),
        (QUANTIZED | {"weight_block_size": None}, "'weight_block_size': None"),
        (QUANTIZED | {"weight_block_size": [128, 0]}, r"'weight_block_size': \[128, 0\]"),
        (QUANTIZED | {"weight_block_size": [128]}, r"'weight_block_size': \[128\]"),
        ([8], r"quantization_config=\[8\]"),
    ],
)
def test_other_quantization_is_refused_by_name(folder: Path, tmp_path: Path, quantized: Any, said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    with pytest.raises(
        UsageError, match=rf"{said}.* is not for import, .*; take the checkpoint in bfloat16 or float32$"
    ):
        import_folder(folder, tmp_path / "run", proof_bytes=0)
