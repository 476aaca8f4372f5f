"""Which part of the model an operator belongs to, found from outside: by the Python frames that are running.

An operator of the backward pass has no frame of the model. It belongs where its autograd node was made, which the
nodes' sequence numbers tell.
"""

from __future__ import annotations

import bisect
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import moe_lm
from moe_lm.model.layers import MLP
from moe_lm.model.moe import Experts, MoE, Router
from moe_lm.model.transformer import Block, LanguageModel
from moe_lm.tools.plan.trace import Part, Pass

HERE = Path(__file__).parent
PACKAGE = Path(moe_lm.__file__).parent
LIBRARIES = (sys.prefix, sys.base_prefix, str(Path(torch.__file__).parent), "<")
BALANCE = str(Path("objective", "balance.py"))
EVAL_FRAME = str(Path("torch", "_dynamo", "eval_frame.py"))


@dataclass(frozen=True)
class Place:
    """Where an operator belongs. `region` numbers the compiled graph that it is in, None outside of all."""

    part: Part
    layer: int | None
    during: Pass
    where: str  # file and line
    region: int | None = None


class Places:
    """Finds the place of the operator that is about to run. `phase` is the pass outside of the backward pass."""

    def __init__(self, model: nn.Module, compiled: frozenset[int] = frozenset()) -> None:
        self.phase: Pass = "forward"
        self._module_part = dict(_parts(model))
        self._compiled = compiled  # ids of compiled modules, and of the code of compiled functions
        self._made: list[tuple[int, Place]] = []  # by sequence number, ascending
        self._regions: dict[tuple[int, Pass, int], int] = {}
        self._parameter_place: dict[int, tuple[Part, int | None]] = {
            id(parameter): self._module_part[id(module)]
            for module in model.modules()
            for parameter in module.parameters(recurse=False)
        }

    def now(self) -> Place:
        node = torch._C._current_autograd_node()
        found = self._from_frames(node is not None)
        if node is None or (found is not None and found.during == "recompute"):
            place = found or Place("update" if self.phase == "update" else "head", None, self.phase, "")
            if node is not None and place.region is None:  # repeated within the graph of a backward pass
                place = replace(place, region=self._place_of_node(node).region)
            number = torch._C._autograd._get_sequence_nr()
            if not self._made or self._made[-1][0] < number:
                self._made.append((number, place))
            return place
        made = self._place_of_node(node)
        return made if found is None else replace(made, where=found.where)

    def _place_of_node(self, node: torch.autograd.graph.Node) -> Place:
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in self._parameter_place:
            part, layer = self._parameter_place[id(variable)]
            return Place(part, layer, "backward", "")
        index = bisect.bisect_right(self._made, node._sequence_nr(), key=lambda made: made[0])
        place = self._made[min(index, len(self._made) - 1)][1]
        region = place.region
        if region is not None:  # a graph's backward pass is a graph of its own
            region = self._regions.setdefault((region, "backward", 0), len(self._regions))
        return replace(place, during="backward", region=region)

    def _from_frames(self, in_backward: bool) -> Place | None:
        """The place by the frames; in the backward pass only a recomputation has one, or code of ours."""
        where, disabled, is_ours, during = "", False, False, self.phase
        part: Part | None = None
        layer: int | None = None
        region: int | None = None
        for frame in _frames():
            filename, name = frame.f_code.co_filename, frame.f_code.co_name
            is_package, is_library = _origin(filename)
            if not where and (is_package or not is_library):
                where = f"{_shortened(filename)}:{frame.f_lineno}"
            if filename.endswith(BALANCE):
                part = part or "balance"
            if filename.endswith(EVAL_FRAME) and is_ours:
                disabled = True  # by torch.compiler.disable, on our function
            is_ours = is_package
            owner = frame.f_locals.get("self")
            is_compiled = id(frame.f_code) in self._compiled or (id(owner) in self._compiled and name == "forward")
            if id(owner) in self._module_part:
                found, of_layer = self._module_part[id(owner)]
                part, layer = part or found, of_layer if layer is None else layer
                during = "recompute" if in_backward else during
            if is_compiled and not disabled:  # within a compiled function all others are part of its graph
                region = self._regions.setdefault((id(frame), during, id(owner)), len(self._regions))
        if not where or (part is None and in_backward):
            return Place("head", None, "backward", where) if where else None
        return Place(part or ("update" if self.phase == "update" else "head"), layer, during, where, region)


def _parts(model: nn.Module) -> Iterator[tuple[int, tuple[Part, int | None]]]:
    """Every module's part and layer, by the module's id; what is inside another part belongs to that part."""
    for module in model.modules():
        yield id(module), ("head", None)
    language_model = next(module for module in model.modules() if isinstance(module, LanguageModel))
    transformer = language_model.model
    for module in transformer.modules():
        yield id(module), ("embedding", None)
    yield id(transformer.norm), ("norms", None)
    for index, block in enumerate(transformer.layers):
        assert isinstance(block, Block)
        for module in block.modules():
            yield id(module), ("norms", index)
        for module in block.self_attn.modules():
            yield id(module), ("attention", index)
        if isinstance(block.mlp, MLP):
            for module in block.mlp.modules():
                yield id(module), ("dense", index)
            continue
        for module in block.mlp.modules():
            yield id(module), (_part_in_moe(module, block.mlp), index)


def _part_in_moe(module: nn.Module, layer: MoE) -> Part:
    if isinstance(module, Router):
        return "router"
    if isinstance(module, Experts) or any(module is inner for inner in layer.experts.modules()):
        return "experts"
    return "dispatch" if module is layer else "shared"


def _frames() -> Iterator[FrameType]:
    """The running frames between the tool's own: from the operator outwards to the simulation's call."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and _is_here(frame.f_code.co_filename):
        frame = frame.f_back
    while frame is not None and not _is_here(frame.f_code.co_filename):
        yield frame
        frame = frame.f_back


@functools.cache
def _is_here(filename: str) -> bool:
    return filename.startswith(str(HERE))


@functools.cache
def _origin(filename: str) -> tuple[bool, bool]:
    """Whether a file is of the package, and whether it is of a library."""
    return filename.startswith(str(PACKAGE)), filename.startswith(LIBRARIES)


@functools.cache
def _shortened(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE.parent) else path.name
