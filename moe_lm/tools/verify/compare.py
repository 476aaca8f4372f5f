"""What a layout computed against what one process computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

BIAS = "e_score_correction_bias"
# A tensor that is smaller than these is compared with them: next to nothing but rounding is no difference. In units of
# the whole gradient's norm, and of what one step moves a weight by (the learning rate).
SMALL_GRADIENT = 1e-4
SMALL_WEIGHT = 1.0


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference. Counts and router biases have none, but in bfloat16 after the first step."""

    loss: float = 1e-6
    tensor: float = 1e-5
    rounded: bool = False

    @classmethod
    def of(cls, precision: str) -> Tolerance:
        return cls(loss=1e-2, tensor=1e-2, rounded=True) if precision == "bfloat16" else cls()


@dataclass(frozen=True)
class Difference:
    """Something that is not equal, with where it was found first."""

    step: int
    what: str  # the quantity, for a tensor with its name and for one expert's part with its number
    expected: str
    found: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}: expected {self.expected}, found {self.found}"


@dataclass
class Comparison:
    """How far a layout is from its reference; `worst` is the largest relative difference of a kind."""

    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("loss", "gradient", "weight"), 0.0))
    counts_equal: bool = True
    first: Difference | None = None
    differences: int = 0

    @property
    def ok(self) -> bool:
        return self.first is None

    def note(self, kind: str, relative: float) -> None:
        self.worst[kind] = max(self.worst[kind], relative if relative == relative else math.inf)

    def add(self, difference: Difference) -> None:
        self.first = self.first or difference
        self.differences += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "worst": self.worst,
            "counts_equal": self.counts_equal,
            "differences": self.differences,
            "first_difference": asdict(self.first) if self.first else None,
        }


def compare(reference: Path, found: Path, tolerance: Tolerance, learning_rate: float) -> Comparison:
    """Every step that `found` has, with the same step of `reference`."""
    result = Comparison()
    expected_steps = {record["step"]: record for record in read_steps(reference)}
    for place, record in enumerate(read_steps(found)):
        step, expected = record["step"], expected_steps[record["step"]]
        first = place == 0 and step == 0
        for difference in _figures(expected, record, tolerance, exact=first or not tolerance.rounded, result=result):
            result.add(difference)
        floors = {"gradient": SMALL_GRADIENT * expected["gradient norm"], "weight": SMALL_WEIGHT * learning_rate}
        tensors = load_file(reference / f"{step}.safetensors"), load_file(found / f"{step}.safetensors")
        for difference in _tensors(*tensors, step, floors, tolerance, first, result):
            result.add(difference)
    return result


def read_steps(folder: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    return records


def _figures(
    expected: dict[str, Any], found: dict[str, Any], tolerance: Tolerance, exact: bool, result: Comparison
) -> Iterator[Difference]:
    step = found["step"]
    for what, allowed, kind in (
        ("loss", tolerance.loss, "loss"),
        ("balance loss", tolerance.loss, "loss"),
        ("gradient norm", tolerance.tensor, "gradient"),
    ):
        relative = abs(found[what] - expected[what]) / max(abs(expected[what]), 1e-30)
        result.note(kind, relative)
        if not relative <= allowed:  # not a number is a difference
            yield Difference(step, what, f"{expected[what]:.9g}", f"{found[what]:.9g}")
    if found["expert counts"] != expected["expert counts"] and exact:
        result.counts_equal = False
        pairs = zip(expected["expert counts"], found["expert counts"], strict=True)
        layer, (want, got) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        yield Difference(step, f"expert counts of MoE layer {layer}", str(want), str(got))


def _tensors(
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    step: int,
    floors: dict[str, float],
    tolerance: Tolerance,
    first: bool,
    result: Comparison,
) -> Iterator[Difference]:
    if expected.keys() != found.keys():
        names = sorted(expected.keys() ^ found.keys())
        yield Difference(step, "names of tensors", f"{len(expected)}", f"{len(found)}, not in both: {names[0]}")
        return
    for full_name, want in expected.items():
        kind, name = full_name.split("/", 1)
        got = found[full_name]
        if tolerance.rounded and not first and (kind == "gradient" or BIAS in name):
            continue  # in bfloat16 tokens change experts, from the second step on
        if want.shape != got.shape:
            yield Difference(step, f"shape of {kind} {name}", str(tuple(want.shape)), str(tuple(got.shape)))
        elif BIAS in name:
            if not torch.equal(want, got):
                yield _difference(step, f"router bias {name}", want, got)
        else:
            # One expert's part is small in a stack: each is looked at by itself.
            parts = [(f", expert {n}", *pair) for n, pair in enumerate(zip(want, got, strict=True))]
            for suffix, a, b in parts if ".experts." in name else [("", want, got)]:
                floor = floors[kind] * (math.sqrt(a.numel()) if kind == "weight" else 1.0)
                relative = _relative(a.double(), b.double(), floor)
                result.note(kind, relative)
                if not relative <= tolerance.tensor:
                    yield _difference(step, f"{kind} {name}{suffix}", a, b)


def _relative(want: Tensor, got: Tensor, floor: float) -> float:
    """The norm of the difference over the norm of what is wanted. Nothing at all must stay nothing at all."""
    if not want.any():
        return math.inf if got.any() else 0.0
    return float((got - want).norm() / want.norm().clamp(min=floor))


def _difference(step: int, what: str, want: Tensor, got: Tensor) -> Difference:
    """Names the element that is farthest off, and both norms."""
    place = int((got.double() - want.double()).abs().nan_to_num(nan=math.inf).argmax())
    index = [int(n) for n in torch.unravel_index(torch.tensor(place), want.shape)]

    def show(tensor: Tensor) -> str:
        return f"{tensor.flatten()[place]:.7g} (norm {tensor.double().norm():.7g})"

    return Difference(step, f"{what} at {index}", show(want), show(got))
