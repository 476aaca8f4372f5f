"""Every family, out of `transformers` and back: the same logits, the same experts, the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lm.generate.session import Session
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.importing import import_folder
from moe_lm.tools.interop.proof import Proof
from tests.conftest import MoeLm
from tests.tiny import packed
from tests.tools.interop.folders import FAMILIES, tensors_of, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")


# Families that were added once others could hold every kind of model: most of theirs an earlier family holds too.
NEWER = ("glm4_moe_lite", "solar_open", "minimax_m2", "ernie4_5_moe", "mistral", "seed_oss", "youtu")


def assert_same_tensors(found: Path, wanted: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_proven(proof: Proof, layers: int = 3) -> None:
    assert proof.compared_with is not None
    assert proof.layers == f"{layers} of {layers}"
    assert [comparison.tokens for comparison in proof.logits] == ["random", "real"]
    for comparison in proof.logits:
        assert comparison.positions == 512
        assert comparison.largest_logit > 1
        assert comparison.largest_difference <= 1e-5
        assert comparison.other_experts == 0
    assert proof.not_proven == []


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("solar_open", "mistral", "seed_oss") else ())
        for name in FAMILIES
    ],
)
def test_imported_model_equals_theirs_and_exports_to_the_same_bytes(
    variant: str, tmp_path: Path, hf_folder: Any, tiny_tokenizer: Tokenizer
) -> None:
    family, folder = FAMILIES[variant][0], hf_folder(variant)
    proof = import_folder(folder, tmp_path / "run")
    assert_proven(proof)
    assert proof.family == family
    experts = [comparison.expert_choices for comparison in proof.logits]
    sparse = {name.split(".")[2] for name in tensors_of(folder) if ".experts." in name}
    assert experts == [512 * len(sparse)] * 2

    exported = export_run(tmp_path / "run", tmp_path / "out", family)
    assert_proven(exported)
    assert_same_tensors(tmp_path / "out", folder)
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["family"] == family
    config, original = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "out", folder))
    for name in (
        "rope_parameters", "first_k_dense_replace", "mlp_only_layers", "mlp_layer_types", "sliding_window",
        "norm_topk_prob",
    ):  # fmt: skip
        assert config.get(name) == original.get(name)


@pytest.mark.parametrize("variant", [name for name in FAMILIES if name not in NEWER])
def test_nearest_family_of_a_model_holds_it(variant: str, tmp_path: Path, imported_run: Any) -> None:
    proof = export_run(imported_run(variant), tmp_path / "out")
    assert_proven(proof)
    # Dots1 stands first and is the same as GLM where all of a head is rotated and queries and keys are normed.
    assert proof.family == FAMILIES[variant][0]


def test_imported_run_loads_like_any_other(imported_run: Any, hf_folder: Any) -> None:
    session = Session.load(imported_run("dots1"), device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder("dots1"))
    tokens = torch.randint(1024, (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, expected = session.model(tokens, *packed([64])).logits, theirs(input_ids=tokens).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["dots1", "mixtral"])
def test_bfloat16_folder_in_shards_comes_back_as_it_was(
    variant: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    folder = write_folder(tmp_path / "hf", variant, tiny_tokenizer, dtype=torch.bfloat16, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert_proven(import_folder(folder, tmp_path / "run"))
    exported = export_run(tmp_path / "run", tmp_path / "out", shard_bytes=100_000)
    assert_proven(exported)
    assert len(exported.sha256) > 1
    assert_same_tensors(tmp_path / "out", folder)
    biases = [tensor for name, tensor in tensors_of(tmp_path / "out").items() if "correction_bias" in name]
    assert all(bias.dtype == torch.float32 and bias.any() for bias in biases)
    assert len(biases) == (2 if variant == "dots1" else 0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_imported_run_scores_files_but_has_no_text_of_its_own(imported_run: Any, tmp_path: Path, moe_lm: MoeLm) -> None:
    run = imported_run("qwen3_moe")
    (tmp_path / "a.txt").write_text("A text to score.", encoding="utf-8")
    done = moe_lm("eval", run, tmp_path / "a.txt")
    assert done.code == 0, done.err
    assert "bits per byte" in done.out
    done = moe_lm("eval", run)
    assert done.code == 2
    assert done.err == (
        f"error: {run} was not trained here and has no held-out text of its own; give text files to score\n"
    )


def test_float32_import_of_bfloat16_and_bfloat16_export_of_float32(
    tmp_path: Path, hf_folder: Any, imported_run: Any, tiny_tokenizer: Tokenizer
) -> None:
    folder = write_folder(tmp_path / "hf", "dots1", tiny_tokenizer, dtype=torch.bfloat16)
    import_folder(folder, tmp_path / "run", dtype="float32")
    saved = tensors_of(tmp_path / "run" / "checkpoints" / "step-00000000" / "model")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    assert_proven(export_run(imported_run("dots1"), tmp_path / "out", dtype="bfloat16"))
    for name, tensor in tensors_of(tmp_path / "out").items():
        original = tensors_of(hf_folder("dots1"))[name]
        wanted = original if "correction_bias" in name else original.bfloat16()
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", ["dots1", "qwen3_moe"])
def test_bfloat16_import_is_proven_against_the_same_rounding(
    variant: str, dtype: torch.dtype, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    folder = write_folder(tmp_path / "hf", variant, tiny_tokenizer, dtype=dtype)
    assert_proven(import_folder(folder, tmp_path / "run", dtype="bfloat16"))
    saved = tensors_of(tmp_path / "run" / "checkpoints" / "step-00000000" / "model")
    assert {t.dtype for name, t in saved.items() if "correction_bias" not in name} == {torch.bfloat16}


def test_first_layers_are_compared_where_the_whole_does_not_fit(tmp_path: Path, hf_folder: Any) -> None:
    from moe_lm.tools.interop.hf_config import read_config
    from moe_lm.tools.interop.models import bytes_to_compare

    folder = hf_folder("dots1")
    config = read_config(json.loads((folder / "config.json").read_text()), "config.json").config
    proof = import_folder(folder, tmp_path / "run", proof_bytes=bytes_to_compare(config, 2))
    assert proof.layers == "2 of 3"
    assert all(comparison.largest_difference <= 1e-5 for comparison in proof.logits)
    assert all(comparison.expert_choices == 512 for comparison in proof.logits)
    assert [line.split(":")[0] for line in proof.not_proven] == ["logits after layer 2"]

    told: list[tuple[int, int | None]] = []
    proof = import_folder(
        folder, tmp_path / "run2", proof_bytes=bytes_to_compare(config, 1), tell=lambda *bytes_: told.append(bytes_)
    )
    done = [carried for carried, _ in told]
    assert done == sorted(done)
    assert told[-1] == (2 * proof.values_equal * 4,) * 2  # written and audited, in float32
    assert proof.layers == "no"
    assert proof.logits == ()
    assert proof.values_equal > 0
    assert "every tensor was compared" in proof.not_proven[0]
