"""What does averaging the last checkpoints of a run at a constant rate gain, beside a run whose rate decays?

    moe-lm quickstart
    python eval/studies/merging.py runs/quickstart --steps 400 --out eval/results/merging.json

For every seed a small model (1.9M parameters) trains for `--steps` at a constant rate and saves every `--every` steps;
a second run has the same seed and steps, and its rate falls linearly to a tenth over the last fifth. The result is the
quickstart's held-out text in bits per byte: of the last checkpoint, of averages of the last ones, of the decayed run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.evaluate.perplexity import evaluate
from moe_lm.tools.merge import merge
from moe_lm.train import pretrain

MODEL = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": None, "intermediate_size": 256,
    "moe_intermediate_size": 96,
}  # fmt: skip
WARM_UP = 20  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--last", type=int, nargs="*", default=[3, 6], help="checkpoints to average")
    parser.add_argument("--weights", nargs="*", default=["equal", "linear"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        with TemporaryDirectory() as scratch:
            runs.append(one_seed(arguments, seed, Path(scratch)))
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "steps": arguments.steps,
        "steps_between_checkpoints": arguments.every,
        "bits_per_byte": {
            name: {
                "by_seed": [round(run[name], 4) for run in runs],
                "mean": round(statistics.fmean(run[name] for run in runs), 4),
                "gain_over_last": [round(run["last"] - run[name], 4) for run in runs],
            }
            for name in runs[0]
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def one_seed(arguments: argparse.Namespace, seed: int, scratch: Path) -> dict[str, float]:
    """Bits per byte of everything that is compared, for one seed."""
    constant = {"name": "constant", "warmup_steps": WARM_UP}
    decayed = {"name": "wsd", "warmup_steps": WARM_UP, "decay_fraction": 0.2, "min_ratio": 0.1}
    at_constant_rate, with_decay = scratch / "constant", scratch / "decayed"
    pretrain.run(configured(arguments, seed, at_constant_rate, constant))
    pretrain.run(configured(arguments, seed, with_decay, decayed))
    found = {"last": evaluate(at_constant_rate).bits_per_byte, "decayed": evaluate(with_decay).bits_per_byte}
    for count in arguments.last:
        for weights in arguments.weights:
            name = f"average of {count}, {weights}"
            target = scratch / name.replace(" ", "-")
            merge([at_constant_rate], target, last=count, weights=weights)
            found[name] = evaluate(target).bits_per_byte
    return found


def configured(arguments: argparse.Namespace, seed: int, run_dir: Path, schedule: dict[str, Any]) -> PretrainConfig:
    """The quickstart's pretraining of the small model, with this schedule."""
    values = load_config(PretrainConfig, arguments.quickstart / "pretrain/config.yaml").model_dump()
    values["run_dir"] = run_dir
    values["model"] |= MODEL
    values["train"] |= {
        "seed": seed,
        "steps": arguments.steps,
        "schedule": schedule,
        "eval_every": 0,
        "eval_batches": 1,
    }
    values["train"] |= {"compile": False}
    values["checkpoint"] |= {"every": arguments.every, "keep": max(arguments.last)}
    values["log"] |= {"every": 100}
    return PretrainConfig.model_validate(values)


if __name__ == "__main__":
    main()
