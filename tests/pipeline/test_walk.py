"""The walk through the command line: text, tokenizer, shards, pretraining, fine-tuning, sample, evaluation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from tests.conftest import MoeLm
from tests.processes import ENVIRONMENT, ROOT, metrics

pytestmark = pytest.mark.usefixtures("one_thread")

# Runs a verb and prints the heavy packages that it imported.
WATCHED = (
    "import atexit, sys\n"
    "from moe_lm.cli.main import main\n"
    "heavy = {'accelerate', 'datasets', 'deepspeed', 'transformers'}\n"
    "atexit.register(lambda: print('imported:', *sorted(heavy & sys.modules.keys()), file=sys.stderr))\n"
    "main()\n"
)


def write_configs(folder: Path, text: str) -> None:
    sources = [{"name": "text", "path": text}]
    recipe = {"output": str(folder / "tokenizer"), "vocab_size": 400, "sources": sources, "validation_fraction": 0.1}
    model = {
        "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "max_position_embeddings": 128,
    }  # fmt: skip
    train = {
        "steps": 60, "global_batch_size": 8, "precision": "float32", "optimizer": {"name": "muon", "lr": 0.01},
        "schedule": {"name": "wsd", "warmup_steps": 4},
    }  # fmt: skip
    pretrain = {
        "run_dir": str(folder / "pretrained"),
        "model": "model.yaml",
        "data": {
            "tokenizer": str(folder / "tokenizer"), "shards": str(folder / "shards"), "sources": sources,
            "validation_fraction": 0.1, "sequence_length": 64, "workers": 1,
        },
        "train": train,
        "parallel": {"device": "cpu"},
    }  # fmt: skip
    finetune = {
        "run_dir": str(folder / "tuned"),
        "start_from": str(folder / "pretrained"),
        "data": {"train": [str(folder / "chat.jsonl")], "validation_fraction": 0.2, "sequence_length": 64},
        "train": train,
        "parallel": {"device": "cpu"},
    }
    contents = {"recipe": recipe, "model": model, "pretrain": pretrain, "finetune": finetune}
    for name, values in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    pairs = [{"instruction": f"say {n}", "output": f"you said {n}"} for n in range(100)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def watched(*arguments: object) -> tuple[str, str]:
    """Output and errors of `moe-lm` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_from_text_to_an_evaluated_fine_tuned_model(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    write_configs(tmp_path, load_config(PretrainConfig, tiny_pretrain).data.sources[0].path or "")

    done = moe_lm("tokenizer", "train", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    assert "bytes per token" in done.out
    again = moe_lm("tokenizer", "train", tmp_path / "recipe.yaml", "vocab_size=9000")
    assert (again.code, "holds a tokenizer already" in again.err) == (2, True)
    more = moe_lm("tokenizer", "train", tmp_path / "recipe.yaml", "vocab_size=9000", f"output={tmp_path / 'more'}")
    assert re.search(r"the text gives [\d,]+ ids of vocab_size=9,000", more.out)
    note = tmp_path / "note.txt"
    note.write_text("ba den gi ko lum mar. " * 20)
    assert moe_lm("tokenizer", "inspect", tmp_path / "tokenizer", note).code == 0
    done = moe_lm("prepare", tmp_path / "pretrain.yaml")
    assert done.code == 0
    assert "400 documents" in done.out

    assert moe_lm("pretrain", tmp_path / "pretrain.yaml").code == 0
    lines = metrics(tmp_path / "pretrained")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]

    assert moe_lm("finetune", tmp_path / "finetune.yaml").code == 0
    lines = metrics(tmp_path / "tuned")
    assert lines[-1]["val_loss"] < 0.5 * lines[0]["val_loss"]

    for run in ("pretrained", "tuned"):
        sampling = ("sample", tmp_path / run, "--prompt", "ba", "--max-new-tokens", 20, "--greedy")
        out, err = watched(*sampling)
        assert out.strip()
        assert err.endswith("imported:\n")
        assert moe_lm(*sampling).out == out

    out, err = watched("eval", tmp_path / "pretrained")
    assert "deepspeed" not in err
    bits = re.search(r"([\d.]+) bits per byte", out)
    assert bits is not None
    assert 0.5 < float(bits[1]) < 3.0  # untrained: log2(400) bits a token of about 3 bytes
    assert moe_lm("eval", tmp_path / "tuned", tmp_path / "chat.jsonl").code == 2  # conversations have no field `text`
    assert moe_lm("eval", tmp_path / "tuned", note).code == 0

    _, err = watched("export", tmp_path / "tuned", tmp_path / "published")
    assert "deepspeed" not in err
    assert transformers_continues(tmp_path / "published", "ba") == moe_lm(*sampling).out.removesuffix("\n")


def transformers_continues(folder: Path, prompt: str) -> str:
    """The greedy continuation of a prompt by the exported model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


@pytest.mark.slow
def test_quickstart_on_a_text_of_ones_own_again_and_with_more_minutes(tmp_path: Path, moe_lm: MoeLm) -> None:
    """The same command again has nothing left to train; with more minutes it trains on, from where it was."""
    book = tmp_path / "book.txt"
    book.write_text("".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))))
    run = tmp_path / "run"

    def walk(minutes: float) -> dict[str, Any]:
        done = moe_lm("quickstart", "--minutes", minutes, "--corpus", book, "--run-dir", run)
        assert (done.code, "trains on from here" in done.out) == (0, True)
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))

    summary = walk(0.1)
    assert summary.keys() >= {
        "seconds", "tokens_per_second", "val_bits_per_byte", "xz_bits_per_byte", "unigram_bits_per_byte", "samples",
        "params_total", "params_active", "epochs",
    }  # fmt: skip
    assert all(sample["model"] == "pretrain" and sample["prompt"] in book.read_text() for sample in summary["samples"])
    assert not (run / "finetune").exists()
    before = (run / "pretrain" / "metrics.jsonl").read_bytes()
    assert walk(0.1) == summary
    assert (run / "pretrain" / "metrics.jsonl").read_bytes() == before
    longer = walk(sum(summary["seconds"].values()) / 60 + 0.2)
    assert (run / "pretrain" / "metrics.jsonl").read_bytes().startswith(before)
    assert longer["epochs"] > summary["epochs"]
    assert longer["val_bits_per_byte"] < summary["val_bits_per_byte"]
