"""Does a dense model that is upcycled and trained on pass the dense model that is just trained on?

    moe-lm quickstart
    python -m eval.studies.upcycling runs/quickstart --out eval/results/upcycling.json

For every seed a small dense model trains for `--dense-steps` at a constant rate. Then three runs go on from it on the
same text, in an order and with a schedule of their own: the upcycled model for `--more-steps`; the dense model for as
many floating-point operations; the dense model for as much time of a core, which is its CPU time and so does not
depend on what else the machine does. The result is the quickstart's held-out text in bits per byte.

Every feed-forward layer is cut into two pieces, and the experts are eight copies of each: 16 experts, 2 a token, which
makes the upcycled model as large in use as the dense one, but for its router.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.read import read_model_config
from moe_lm.config.generation import UpcycleConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.evaluate.perplexity import evaluate
from moe_lm.model.size import count_parameters, flops_per_token
from moe_lm.tools.interop.upcycle import upcycle
from moe_lm.train import pretrain

DENSE = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": None, "intermediate_size": 384,
    "moe_intermediate_size": None, "n_routed_experts": 0, "n_shared_experts": 0, "first_k_dense_replace": 0,
}  # fmt: skip
CUT = UpcycleConfig(experts=16, per_token=2, split=2)
BEGINNING = {"name": "constant", "warmup_steps": 20}
GOING_ON = {"name": "wsd", "warmup_steps": 10, "decay_fraction": 0.5, "min_ratio": 0.05}
NAMES = ("dense before", "upcycled", "dense, same operations", "dense, same time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("--dense-steps", type=int, default=150)
    parser.add_argument("--more-steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(arguments.seeds):
        with TemporaryDirectory() as scratch:
            runs.append(one_seed(arguments, seed, Path(scratch)))
        print(json.dumps(runs[-1]), flush=True)
    result = {"date": date.today().isoformat(), "torch": torch.__version__, "seeds": runs} | {
        "bits_per_byte": {
            name: {
                "mean": round(statistics.fmean(run[name]["bits_per_byte"] for run in runs), 4),
                "by_seed": [round(run[name]["bits_per_byte"], 4) for run in runs],
            }
            for name in NAMES
        }
    }
    print(json.dumps(result["bits_per_byte"], indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def one_seed(arguments: argparse.Namespace, seed: int, scratch: Path) -> dict[str, dict[str, Any]]:
    """The figures of every run of one seed, by name."""

    def train(name: str, steps: int, start: Path | None = None) -> dict[str, Any]:
        config = configured(arguments.quickstart, scratch / name.replace(" ", "-"), seed, steps, start)
        started = time.process_time()
        pretrain.run(config)
        return figures(config.run_dir, (time.process_time() - started) / steps)

    found = {"dense before": train("dense before", arguments.dense_steps)}
    dense, sparse = scratch / "dense-before", scratch / "start-of-upcycled"
    upcycle(dense, sparse, CUT)
    found["upcycled"] = up = train("upcycled", arguments.more_steps, sparse)
    ratio = up["flops_per_token"] / found["dense before"]["flops_per_token"]
    found["dense, same operations"] = same = train(NAMES[2], round(arguments.more_steps * ratio), dense)
    steps = round(arguments.more_steps * up["cpu_seconds_per_step"] / same["cpu_seconds_per_step"])
    found["dense, same time"] = train(NAMES[3], steps, dense)
    return found


def configured(quickstart: Path, run_dir: Path, seed: int, steps: int, start: Path | None) -> PretrainConfig:
    """The quickstart's pretraining of the dense model, or from a start."""
    values = load_config(PretrainConfig, quickstart / "pretrain/config.yaml").model_dump(exclude_unset=True)
    schedule = BEGINNING if start is None else GOING_ON
    values |= {"run_dir": run_dir, "start_from": start}
    values["model"] = values["model"] | DENSE if start is None else read_model_config(checkpoint.resolve(start))
    train = values["train"]
    train |= {"seed": 2 * seed + (start is not None), "steps": steps, "schedule": schedule, "compile": False}
    train["balance"] = {**train.get("balance", {}), "batch_loss": 0.01}
    train |= {"eval_every": 0, "eval_batches": 1}  # its time is not that of training
    values["checkpoint"] = {"every": 0}
    values["log"] = {"every": 50}
    return PretrainConfig.model_validate(values)


def figures(run_dir: Path, seconds_per_step: float) -> dict[str, Any]:
    folder = checkpoint.resolve(run_dir)
    model = read_model_config(folder)
    parameters = count_parameters(model)
    return {
        "bits_per_byte": evaluate(run_dir).bits_per_byte,
        "steps": checkpoint.step_of(folder),
        "cpu_seconds_per_step": round(seconds_per_step, 4),
        "flops_per_token": flops_per_token(model, 256, causal_half=True),
        "parameters": parameters.total,
        "active": parameters.active,
    }


if __name__ == "__main__":
    main()
