"""Memory over a step: the lifetimes of a recording, with the layers that it stands for."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_lm.tools.plan.layers import Layers
from moe_lm.tools.plan.recording import Recording
from moe_lm.tools.plan.trace import Part

BACKWARD = ("backward", "recompute")


@dataclass(frozen=True)
class Activations:
    """Bytes beside what is resident."""

    saved: dict[Part, int]  # when the backward pass begins
    forward: tuple[int, str]  # the most in the forward pass, and where
    backward: tuple[int, str]


def activations(recording: Recording, layers: Layers, gradients_grow: bool) -> Activations:
    """What a micro-batch needs at its most, and where.

    With `gradients_grow` gradients come one after the other; else they are resident, and only what the passes make
    besides counts. Layers that are not traced lie before the last one of their kind: they have saved their activations
    before it begins, and have gradients once it is done.
    """
    kernels = recording.kernels
    change = [0] * (len(kernels) + 1)
    for life in recording.lives:
        if life.bytes and (gradients_grow or not life.is_gradient):
            change[life.born] += life.bytes
            if life.died is not None:
                change[life.died] -= life.bytes
    for layer, copies in enumerate(layers.copies):
        if copies > 1:
            begin, end = _span(recording, layer)
            saved, gradients = _saved(recording, layer), _gradients(recording, layer)
            change[begin] += (copies - 1) * saved.total()
            change[end] += (copies - 1) * ((gradients if gradients_grow else 0) - saved.total())
    live = list(itertools.accumulate(change[:-1]))
    turn = _turn(recording)
    passes = range(turn), range(turn, len(kernels))
    peaks = [max(((live[index], index) for index in indices), default=(0, 0)) for indices in passes]
    forward, backward = ((size, _named(recording, layers, index)) for size, index in peaks)
    total: Counter[Part] = Counter()
    for traced in (None, *range(len(layers.copies))):
        for part, size in _saved(recording, traced).items():
            total[part] += layers.of(traced) * size
    return Activations(dict(total), forward, backward)


def _span(recording: Recording, layer: int) -> tuple[int, int]:
    """From a layer's first kernel of the forward pass to the end of its backward pass."""
    indices = [index for index, kernel in enumerate(recording.kernels) if kernel.place.layer == layer]
    return indices[0], indices[-1] + 1


def _turn(recording: Recording) -> int:
    """The kernel that the backward pass begins with."""
    during = [kernel.place.during for kernel in recording.kernels]
    return next((index for index, name in enumerate(during) if name in BACKWARD), len(during))


def _saved(recording: Recording, layer: int | None) -> Counter[Part]:
    """Bytes that a layer's forward pass leaves for the backward pass, by part."""
    turn = _turn(recording)
    saved: Counter[Part] = Counter()
    for life in recording.lives:
        if life.place.layer == layer and life.born < turn and (life.died is None or life.died > turn):
            saved[life.place.part] += life.bytes
    return saved


def _gradients(recording: Recording, layer: int) -> int:
    return sum(life.bytes for life in recording.lives if life.is_gradient and life.place.layer == layer)


def _named(recording: Recording, layers: Layers, index: int) -> str:
    """The place of a kernel in words, with the number that its layer has in the whole model."""
    place = recording.kernels[index].place
    layer = "" if place.layer is None else f"layer {_number(layers.copies, place.layer)}, "
    return f"{place.during}, {layer}{place.part}"


def _number(copies: Sequence[int], layer: int) -> int:
    return sum(copies[: layer + 1]) - 1
