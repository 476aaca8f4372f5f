"""Figures of a run: how even the experts' load is, how well the device is used, and the log that keeps them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.common.files import whole_file
from moe_lm.config.run import LogConfig
from moe_lm.parallel.topology import current_topology
from moe_lm.train.display import Display, Status
from moe_lm.train.trackers import open_trackers

# Dense bfloat16 (and float16) products without sparsity, FLOP/s, from the makers' data sheets. The first whose words
# are in the device's name counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "MI300X": 1307e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class MetricsLog:
    """Keeps every step in `metrics.jsonl`, a line now and then in `train.log`, and shows the run to a person.

    Steps after `start_step` that a killed process had logged are dropped first, so that the file has each step
    once; a run that begins anew drops all, the evaluation before its first step too. On a terminal there is a live
    bar, elsewhere a plain line every `config.every` steps; `quiet` shows nothing.
    Once it runs, no failure to write stops the training: it is said once. All of this is rank 0's; on the other ranks
    it does nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        total_steps: int,
        title: str,
        start_step: int,
        quiet: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._start_step = start_step
        self._quiet = quiet
        self._status = Status(title, total_steps, start_step)
        self._is_main = current_topology().is_main
        self._failed: set[str] = set()

    def __enter__(self) -> Self:
        if not self._is_main:
            return self
        metrics = self._run_dir / "metrics.jsonl"
        try:
            drop_later_steps(metrics, self._start_step or -1)
            self._trackers = open_trackers(self._config, self._run_dir, self._start_step)
            self._metrics = LineFile(metrics)
            self._log = LineFile(self._run_dir / "train.log")
        except OSError as error:
            raise UsageError(f"cannot write the logs in {self._run_dir}: {error}; choose another run_dir") from error
        self._display = Display(self._status, self._quiet)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_main:
            return
        self._display.close()
        for name, tracker in self._trackers.items():
            self._guard(name, tracker.close)
        self._metrics.close()
        self._log.close()

    def step(self, record: Mapping[str, Any]) -> None:
        """Keep and show the figures of one step, `record["step"]` counted from 1."""
        if not self._is_main:
            return
        self._status.update(record, time.monotonic())
        self._guard("metrics.jsonl", lambda: self._metrics.write(json.dumps(_json_safe(record))))
        scalars = dict(_scalars({key: value for key, value in record.items() if key != "step"}))
        for name, tracker in self._trackers.items():
            if name not in self._failed:
                self._guard(name, partial(tracker.log, record["step"], scalars))
        due = self._is_due(record)
        if due:
            self._write_log(self._status.line())
        self._display.step(self._status, due)

    def message(self, text: str) -> None:
        """A line for the person and for `train.log`."""
        if self._is_main:
            self._write_log(text)
            self._display.message(text)

    def _is_due(self, record: Mapping[str, Any]) -> bool:
        step = record["step"]
        edge = step in (self._start_step + 1, self._status.total_steps)
        return edge or step % self._config.every == 0 or "val_loss" in record

    def _write_log(self, text: str) -> None:
        stamp = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._guard("train.log", lambda: self._log.write(f"{stamp}  {text}"))

    def _guard(self, name: str, action: Callable[[], object]) -> None:
        """Training does not care for a full disk or a tracker that is away; the first failure of each is said."""
        try:
            action()
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                self.message(f"warning: {name} could not be written: {error}; training goes on")


class LineFile:
    """Appends whole lines, each handed to the system at once; a line that does not fit leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Raises OSError when the line cannot be written, and takes a part of it back."""
        content = f"{line}\n".encode(errors="backslashreplace")
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(before)
            raise

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def drop_later_steps(path: Path, last_step: int) -> None:
    """Rewrite a `metrics.jsonl` without the lines of steps after `last_step`, and without torn lines."""
    if not path.exists():
        return
    with whole_file(path) as kept, path.open("rb") as old, kept.open("wb") as new:
        new.writelines(line for line in old if _step_of(line) <= last_step)


def load_statistics(load: Tensor) -> list[dict[str, float]]:
    """How even each MoE layer's load is, from `load [layers, experts]`, tokens an expert.

    max_over_mean: the largest expert's tokens over the mean; max_violation: that minus 1 (MaxVio, arXiv 2408.15664);
    entropy: of the load distribution, 1 when even, 0 when one expert has it all; dead_share: of experts without a
    token. A layer without any token counts as even but dead: max_over_mean 1, entropy 0, dead_share 1.
    """
    return [_layer_statistics(counts) for counts in load.double().cpu()]


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """The share of the device's peak (FLOP/s) that the model's own arithmetic uses; recomputation counts nothing."""
    return tokens_per_second * flops_per_token / peak


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense products on this device; None where no figure is known, as on a CPU or in float32."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the device by tensors, or of the process when the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _layer_statistics(counts: Tensor) -> dict[str, float]:
    experts, total = len(counts), float(counts.sum())
    if total == 0:
        return {"max_over_mean": 1.0, "max_violation": 0.0, "entropy": 0.0, "dead_share": 1.0}
    shares = counts / total
    max_over_mean = float(shares.max()) * experts
    entropy = float(torch.special.entr(shares).sum()) / math.log(experts) if experts > 1 else 1.0
    return {
        "max_over_mean": max_over_mean,
        "max_violation": max_over_mean - 1,
        "entropy": entropy,
        "dead_share": float((counts == 0).double().mean()),
    }


def _step_of(line: bytes) -> float:
    """The step of a line of `metrics.jsonl`; infinity for a torn one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_safe(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record by its path: `experts/0/entropy`."""
    if isinstance(value, (int, float)):
        yield name, float(value)
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _scalars(item, f"{name}/{key}" if name else str(key))
