"""A soak: one run over two expert-parallel ranks, interrupted 200 times, against the same run that nothing interrupts.

    python -m eval.studies.soak [--interruptions 200] [--steps 1600] [--seed 1] [--preloaded] [--out FILE]

Interruptions are drawn at random: SIGKILL of a rank or of both at any moment and inside a save, SIGTERM, SIGINT,
SIGSTOP for a while or until the other rank gives up, a full disk, and a bit flipped in the newest checkpoint after a
kill. The same command starts the ranks again, and nobody else touches the run folder. At the end every step must be in
metrics.jsonl once, with the loss of the uninterrupted run to the bit, and every tensor of the last checkpoint equal.

Most of a start is Python's imports. With --preloaded the ranks are forked from a process that has imported the program,
and run the same command from there.

The folder of checkpoints is a small file system of its own, so that its disk can be full; without the right to mount
one, that kind is left out and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_lm.checkpoint import checkpoint
from tests.faults.nursery import Nursery, Started
from tests.processes import ENVIRONMENT, free_port, rank_environment

ROOT = Path(__file__).parents[2]
DISK_MB = 40
KINDS = {
    "kill one": 4, "kill both": 4, "kill in a save": 6, "SIGTERM": 4, "SIGINT": 4, "stop and go on": 3,
    "stop for good": 1, "full disk": 3, "flipped bit": 3,
}  # fmt: skip
PATIENCE = 180  # seconds for anything that must happen


class Run:
    """Two ranks in one folder, started by one command."""

    def __init__(self, folder: Path, config: Path, steps: int, nursery: Nursery | None) -> None:
        self.folder, self.nursery, self.codes = folder, nursery, Counter[str]()
        self.ranks: list[subprocess.Popen[bytes] | Started] = []
        self.command = [
            "pretrain", str(config), f"run_dir={folder}", f"train.steps={steps}",
            "checkpoint.every=10", "checkpoint.keep=3", "train.eval_every=500", "train.micro_batch_size=2",
            "parallel.engine=deepspeed", "parallel.expert_parallel_size=2", "parallel.timeout_seconds=15",
        ]  # fmt: skip

    def start(self) -> None:
        port = free_port()
        self.ranks = []
        for rank in (0, 1):
            place = rank_environment(rank, 2, port)
            if self.nursery is not None:
                self.ranks.append(self.nursery.start(*self.command, **place))
                continue
            with (self.folder.parent / f"{self.folder.name}-rank{rank}.txt").open("a") as output:
                command = [sys.executable, "-m", "moe_lm", *self.command]
                self.ranks.append(
                    subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT | place)
                )

    @property
    def ended(self) -> bool:
        return all(rank.poll() is not None for rank in self.ranks)

    def steps(self) -> int:
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return 0
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 20_000))
            found = [json.loads(line) for line in stream.read().splitlines()[:-1] if line.startswith(b'{"step"')]
        return max((line["step"] for line in found if "loss" in line and "event" not in line), default=0)

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and not self.ended:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise SystemExit(f"waited {seconds} s for {what}")
            time.sleep(0.005)

    def signal(self, number: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            if self.ranks[rank].poll() is None:
                self.ranks[rank].send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        self.until(lambda: self.ended, "the ranks to end", seconds)
        codes = [rank.wait() for rank in self.ranks]
        self.codes[str(codes)] += 1
        return codes


def interrupt(run: Run, kind: str, draw: random.Random) -> None:
    """Interrupt a run in training; afterwards its ranks have ended, unless the kind leaves them running."""
    if kind == "kill one":
        run.signal(signal.SIGKILL, (draw.randrange(2),))
    elif kind in ("kill both", "flipped bit"):
        run.signal(signal.SIGKILL)
    elif kind == "kill in a save":
        saves = run.folder / "checkpoints"
        run.until(lambda: any(path.name.endswith(".tmp") for path in saves.iterdir()), "a save")
        time.sleep(draw.uniform(0, 0.03))
        run.signal(signal.SIGKILL, draw.choice([(0,), (1,), (0, 1)]))
    elif kind == "SIGTERM":
        run.signal(signal.SIGTERM, draw.choice([(0,), (1,), (0, 1)]))
    elif kind == "SIGINT":
        run.signal(signal.SIGINT, (0, 1))
    elif kind in ("stop and go on", "stop for good"):
        rank = draw.randrange(2)
        run.signal(signal.SIGSTOP, (rank,))
        if kind == "stop and go on":
            time.sleep(draw.uniform(0.2, 4))
            run.signal(signal.SIGCONT, (rank,))
            return
        run.until(lambda: run.ranks[1 - rank].poll() is not None, "the other rank to give up")
        run.signal(signal.SIGKILL, (rank,))
    elif kind == "full disk":
        filling = run.folder / "checkpoints" / "filling"
        free = os.statvfs(filling.parent)
        with suppress(OSError), filling.open("wb") as file:
            file.write(bytes(free.f_bavail * free.f_frsize))
        time.sleep(draw.uniform(1, 4))
        filling.unlink()
        return
    run.wait()
    if kind == "flipped bit":
        complete = sorted(path.parent for path in run.folder.glob("checkpoints/step-????????/COMPLETE"))
        if len(complete) > 1:  # what is left is never the last one that is sound
            flip_a_bit(draw, complete[-1])


def flip_a_bit(draw: random.Random, folder: Path) -> None:
    file = draw.choice(sorted(folder.rglob("*.safetensors")))
    with file.open("r+b") as stream:
        place = draw.randrange(file.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << draw.randrange(8))]))


def soak(run: Run, interruptions: int, minutes: float, draw: random.Random, kinds: dict[str, int]) -> Counter[str]:
    """Interrupt the run this many times, or for this long, then let it end."""
    done = Counter[str]()
    run.start()
    deadline = time.monotonic() + 60 * minutes
    while sum(done.values()) < interruptions and time.monotonic() < deadline:
        begun = run.steps()
        few = draw.randint(1, 16)
        run.until(lambda: run.steps() > begun + few or run.steps() < begun, "steps")  # noqa: B023
        if run.ended:
            codes = run.wait()
            if codes == [0, 0]:
                raise SystemExit(f"the run ended after {sum(done.values())} interruptions; give it more --steps")
            run.start()
            continue
        kind = draw.choices(list(kinds), list(kinds.values()))[0]
        interrupt(run, kind, draw)
        done[kind] += 1
        print(f"{sum(done.values()):4} {kind:15} step {run.steps()}", flush=True)
        if run.ended:
            run.start()
    while run.wait(seconds=3600) != [0, 0]:
        run.start()
    return done


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step; raises ValueError when a step is there twice."""
    found: dict[int, float] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        if "loss" in line and "event" not in line:
            if line["step"] in found:
                raise ValueError(f"step {line['step']} is in metrics.jsonl twice")
            found[line["step"]] = line["loss"]
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.resolve(folder)
    checkpoint.verify(newest)
    return {
        f"{file.parent.name}/{file.name}/{name}": tensor
        for file in sorted(newest.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=600, help="at most")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--preloaded", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "soak.json")
    arguments = parser.parse_args()
    kinds = dict(KINDS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = prepared(folder)
        disk = folder / "run" / "checkpoints"
        disk.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(disk)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        if not mounted:
            kinds.pop("full disk")
        try:
            nursery = Nursery(folder) if arguments.preloaded else None
            result = compare(folder, config, arguments, kinds, nursery)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(disk)], check=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def compare(
    folder: Path, config: Path, arguments: argparse.Namespace, kinds: dict[str, int], nursery: Nursery | None
) -> dict[str, Any]:
    undisturbed = Run(folder / "undisturbed", config, arguments.steps, nursery)
    undisturbed.start()
    if undisturbed.wait(seconds=3600) != [0, 0]:
        raise SystemExit("the undisturbed run failed")
    run = Run(folder / "run", config, arguments.steps, nursery)
    begun = time.monotonic()
    done = soak(run, arguments.interruptions, arguments.minutes, random.Random(arguments.seed), kinds)
    expected, found = losses(undisturbed.folder), losses(run.folder)
    weights, others = tensors(undisturbed.folder), tensors(run.folder)
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "steps": arguments.steps,
        "preloaded": arguments.preloaded,
        "seed": arguments.seed,
        "interruptions": dict(done),
        "interruptions_in_all": sum(done.values()),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "exit_codes": dict(run.codes),
        "steps_missing": sorted(expected.keys() - found.keys()),
        "losses_that_differ": sum(expected[step] != found[step] for step in expected.keys() & found.keys()),
        "tensors": len(weights),
        "tensors_that_differ": sum(not torch.equal(weights[name], others[name]) for name in weights),
        "same_names": weights.keys() == others.keys(),
    }


def prepared(folder: Path) -> Path:
    """The config of a small run over the project's own documents, with its shards written."""
    config = folder / "config.yaml"
    text = (ROOT / "tests" / "golden" / "tiny_moe.yaml").read_text(encoding="utf-8")
    text = text.replace("tokenizer: tokenizer", f"tokenizer: {ROOT / 'tokenizer' / 'tiny'}")
    text = text.replace("shards: shards", f"shards: {folder / 'shards'}")
    text = text.replace("path: text.jsonl", f"path: {ROOT / 'docs'}").replace("every: 50", "every: 500")
    config.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "moe_lm", "prepare", str(config)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    return config


if __name__ == "__main__":
    main()
