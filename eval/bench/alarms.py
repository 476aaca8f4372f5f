"""Alarms on healthy runs: 20 runs of different kinds that must raise none, and what looking for symptoms costs.

    python eval/bench/alarms.py [--output eval/results/alarms.json] [--only NAME]

Every kind of model and training that the recipes have, small enough for seconds: text of Python's standard library,
the tests' tokenizer, 24 to 64 entries wide. The cost is timed on records of a model with 28 MoE layers of 64 experts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.train import finetune, pretrain
from moe_lm.train.alarms import Alarms
from moe_lm.train.figures import load_statistics
from moe_lm.train.past import Plan

ROOT = Path(__file__).parents[2]
Values = dict[str, Any]

MODEL: Values = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: Values = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "use_qk_norm": False,
}  # fmt: skip
SOFTMAX: Values = {"scoring_func": "softmax", "norm_topk_prob": False}
CLASSIC: Values = {
    "n_routed_experts": 0, "norm_type": "layernorm", "hidden_act": "relu", "mlp_gated": False, "use_qk_norm": False,
    "position_embedding": "learned", "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
BY_LOSS: Values = {"bias_update_rate": 0.0, "sequence_loss": 0.0, "batch_loss": 0.01}

# Changes of the model, then of the training
PRETRAINED: dict[str, tuple[Values, Values]] = {
    "deepseekmoe": ({}, {}),
    "deepseekmoe for long": ({}, {"steps": 800, "eval_every": 100}),
    "deepseek-v3, latent, groups": (
        LATENT | {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
                  "routed_scaling_factor": 2.5},
        {},
    ),
    "deepseek-v2, latent, softmax": (LATENT | SOFTMAX | {"q_lora_rank": None, "n_shared_experts": 2}, {}),
    "switch, capacity": (SOFTMAX | {"num_experts_per_tok": 1, "capacity_factor": 1.25}, {"balance": BY_LOSS}),
    "gshard, capacity": (SOFTMAX | {"norm_topk_prob": True, "capacity_factor": 1.0}, {"balance": BY_LOSS}),
    "every expert": (SOFTMAX | {"num_experts_per_tok": 8, "n_shared_experts": 0}, {}),
    "two experts": ({"n_routed_experts": 2, "num_experts_per_tok": 1}, {}),
    "64 experts, few tokens": ({"n_routed_experts": 64, "num_experts_per_tok": 4}, {"global_batch_size": 2}),
    "classic, dense": (CLASSIC, {}),
    "modern, dense, bfloat16": ({"n_routed_experts": 0, "hidden_size": 64}, {"precision": "bfloat16"}),
    "muon, wsd": ({}, {"optimizer": {"name": "muon", "lr": 1.2e-2, "muon_lr": 0.02, "weight_decay": 0.01},
                       "schedule": {"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.6, "min_ratio": 0.02},
                       "balance": {"bias_update_rate": 0.01}}),
    "lamb, multistep, accumulation": ({}, {"optimizer": {"name": "lamb", "lr": 1e-2}, "micro_batch_size": 4,
                                           "schedule": {"name": "multistep", "warmup_steps": 25}}),
    "constant rate, z-loss, deep": ({"num_hidden_layers": 6}, {"schedule": {"name": "constant", "warmup_steps": 10},
                                                                 "balance": {"z_loss": 1e-4}}),
    "small rate": ({}, {"optimizer": {"lr": 1e-4}}),
}  # fmt: skip
# Changes of the config
FINETUNED: dict[str, Values] = {
    "answers": {},
    "answers, linear decay from the start": {
        "train": {"optimizer": {"name": "muon", "lr": 2e-3, "muon_lr": 0.005},
                  "schedule": {"name": "wsd", "warmup_steps": 5, "decay_fraction": 1.0, "min_ratio": 0.02}},
    },
    "adapters": {"lora": {"rank": 4, "alpha": 8.0}, "train": {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}}},
    "scheduled sampling": {"train": {"scheduled_sampling": {"share": 0.2}}},
    "preferences": {"preference": {"beta": 0.1}, "train": {"optimizer": {"lr": 1e-4, "weight_decay": 0.0}}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--only", help="the runs whose name has this in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        runs = list(healthy_runs(Path(folder), arguments.only or ""))
    result = {
        "healthy_runs": runs,
        "runs": len(runs),
        "alarms": sum(len(run["alarms"]) for run in runs),
        "cost": cost(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "healthy_runs"}, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def healthy_runs(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """Each run's name, steps, losses and alarms."""
    prepare(pretrain_config(folder, "shards", {}, {}).data)
    base = folder / "deepseekmoe"
    for name, (model, train) in PRETRAINED.items():
        if only in name or (name == "deepseekmoe" and any(only in other for other in FINETUNED)):
            pretrain.run(pretrain_config(folder, name, model, train))
            yield outcome(folder / name)
    write_conversations(folder)
    for name, changes in FINETUNED.items():
        if only in name:
            finetune.run(finetune_config(folder, name, base, changes))
            yield outcome(folder / name)


def pretrain_config(folder: Path, name: str, model: Values, train: Values) -> PretrainConfig:
    values = {
        "run_dir": str(folder / name),
        "model": MODEL | model,
        "data": {
            "tokenizer": str(ROOT / "tokenizer" / "tiny"), "shards": str(folder / "shards"), "sequence_length": 64,
            "sources": [{"name": "stdlib", "stdlib": True, "max_bytes": 3_000_000}], "validation_fraction": 0.05,
        },
        "train": {
            "steps": 300, "global_batch_size": 8, "precision": "float32", "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 20}, "eval_every": 50, "eval_batches": 4,
        } | train,
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": 0},
        "log": {"every": 100},
    }  # fmt: skip
    return build_config(PretrainConfig, values, name)


def finetune_config(folder: Path, name: str, base: Path, changes: Values) -> FinetuneConfig:
    train = {
        "steps": 150, "global_batch_size": 8, "precision": "float32", "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 10}, "eval_every": 25,
    } | changes.get("train", {})  # fmt: skip
    values = {
        "run_dir": str(folder / name), "start_from": str(base),
        "data": {"train": [str(folder / ("pairs.jsonl" if "preference" in changes else "chats.jsonl"))],
                 "validation_fraction": 0.1, "sequence_length": 64},
        "parallel": {"device": "cpu"}, "checkpoint": {"every": 0}, "log": {"every": 100},
    } | changes | {"train": train}  # fmt: skip
    return build_config(FinetuneConfig, values, name)


def write_conversations(folder: Path) -> None:
    """Questions that have one answer, and as pairs with an answer to something else."""
    draw = random.Random(1)
    words = "apple river stone cloud paper green seven table horse music window garden silver orange".split()
    chats, pairs = [], []
    for _ in range(1500):
        first, second, other = draw.choice(words), draw.choice(words), draw.choice(words)
        asked, answer = f"say {first} then {second}", f"you said {first} and {second}."
        chats.append({"instruction": asked, "input": "", "output": answer})
        pairs.append({"prompt": asked, "chosen": answer, "rejected": f"you said {second} or {other}."})
    for name, rows in (("chats.jsonl", chats), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def outcome(run_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "event" not in line and "loss" in line]
    found = {
        "name": run_dir.name,
        "steps": steps[-1]["step"],
        "first_loss": round(steps[0]["loss"], 3),
        "last_loss": round(steps[-1]["loss"], 3),
        "alarms": [line["message"] for line in lines if line.get("event") == "alarm"],
        "other_events": sorted({line["event"] for line in lines if line.get("event", "alarm") != "alarm"}),
    }
    print(json.dumps(found), flush=True)
    return found


def cost(layers: int = 28, experts: int = 64, steps: int = 3000) -> dict[str, float]:
    """Microseconds of processor time to look for symptoms after a step; every tenth step looks through the table."""
    shape = {"num_hidden_layers": layers, "first_k_dense_replace": 0, "n_routed_experts": experts}
    model = ModelConfig(**MODEL | shape)
    alarms = Alarms(Plan(TrainConfig(steps=10**6, global_batch_size=8), model))
    draw = torch.Generator().manual_seed(0)
    records = [record(load_statistics(torch.randint(900, 1100, (layers, experts), generator=draw))) for _ in range(50)]
    seconds = []
    for step in range(1, steps + 1):
        line = records[step % len(records)] | {"step": step, "loss": 4 - step / 1e5}
        started = time.thread_time()
        alarms.after(line)
        seconds.append(time.thread_time() - started)
    return {
        "moe_layers": layers,
        "experts": experts,
        "median_microseconds_a_step": round(statistics.median(seconds) * 1e6, 2),
        "mean_microseconds_a_step": round(statistics.fmean(seconds) * 1e6, 2),
        "median_microseconds_of_every_tenth": round(statistics.median(seconds[9::10]) * 1e6, 1),
    }


def record(layers: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "lr": 3e-4, "grad_norm": 0.5, "tokens": 32_000, "seconds": 1.0, "data_seconds": 0.001, "skipped": False,
        "host_bytes": 2**30, "experts": layers,
    }  # fmt: skip


if __name__ == "__main__":
    main()
