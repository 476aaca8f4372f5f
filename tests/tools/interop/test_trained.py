"""Imported, trained ten steps with the experts on two ranks, exported: `transformers` writes what we write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.importing import import_folder
from tests.conftest import MoeLm
from tests.processes import ENVIRONMENT
from tests.tiny import logits_of
from tests.tools.interop.folders import tensors_of, write_folder

NEW_TOKENS = 64
MOE_FAMILIES = ("dots1", "glm4_moe", "deepseek_v3", "deepseek_v2", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
HAVE_ROUTER_BIAS = ("dots1", "glm4_moe", "deepseek_v3")


def write_config(folder: Path, variant: str, start_from: Path, **settings: Any) -> Path:
    turns = [
        [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": f"It is {n + n}."}]
        for n in range(64)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
    values = {
        "run_dir": str(folder / variant),
        "start_from": str(start_from),
        "data": {"train": [str(folder / "chat.jsonl")], "sequence_length": 64},
        "train": {
            "steps": 10, "global_batch_size": 4, "precision": "float32", "schedule": {"warmup_steps": 1},
            "optimizer": {"lr": 0.01},
            # A family without router biases could not hold them.
            "balance": {"bias_update_rate": 0.05 if variant in HAVE_ROUTER_BIAS else 0.0},
        },
        "parallel": {"device": "cpu", "engine": "deepspeed", "expert_parallel_size": 2, "zero_stage": 2},
    } | settings  # fmt: skip
    file = folder / f"{variant}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, imported_run: Callable[[str], Path]) -> Path:
    """A folder with a run of every family."""
    folder = tmp_path_factory.mktemp("trained")
    configs = [write_config(folder, variant, imported_run(variant)) for variant in MOE_FAMILIES]
    program = [sys.executable, str(Path(__file__).parent / "finetuned_ranks.py"), *map(str, configs)]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", MOE_FAMILIES)
def test_export_after_training_on_two_ranks_goes_on_alike(
    variant: str, trained: Path, tmp_path: Path, imported_run: Callable[[str], Path], one_thread: None
) -> None:
    run = trained / variant
    proof = export_run(run, tmp_path / "out", variant)
    assert all(comparison.largest_difference <= 1e-5 for comparison in proof.logits)
    assert all(comparison.other_experts == 0 for comparison in proof.logits)

    session = Session.load(run, device="cpu")
    assert session.checkpoint.name == "step-00000010"
    pieces = {file.name[:11] for file in (session.checkpoint / "model").glob("*.safetensors")}
    assert pieces == {"shard-00001", "shard-00002"}
    before = Session.load(imported_run(variant), device="cpu").model
    moved = {name for name, tensor in session.model.state_dict().items() if not tensor.equal(before.state_dict()[name])}
    assert any("experts.down_proj" in name for name in moved)
    assert any("e_score_correction_bias" in name for name in moved) == (variant in HAVE_ROUTER_BIAS)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    turns = [{"role": "user", "content": "What is 3 and 3?"}]
    prompt = session.tokenizer.encode_chat(turns, add_generation_prompt=True)[0]
    with torch.no_grad():
        ids = torch.tensor([prompt])
        expected = theirs(input_ids=ids).logits[0]
        torch.testing.assert_close(logits_of(session.model, prompt), expected, rtol=0, atol=1e-5)
        written = theirs.generate(
            ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
    assert len(written) == NEW_TOKENS
    assert generate(session.model, [prompt], Settings(max_new_tokens=NEW_TOKENS)) == [written]


def test_adapters_are_merged_into_their_base(
    tmp_path: Path, moe_lm: MoeLm, one_thread: None, tiny_tokenizer: Tokenizer
) -> None:
    """A base in bfloat16, whose adapted weights are written in float32, as `sample` computes with them."""
    variant = "dots1"
    write_folder(tmp_path / "hf", variant, tiny_tokenizer, dtype=torch.bfloat16)
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 6]}))
    import_folder(tmp_path / "hf", tmp_path / "base", proof_bytes=0)
    config = write_config(tmp_path, variant, tmp_path / "base", lora={"rank": 4}, parallel={"device": "cpu"})
    assert moe_lm("finetune", config).code == 0
    run = tmp_path / variant
    proof = export_run(run, tmp_path / "out")
    assert all(comparison.equal for comparison in proof.logits)
    wanted = Session.load(run, device="cpu").model.state_dict()
    before = Session.load(tmp_path / "base", device="cpu").model.state_dict()
    found = tensors_of(tmp_path / "out")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.shared_experts.up_proj.weight"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
        assert not torch.equal(found[name], before[name])
    expert = found["model.layers.1.mlp.experts.3.down_proj.weight"]
    torch.testing.assert_close(expert, wanted["model.layers.1.mlp.experts.down_proj"][3].mT, rtol=0, atol=1e-6)
    assert found["model.norm.weight"].dtype == torch.bfloat16
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": [1, 6]}

    (tmp_path / "base").rename(tmp_path / "moved")
    done = moe_lm("export", run, tmp_path / "again")
    assert done.code == 2
    assert "--base" in done.err
    assert moe_lm("export", run, tmp_path / "again", "--base", tmp_path / "moved").code == 0


@pytest.mark.parametrize("rate", [0.0, 0.001])
def test_router_biases_that_cannot_be_exported_are_said_at_the_start(
    rate: float, tmp_path: Path, imported_run: Callable[[str], Path], moe_lm: MoeLm, one_thread: None
) -> None:
    config = write_config(tmp_path, "mixtral", imported_run("mixtral"), parallel={"device": "cpu"})
    done = moe_lm("finetune", config, f"train.balance.bias_update_rate={rate}", "train.steps=1")
    assert done.code == 0
    said = "which no Hugging Face family with a softmax router has" in (tmp_path / "mixtral" / "train.log").read_text()
    assert said == (rate > 0)
    assert moe_lm("export", tmp_path / "mixtral", tmp_path / "out", "--proof-memory", 0).code == (2 if rate else 0)
