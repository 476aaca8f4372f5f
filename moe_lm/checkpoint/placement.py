"""Where the elements of each tensor are: in which of the files that the ranks wrote.

Every rank writes the pieces of tensors that it keeps into its own files. The index of a part, `pieces.json`, has the
files, and for each tensor its runs: `[start, length, pieces, file, step]` are so many pieces of `length` elements, one
behind the other from element `start` on, in the files of number `file`, `file + step` and on. A tensor that 512 ranks
divide evenly is one line.

Checkpoints of earlier versions have no index. There the header of each file says which boxes of tensors it has.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_lm.checkpoint.safetensors_file import NAMES, Header, Stored, read_header
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import read_regular
from moe_lm.parallel.logical import Piece

INDEX = "pieces.json"
MOST_INDEX = 1 << 30  # bytes
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in the headers of earlier versions


class Span(NamedTuple):
    """Elements of a tensor, flattened, from `start` on: `length` of them are in `stored` from its `offset` on."""

    start: int
    length: int
    stored: Stored
    offset: int


class Run(NamedTuple):
    """Pieces of one length in files of numbers in equal steps, as the index has them."""

    start: int
    length: int
    pieces: int
    file: int
    step: int
    offset: int = 0  # of the first element among those that the file has under the tensor's name

    @property
    def stop(self) -> int:
        return self.start + self.length * self.pieces


class Placed(NamedTuple):
    """A tensor of a checkpoint: its dtype as safetensors calls it, its shape, and its runs in order."""

    dtype_name: str
    shape: tuple[int, ...]
    runs: Sequence[Run]


class Placement:
    """The places of all tensors in a subfolder of a checkpoint. Opens the files that hold what is asked for.

    Raises MoeLmError for an index or a file that is not sound, and for a tensor of which a part is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._headers: dict[str, Header] = {}

    @cached_property
    def tensors(self) -> dict[str, Placed]:
        placed = self._from_index() if (self._folder / INDEX).exists() else self._from_headers()
        for name, tensor in placed.items():
            if sum(run.length * run.pieces for run in tensor.runs) != math.prod(tensor.shape):
                raise self._partial(name)
        return placed

    def spans(self, name: str, start: int, stop: int) -> Iterator[Span]:
        """The elements `start..stop` of a tensor, in order."""
        at = start
        for run in self.tensors[name].runs:
            if run.stop <= start or run.start >= stop:
                continue
            first = max(0, start - run.start) // run.length
            for number in range(first, run.pieces):
                begin = run.start + number * run.length
                if begin >= stop:
                    break
                upper = min(stop, begin + run.length)
                if at < begin:
                    break
                yield Span(at, upper - at, self._stored(name, run, number), run.offset + at - begin)
                at = upper
        if at < stop:
            raise self._partial(name)

    def _partial(self, name: str) -> MoeLmError:
        return MoeLmError(f"the checkpoint {self._folder.parent} holds only a part of tensor {name}")

    def _stored(self, name: str, run: Run, number: int) -> Stored:
        """What the file of a run's piece has of the tensor."""
        path = self._folder / self._files[run.file + number * run.step]
        stored = self._header(path).tensors.get(name)
        if stored is None:
            raise MoeLmError(f"{path} has no tensor {name}, where {INDEX} says it is; copy the checkpoint again")
        expected, elements = self.tensors[name].dtype_name, math.prod(stored.shape)
        if stored.dtype_name != expected or elements < run.offset + run.length:
            raise MoeLmError(
                f"{path} has {elements} elements of tensor {name} in {stored.dtype_name}, where {INDEX} says that it "
                f"has {run.length} in {expected}; copy the checkpoint again"
            )
        return stored

    def _header(self, path: Path) -> Header:
        if path.name not in self._headers:
            self._headers[path.name] = read_header(path)
        return self._headers[path.name]

    def _from_index(self) -> dict[str, Placed]:
        path = self._folder / INDEX
        try:
            content = json.loads(read_regular(path, MOST_INDEX))
            self._files = [_checked_name(name) for name in content["files"]]
            placed = {name: _placed(entry, len(self._files)) for name, entry in content["tensors"].items()}
        except UsageError as error:
            raise MoeLmError(str(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise MoeLmError(f"{path} is not the index of a checkpoint; copy the checkpoint again") from error
        return placed

    def _from_headers(self) -> dict[str, Placed]:
        paths = sorted(self._folder.glob("*.safetensors"))
        self._files = [path.name for path in paths]
        boxes: dict[str, list[tuple[tuple[int, ...], Stored, int]]] = {}
        for number, path in enumerate(paths):
            header = self._header(path)
            for name, begin in _offsets(path, header).items():
                boxes.setdefault(name, []).append((begin, header.tensors[name], number))
        return {name: _of_boxes(found) for name, found in boxes.items()}


class Plan(NamedTuple):
    """What a rank has written of a part: the names of its files and tensors, and a line a piece.

    tensors: compressed text of `dtype shape name` lines. lines: [pieces, 4] int64, tensor, start, length, file.
    """

    files: tuple[str, ...]
    tensors: bytes
    lines: NDArray[np.int64]

    @classmethod
    def of(cls, files: Mapping[str, Mapping[str, Piece]]) -> Plan:
        """The plan of a rank that writes these pieces of tensors into each file."""
        held = [(name, piece, number) for number, pieces in enumerate(files.values()) for name, piece in pieces.items()]
        text = "\n".join(f"{NAMES[p.dtype]} {','.join(map(str, p.shape))} {name}" for name, p, _ in held)
        lines = [(number, piece.start, piece.size, file) for number, (_, piece, file) in enumerate(held)]
        return cls(tuple(files), zlib.compress(text.encode(), 1), np.array(lines, np.int64).reshape(-1, 4))

    def equals(self, other: Plan | None) -> bool:
        return (
            other is not None
            and self[:2] == other[:2]
            and self.lines.shape == other.lines.shape
            and bool((self.lines == other.lines).all())
        )


def index_of(plans: Sequence[Plan]) -> str:
    """The text of the index of a part, from what every rank has written.

    Raises MoeLmError for a tensor of which elements are missing, or written twice.
    """
    files = [name for plan in plans for name in plan.files]
    numbers: dict[str, int] = {}  # of the tensors, by `dtype shape name`
    tables = []
    first_file = 0
    for plan in plans:
        known = [numbers.setdefault(line, len(numbers)) for line in _tensors_in(plan)]
        lines = plan.lines.copy()
        lines[:, 0] = np.array(known, np.int64)[plan.lines[:, 0]]
        lines[:, 3] += first_file
        first_file += len(plan.files)
        tables.append(lines)
    table = np.concatenate(tables)
    tensors: dict[str, Any] = {}
    runs = itertools.groupby(_runs(table[np.lexsort((table[:, 1], table[:, 0]))]), key=lambda pair: pair[0])
    described = list(numbers)
    for number, found in runs:
        dtype, sizes, name = described[number].split(" ", 2)
        shape = [int(size) for size in sizes.split(",") if size]
        lines_of_it = [run[:5] for _, run in found if run.length]
        _check_complete(name, lines_of_it, math.prod(shape))
        tensors[name] = {"dtype": dtype, "shape": shape, "runs": lines_of_it}
    return json.dumps({"files": files, "tensors": dict(sorted(tensors.items()))}, separators=(",", ":"))


def _tensors_in(plan: Plan) -> list[str]:
    text = zlib.decompress(plan.tensors).decode()
    return text.split("\n") if text else []


def _runs(table: NDArray[np.int64]) -> Iterator[tuple[int, Run]]:
    """The runs in a table [pieces, 4] that is sorted by tensor and start, each with the number of its tensor."""
    if not len(table):
        return
    tensor, start, length, file = table.T
    follows = np.zeros(len(table), np.bool_)
    follows[1:] = (tensor[1:] == tensor[:-1]) & (length[1:] == length[:-1]) & (start[1:] == start[:-1] + length[:-1])
    step = np.diff(file, prepend=file[:1])
    follows[2:] &= ~follows[1:-1] | (step[2:] == step[1:-1])
    firsts = np.flatnonzero(~follows)
    for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(table)], strict=True):
        its_step = int(step[first + 1]) if last - first > 1 else 0
        yield int(tensor[first]), Run(int(start[first]), int(length[first]), last - first, int(file[first]), its_step)


def _check_complete(name: str, runs: Sequence[Sequence[int]], size: int) -> None:
    end = 0
    for start, length, count, *_ in runs:
        if start != end:
            break
        end += length * count
    if end != size:
        raise MoeLmError(f"the ranks have written {end} of the {size} elements of tensor {name} once and in order")


def _placed(entry: Mapping[str, Any], num_files: int) -> Placed:
    """A line of the index. Raises ValueError for one that no `index_of` wrote."""
    shape = tuple(int(size) for size in entry["shape"])
    runs = [Run(*map(int, run)) for run in entry["runs"]]
    end = 0
    for run in runs:
        last_file = run.file + (run.pieces - 1) * run.step
        if (
            run.start != end
            or min(run.length, run.pieces) < 1
            or not 0 <= min(run.file, last_file) <= max(run.file, last_file) < num_files
        ):
            raise ValueError
        end = run.stop
    if min(shape, default=0) < 0:
        raise ValueError
    return Placed(str(entry["dtype"]), shape, runs)


def _checked_name(name: str) -> str:
    if name != Path(name).name or not name.endswith(".safetensors"):
        raise ValueError
    return name


def _of_boxes(boxes: Sequence[tuple[tuple[int, ...], Stored, int]]) -> Placed:
    """A tensor out of boxes of it, each with the place where it begins in the whole and the number of its file."""
    dimensions = range(len(boxes[0][0]))
    shape = tuple(max(begin[place] + stored.shape[place] for begin, stored, _ in boxes) for place in dimensions)
    runs = [run for begin, stored, file in boxes for run in _runs_of_box(begin, stored.shape, shape, file)]
    return Placed(boxes[0][1].dtype_name, shape, sorted(runs))


def _runs_of_box(begin: tuple[int, ...], box: tuple[int, ...], shape: tuple[int, ...], file: int) -> Iterator[Run]:
    """The runs of elements, one behind the other in the whole tensor, that a box of it has."""
    cut = max((place for place, size in enumerate(box) if size != shape[place]), default=0)
    length = math.prod(box[cut:])
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    if not length:
        return
    for number, place in enumerate(itertools.product(*map(range, box[:cut]))):
        corner = zip(begin, (*place, *[0] * (len(shape) - cut)), strict=True)
        start = sum((first + inner) * stride for (first, inner), stride in zip(corner, strides, strict=True))
        yield Run(start, length, 1, file, 0, number * length)


def _offsets(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """Where the box of each tensor of a file begins in the whole tensor, as earlier versions put it into the header."""
    places = {name: (0,) * len(stored.shape) for name, stored in header.tensors.items()}
    try:
        entries = json.loads(header.metadata.get(SHARDING, "{}"))
        places |= {name: tuple(map(int, entry[OFFSETS])) for name, entry in entries.items()}
        sound = all(len(places[name]) == len(stored.shape) for name, stored in header.tensors.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound or min((min(place, default=0) for place in places.values()), default=0) < 0:
        raise MoeLmError(f"{path} does not say soundly where its pieces of tensors belong; copy the checkpoint again")
    return {name: places[name] for name in header.tensors}
