"""Import and export of a model much larger than the memory that they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.processes import ENVIRONMENT
from tests.tools.interop.folders import SHAPE

LAYERS, EXPERTS, HIDDEN, WIDTH = 4, 40, 256, 512
BOUND = 48 << 20  # bytes; a piece and what is made of it, a few times

PROGRAM = """
import sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.importing import import_folder
from moe_lm.tools.interop.models import find_transformers
from moe_lm.model.transformer import LanguageModel
from moe_lm.config.model import ModelConfig
SMALL = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def grown(action):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    action()
    return memory("VmHWM") - before

source, run, out = map(Path, sys.argv[1:])
find_transformers("qwen3_moe")  # what imports leave in memory is no matter of the model's size
AutoTokenizer.from_pretrained(source)
with torch.device("meta"):
    LanguageModel(ModelConfig(**SMALL))
print(grown(lambda: import_folder(source, run, proof_bytes=0)), grown(lambda: export_run(run, out, proof_bytes=0)))
"""


def write_large_folder(folder: Path, tokenizer: Tokenizer) -> int:
    """A qwen3_moe whose every layer is a file; how many bytes its tensors have."""
    folder.mkdir()
    tokenizer.save(folder)
    config = SHAPE | {
        "model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH, "num_experts_per_tok": 2, "head_dim": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    places, total = {}, 0
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj.weight": (256, HIDDEN), "self_attn.k_proj.weight": (128, HIDDEN),
            "self_attn.v_proj.weight": (128, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, 256),
            "self_attn.q_norm.weight": (64,), "self_attn.k_norm.weight": (64,), "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,), "mlp.gate.weight": (EXPERTS, HIDDEN),
        }  # fmt: skip
        for expert in range(EXPERTS):
            shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (WIDTH, HIDDEN)
            shapes[f"mlp.experts.{expert}.up_proj.weight"] = (WIDTH, HIDDEN)
            shapes[f"mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, WIDTH)
        tensors = {prefix + name: torch.full(shape, layer + 0.5) for name, shape in shapes.items()}
        if layer == 0:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = torch.ones(SHAPE["vocab_size"], HIDDEN)
            tensors["model.norm.weight"] = torch.ones(HIDDEN)
        file = f"model-{layer}.safetensors"
        save_file(tensors, folder / file)
        places.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_memory_is_bounded_by_a_piece_not_by_the_model(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    total = write_large_folder(tmp_path / "hf", tiny_tokenizer)
    assert total > 5 * BOUND
    command = [sys.executable, "-c", PROGRAM, *(str(tmp_path / name) for name in ("hf", "run", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    importing, exporting = map(int, done.stdout.split())
    assert 0 < importing < BOUND
    assert 0 < exporting < BOUND
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
