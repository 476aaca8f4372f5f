"""Run every part of the GPU day, each in a process of its own, and write what it found at once.

A part that fails, hangs or cannot run costs itself alone. OUT/PART.json has its figures, or `{"skipped": why}`, or
`{"failed": why}`; OUT/PART.log has its output; OUT/summary.json has a line for each part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
HOUSE = HERE.parents[1]
LEAST = 120.0  # seconds after which a part is ended at the earliest: imports and compilation take their time


@dataclass(frozen=True)
class Part:
    """A script in `parts/`, its share of the minutes, and what it shows."""

    name: str
    share: float
    shows: str


# In the order of what a first day on a GPU needs most.
PARTS = (
    Part("cuda_tests", 0.12, "the tests that need a CUDA device"),
    Part("parity", 0.1, "moe-lm verify on the device"),
    Part("layer", 0.1, "the MoE layer beside grouped_mm alone and other layers"),
    Part("step", 0.2, "a training step beside transformers: 2B, and one layer of 16B"),
    Part("prediction", 0.08, "memory and time of a step beside what moe-lm plan says"),
    Part("decoding", 0.08, "decoding beside the limit of the memory's bandwidth"),
    Part("timeline", 0.07, "a profile of three steps, and their synchronisations"),
    Part("training", 0.25, "a training run on real text"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (default: %(default)g)")
    parser.add_argument(
        "--out", type=Path, default=HOUSE / "eval/results/gpu", help="folder of results (default: eval/results/gpu)"
    )
    parser.add_argument("--only", nargs="*", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, on any machine: tries the scripts themselves"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    device = "cpu" if arguments.tiny else "cuda"
    summary: dict[str, Any] = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "device": device_name(device),
    }
    left, shares = arguments.minutes * 60, sum(part.share for part in parts)
    for part in parts:
        seconds = left * part.share / shares
        started = time.monotonic()
        found = run(part, seconds, arguments.out, device, arguments.tiny)
        took = time.monotonic() - started
        left, shares = max(0.0, left - took), shares - part.share
        word = next((word for word in ("skipped", "failed") if word in found), "done")
        summary[part.name] = {"outcome": word, "seconds": round(took, 1), "why": found.get(word)}
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(f"{part.name:12}{word:9}{took:7.1f} s  {found.get(word) or part.shows}", flush=True)
    sys.exit(1 if any(value.get("outcome") == "failed" for value in summary.values() if isinstance(value, dict)) else 0)


def run(part: Part, seconds: float, out: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Run one part for about as many seconds; it is ended when it takes twice as long."""
    result, log = out / f"{part.name}.json", out / f"{part.name}.log"
    result.unlink(missing_ok=True)
    options = ["--device", device, "--seconds", f"{seconds:.0f}", "--out", str(result), *(["--tiny"] if tiny else [])]
    command = [sys.executable, str(HERE / "parts" / f"{part.name}.py"), *options]
    paths = [str(HOUSE), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    limit = max(LEAST, 2 * seconds)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HOUSE, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return add(result, {"failed": f"not done after {limit:.0f} s"})
        finally:
            with suppress(ProcessLookupError):  # it is over, and so is everything that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return add(result, {"failed": lines[-1] if lines else f"exit code {code}"})
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def add(result: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """Write how a part ended, beside the figures that it had before, if it had any."""
    figures = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    result.write_text(json.dumps(figures | outcome, indent=2) + "\n", encoding="utf-8")
    return figures | outcome


def device_name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu" if device == "cpu" else "no CUDA device"


if __name__ == "__main__":
    main()
