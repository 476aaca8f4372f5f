"""The deviation of a layout from its reference: every figure and tensor of every step."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

BIAS = "e_score_correction_bias"
# A tensor with a smaller norm is compared with these instead: a difference of next to nothing is rounding. They are in
# units of the whole gradient's norm, and of the distance that one step moves a weight (the learning rate).
SMALL_GRADIENT = 1e-4
SMALL_WEIGHT = 1.0


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference. Counts and router biases have none, except in bfloat16 after the first step."""

    loss: float = 1e-6
    tensor: float = 1e-5
    rounded: bool = False

    @classmethod
    def of(cls, precision: str) -> Tolerance:
        return cls(loss=1e-2, tensor=2e-2, rounded=True) if precision == "bfloat16" else cls()


@dataclass(frozen=True)
class Difference:
    """A quantity that is out of tolerance. `what` names it, with the tensor and the expert where there are any."""

    step: int
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}: expected {self.expected}, found {self.found}"


@dataclass
class Deviation:
    """The largest relative difference of each kind, and how many quantities are out of tolerance."""

    tolerance: Tolerance
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("loss", "gradient", "weight"), 0.0))
    counts_equal: bool = True
    first: Difference | None = None
    differences: int = 0

    @property
    def ok(self) -> bool:
        return self.first is None

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "worst": self.worst,
            "counts_equal": self.counts_equal,
            "differences": self.differences,
            "first_difference": asdict(self.first) if self.first else None,
        }

    def compare_figures(self, expected: dict[str, Any], found: dict[str, Any], exact: bool) -> None:
        step = found["step"]
        for what, kind, allowed in (
            ("loss", "loss", self.tolerance.loss),
            ("balance loss", "loss", self.tolerance.loss),
            ("gradient norm", "gradient", self.tolerance.tensor),
        ):
            relative = abs(found[what] - expected[what]) / max(abs(expected[what]), 1e-30)
            if not self._within(allowed, kind, relative):
                self._add(step, what, f"{expected[what]:.9g}", f"{found[what]:.9g}")
        if exact and found["expert counts"] != expected["expert counts"]:
            self.counts_equal = False
            layers = zip(expected["expert counts"], found["expert counts"], strict=True)
            layer, (want, got) = next((n, pair) for n, pair in enumerate(layers) if pair[0] != pair[1])
            self._add(step, f"expert counts of MoE layer {layer}", want, got)

    def compare_tensors(
        self, step: int, expected: dict[str, Tensor], found: dict[str, Tensor], floors: dict[str, float], exact: bool
    ) -> None:
        """Compare tensors by name; a norm below its kind's floor counts as the floor."""
        if expected.keys() != found.keys():
            odd = min(expected.keys() ^ found.keys())
            self._add(step, "names of tensors", len(expected), f"{len(found)}, not in both: {odd}")
            return
        for full_name, want in expected.items():
            kind, name = full_name.split("/", 1)
            got = found[full_name]
            if not exact and (kind == "gradient" or BIAS in name):
                continue
            if want.shape != got.shape:
                self._add(step, f"shape of {kind} {name}", tuple(want.shape), tuple(got.shape))
            elif BIAS in name:
                if not torch.equal(want, got):
                    self._add_tensor(step, f"router bias {name}", want, got)
            else:
                # One expert is small beside its stack, so each is compared by itself.
                parts = [(f", expert {n}", *pair) for n, pair in enumerate(zip(want, got, strict=True))]
                for suffix, a, b in parts if ".experts." in name else [("", want, got)]:
                    floor = floors[kind] * (math.sqrt(a.numel()) if kind == "weight" else 1.0)
                    if not self._within(self.tolerance.tensor, kind, _relative(a.double(), b.double(), floor)):
                        self._add_tensor(step, f"{kind} {name}{suffix}", a, b)

    def _within(self, allowed: float, kind: str, relative: float) -> bool:
        """Record a relative difference. NaN is never within what is allowed."""
        self.worst[kind] = max(self.worst[kind], math.inf if math.isnan(relative) else relative)
        return relative <= allowed

    def _add(self, step: int, what: str, expected: object, found: object) -> None:
        self.first = self.first or Difference(step, what, str(expected), str(found))
        self.differences += 1

    def _add_tensor(self, step: int, what: str, want: Tensor, got: Tensor) -> None:
        """Name the element with the largest difference, and both norms."""
        place = int((got.double() - want.double()).abs().nan_to_num(nan=math.inf).argmax())
        index = [int(n) for n in torch.unravel_index(torch.tensor(place), want.shape)]
        shown = (f"{tensor.flatten()[place]:.7g} (norm {tensor.double().norm():.7g})" for tensor in (want, got))
        self._add(step, f"{what} at {index}", *shown)


def deviation_of(layout: Path, reference: Path, tolerance: Tolerance, learning_rate: float) -> Deviation:
    """Compare every step of a layout's folder with the same step of the reference's folder."""
    deviation = Deviation(tolerance)
    expected_steps = {record["step"]: record for record in read_steps(reference)}
    for found in read_steps(layout):
        step = found["step"]
        expected = expected_steps[step]
        exact = step == 0 or not tolerance.rounded  # rounded to bfloat16, tokens change experts from the second step on
        deviation.compare_figures(expected, found, exact)
        floors = {"gradient": SMALL_GRADIENT * expected["gradient norm"], "weight": SMALL_WEIGHT * learning_rate}
        tensors = load_file(reference / f"{step}.safetensors"), load_file(layout / f"{step}.safetensors")
        deviation.compare_tensors(step, *tensors, floors, exact)
    return deviation


def read_steps(folder: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    return records


def _relative(want: Tensor, got: Tensor, floor: float) -> float:
    """The norm of the difference over the expected norm. A tensor of zeros must stay zero."""
    if not want.any():
        return math.inf if got.any() else 0.0
    return float((got - want).norm() / want.norm().clamp(min=floor))
