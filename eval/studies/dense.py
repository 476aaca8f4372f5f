"""Does the Mixture of Experts earn its place by the clock? The quickstart's model beside a dense one as large as its
active part.

    moe-lm quickstart
    python eval/studies/dense.py runs/quickstart --minutes 5 --out eval/results/dense.json

Both read the same tokens in the same order. First each gets its own rates: the quickstart's, times every factor of
`--factors`, for `--tune-minutes`. Then, for every seed, both train at the same time, each on a core of its own, for as
many steps as fit into `--minutes` at the speed that they had side by side. They change cores from seed to seed.
Compilation is not counted. The result is the held-out text in bits per byte, and the seconds that training took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.evaluate.perplexity import evaluate
from moe_lm.model.size import count_parameters
from moe_lm.tools.quickstart.results import metrics
from moe_lm.train import pretrain

# Changes of the quickstart's model. The dense layer is as wide as the experts that a token passes through.
CONTENDERS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"n_routed_experts": 0, "n_shared_experts": 0, "moe_intermediate_size": None, "intermediate_size": 768},
    "sparse, 16 experts": {"n_routed_experts": 16},
    "sparse, 16 experts of half the width": {
        "n_routed_experts": 16, "moe_intermediate_size": 128, "num_experts_per_tok": 4, "n_shared_experts": 2,
    },
}  # fmt: skip
TUNING_SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("--sparse", default="sparse", choices=[name for name in CONTENDERS if name != "dense"])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune-minutes", type=float, default=1.5)
    parser.add_argument(
        "--factors",
        type=float,
        nargs="*",
        default=[0.5, 1.0, 2.0],
        help="on the quickstart's rates; a single one is taken untried",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        work(**json.loads(arguments.job))
        return
    names = (arguments.sparse, "dense")
    with TemporaryDirectory() as scratch:
        race = Race(arguments.quickstart, Path(scratch), names)
        race.measure_speed()
        tuning, best = {}, dict.fromkeys(names, arguments.factors[0])
        if len(arguments.factors) > 1:
            tuning = {
                f: race.run(arguments.tune_minutes, TUNING_SEED, dict.fromkeys(names, f)) for f in arguments.factors
            }
            best = {name: min(tuning, key=lambda f, name=name: tuning[f][name]["bits_per_byte"]) for name in names}
        runs = [race.run(arguments.minutes, seed, best) for seed in range(arguments.seeds)]
    result = report(race, tuning, best, runs, arguments.minutes)
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Race:
    """Pairs of runs side by side, in a scratch folder."""

    def __init__(self, quickstart: Path, scratch: Path, names: tuple[str, str]) -> None:
        self.quickstart, self.scratch, self.names = quickstart, scratch, names
        self.seconds_per_step: dict[str, float] = {}
        self._started = 0

    def measure_speed(self) -> None:
        """Note the seconds of a step of each while the other one runs."""
        found = self._both({name: {"steps": 0} for name in self.names}, swapped=False)
        self.seconds_per_step = {name: found[name]["seconds_per_step"] for name in self.names}

    def run(self, minutes: float, seed: int, factors: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Train both for this long with their factors on the rates; returns their results by name."""
        jobs = {
            name: {"steps": int(minutes * 60 / self.seconds_per_step[name]), "seed": seed, "factor": factors[name]}
            for name in self.names
        }
        return self._both(jobs, swapped=bool(seed % 2))

    def _both(self, jobs: Mapping[str, dict[str, Any]], swapped: bool) -> dict[str, dict[str, float]]:
        cores = sorted(os.sched_getaffinity(0))[:2]
        processes = {}
        for name, core in zip(self.names, reversed(cores) if swapped else cores, strict=True):
            self._started += 1
            job = {"contender": name, "quickstart": str(self.quickstart), "core": core, **jobs[name]}
            job["run_dir"] = str(self.scratch / f"{self._started}")
            command = [sys.executable, __file__, str(self.quickstart), "--job", json.dumps(job)]
            processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        found = {}
        for name, process in processes.items():
            output, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{name} failed with exit code {process.returncode}")
            found[name] = json.loads(output.splitlines()[-1])
        print(json.dumps({"jobs": jobs, "found": found}), file=sys.stderr, flush=True)
        return found


def work(
    contender: str, quickstart: str, core: int, run_dir: str, steps: int, seed: int = 0, factor: float = 1.0
) -> None:
    """One run on one core; without steps only its speed. Prints its result as the last line."""
    os.sched_setaffinity(0, [core])
    torch.set_num_threads(1)
    config = configured(contender, Path(quickstart), Path(run_dir), seed, factor)
    if not steps:
        print(json.dumps({"seconds_per_step": pretrain.seconds_per_step(config, steps=40)}))
        return
    schedule = config.train.schedule
    schedule = schedule.model_copy(update={"warmup_steps": min(schedule.warmup_steps, steps // 4)})
    train = config.train.model_copy(update={"steps": steps, "schedule": schedule})
    config = config.model_copy(update={"train": train})
    started = time.monotonic()
    pretrain.run(config)
    records = [line for line in metrics(config.run_dir) if "seconds" in line]
    warm = [line["seconds"] for line in records[pretrain.WARM_UP_STEPS :]]
    print(
        json.dumps(
            {
                "bits_per_byte": evaluate(config.run_dir).bits_per_byte,
                "steps": len(records),
                "seconds": round(sum(warm) + pretrain.WARM_UP_STEPS * statistics.median(warm), 1),
                "seconds_with_compilation": round(time.monotonic() - started, 1),
            }
        )
    )


def configured(contender: str, quickstart: Path, run_dir: Path, seed: int, factor: float) -> PretrainConfig:
    """The quickstart's pretraining of another model, seed and rates; it saves nothing on the way."""
    config = load_config(PretrainConfig, quickstart / "pretrain/config.yaml")
    values = config.model_dump()
    values["run_dir"] = run_dir
    values["model"] |= CONTENDERS[contender]
    values["train"] |= {"seed": seed, "steps": 100_000}
    optimizer = values["train"]["optimizer"]
    values["train"]["optimizer"] = {**optimizer, **{key: factor * optimizer[key] for key in ("lr", "muon_lr")}}
    values["checkpoint"] |= {"every": 0}
    return PretrainConfig.model_validate(values)


def report(
    race: Race, tuning: Mapping[float, Any], best: Mapping[str, float], runs: list[dict[str, Any]], minutes: float
) -> dict[str, Any]:
    sparse, dense = race.names
    gains = [run[dense]["bits_per_byte"] - run[sparse]["bits_per_byte"] for run in runs]
    models = {name: configured(name, race.quickstart, Path("."), 0, 1.0).model for name in race.names}
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "minutes": minutes,
        "parameters": {
            name: {"total": count_parameters(model).total, "active": count_parameters(model).active}
            for name, model in models.items()
        },
        "seconds_per_step": {name: round(value, 4) for name, value in race.seconds_per_step.items()},
        "tuning": {
            str(factor): {n: round(found[n]["bits_per_byte"], 4) for n in found} for factor, found in tuning.items()
        },
        "factor_on_the_rates": dict(best),
        "runs": runs,
        "bits_per_byte": {
            name: round(statistics.fmean(run[name]["bits_per_byte"] for run in runs), 4) for name in race.names
        },
        "gain_of_sparse": {"by_seed": [round(gain, 4) for gain in gains], "mean": round(statistics.fmean(gains), 4)},
    }


if __name__ == "__main__":
    main()
