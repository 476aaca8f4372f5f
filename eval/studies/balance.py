"""What keeps the experts' load even? The quickstart's pretraining with the bias balance, without any, by quantiles.

    moe-lm quickstart
    python eval/studies/balance.py runs/quickstart --steps 300 --out eval/results/balance

Reads the tokenizer and shards of a quickstart, trains the models for the same steps in a folder of its own, and
writes OUT.json and OUT.png. MaxVio is the largest load of a layer's experts over their mean, minus one
(arXiv 2408.15664); a batch's is noisier than that of the whole held-out text, so both are given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import BalanceConfig
from moe_lm.data.batches import Batch
from moe_lm.generate.session import Session
from moe_lm.objective.training_loss import NextToken, TrainingLoss
from moe_lm.parallel.topology import current_topology
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train import pretrain
from moe_lm.train.figures import load_statistics

NO_BALANCE = BalanceConfig(bias_update_rate=0.0, sequence_loss=0.0, batch_loss=0.0, z_loss=0.0)
WAYS = {  # None: the config's own
    "with bias": None,
    "without": NO_BALANCE,
    "quantile": NO_BALANCE.model_copy(update={"bias_update": "quantile"}),
    "quantile, memory 0.8": NO_BALANCE.model_copy(update={"bias_update": "quantile", "quantile_memory": 0.8}),
}
SMOOTH = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings that replace the quickstart's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without a suffix")
    arguments = parser.parse_args()
    config = load_config(PretrainConfig, arguments.quickstart / "pretrain/config.yaml", arguments.settings)
    with TemporaryDirectory() as scratch:
        runs = {
            name: train(config, Path(scratch) / name, arguments.steps, WAYS[name] or config.train.balance)
            for name in arguments.way or WAYS
        }
    result = {"date": date.today().isoformat(), "steps": arguments.steps, "settings": arguments.settings, **runs}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(runs, arguments.out.with_suffix(".png"))
    print(json.dumps({name: {key: run[key] for key in ("held_out", "loss")} for name, run in runs.items()}, indent=2))


def train(config: PretrainConfig, run_dir: Path, steps: int, balance: BalanceConfig) -> dict[str, Any]:
    """MaxVio by step, then of every layer on the held-out text."""
    schedule = config.train.schedule.model_copy(update={"name": "constant"})
    settings = config.train.model_copy(update={"steps": steps, "schedule": schedule, "balance": balance})
    pretrain.run(config.model_copy(update={"run_dir": run_dir, "train": settings}))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "event" not in line]
    tokenizer = Tokenizer.load(config.data.tokenizer)
    whole = config.model_copy(update={"train": settings.model_copy(update={"eval_batches": None})})
    shards = pretrain.open_shards(whole, "validation", tokenizer)
    by_source = pretrain.validation_batches(whole, shards, current_topology())
    validation = [batch for batches in by_source.values() for batch in batches]
    return {
        "loss": records[-1]["loss"],
        "held_out": held_out_load(run_dir, validation, balance),
        "max_violation_by_step": [[layer["max_violation"] for layer in record["experts"]] for record in records],
        "dead_share_by_step": [max(layer["dead_share"] for layer in record["experts"]) for record in records],
    }


@torch.no_grad()
def held_out_load(run_dir: Path, validation: Sequence[Batch], balance: BalanceConfig) -> list[dict[str, float]]:
    """Load statistics of every MoE layer over the whole held-out text."""
    session = Session.load(run_dir, device="cpu")
    loss = TrainingLoss(session.model, NextToken(), balance, session.tokenizer.pad_id)
    return load_statistics(torch.stack([loss(batch, None).load for batch in validation]).sum(0))


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = dict(zip(WAYS, ("tab:blue", "tab:red", "tab:green", "tab:orange"), strict=True))
    for name, run in runs.items():
        colour = colours[name]
        layers = torch.tensor(run["max_violation_by_step"]).T
        for layer in layers:
            axes.plot(smooth(layer), color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(smooth(layers.mean(0)), color=colour, label=f"{name}: mean of the layers")
    axes.axhline(0.3, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="MaxVio of the batch", ylim=(0, None))
    axes.set_title(f"Largest expert load over the mean, minus one (mean of {SMOOTH} steps)")
    axes.legend()
    figure.savefig(path, dpi=120)


def smooth(values: torch.Tensor) -> torch.Tensor:
    """The mean over the last SMOOTH steps."""
    sums = torch.nn.functional.pad(values.double(), (SMOOTH, 0)).cumsum(0)
    return (sums[SMOOTH:] - sums[:-SMOOTH]) / torch.arange(1, len(values) + 1).clamp(max=SMOOTH)


if __name__ == "__main__":
    main()
