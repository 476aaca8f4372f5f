"""The batch of step N of pretraining: a pure function of (seed, N, global batch size), whatever the number of ranks.

The token stream of a source is divided into consecutive windows of `sequence_length`, which order.py shuffles.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.config.data import Phase
from moe_lm.data.advice import again
from moe_lm.data.marks import Marks
from moe_lm.data.order import Items, Mixture, in_exact_epochs
from moe_lm.data.shards import TokenShards
from moe_lm.data.stream import TokenStream

IGNORE = -100  # the target of a position that is not trained
PLAN_SEQUENCES = 8192  # planned at once, which makes finding windows cheap per step
LONG_WINDOWS = 1024  # of a chunk, at most, where phases read a source in windows of several lengths


@dataclass(frozen=True)
class Batch:
    """Rows of packed tokens, in the form that travels to a device: 8 bytes a token.

    input_ids, targets: [rows, sequence] int32. A target is the next token, or IGNORE.
    cu_seqlens: [segments + 1] int32, bounds of the attention segments in the rows * sequence flattened tokens; the
    ends of rows are always among them. Positions follow from them (`segment_positions`). max_seqlen: tokens in the
    longest segment.
    part_of_rows: which of how many consecutive parts of its rows this is (`part`); bounds and max_seqlen are those of
    the whole rows.
    own_tokens: [rows, sequence] bool, where the model reads its own prediction (objective/scheduled_sampling.py).
    answers: [rows, sequence] int32, the answer that a token belongs to: 2p for the chosen one of the batch's pair p,
    2p + 1 for the rejected one, 2 * pairs for padding. reference: [pairs, 2] float32, their log-probabilities under the
    reference model.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    part_of_rows: tuple[int, int] = (0, 1)
    own_tokens: Tensor | None = None
    answers: Tensor | None = None
    reference: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return 0 if self.reference is None else len(self.reference)

    def part(self, number: int, parts: int) -> Batch:
        """The positions of this number when the rows are divided into as many consecutive `parts`."""
        names = ("input_ids", "targets", *(("answers",) if self.answers is not None else ()))
        some: dict[str, Any] = {name: getattr(self, name).chunk(parts, dim=1)[number] for name in names}
        return replace(self, **some, part_of_rows=(number, parts))

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in page-locked memory, which a GPU fetches while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)


class BatchSource(Protocol):
    """The source of the training loop's batches. `fingerprint` is equal only for equal data in equal order."""

    @property
    def fingerprint(self) -> str: ...

    def batch(self, step: int, rows: range) -> Batch:
        """The rows `rows` of the global batch of step `step`."""
        ...


class MixedBatches(ABC):
    """The batches of a run, in the order of a `Mixture` of its sources. `data`: a hash of what the sources hold."""

    def __init__(self, mixture: Mixture, data: str, global_batch_size: int) -> None:
        self._mixture = mixture
        self._data = data
        self._batch_size = global_batch_size

    @property
    def fingerprint(self) -> str:
        """Equal only for equal data in equal order."""
        return self._mixture.fingerprint(self._data)

    @abstractmethod
    def batch(self, step: int, rows: range) -> Batch:
        """The rows `rows` of the global batch of step `step`."""

    def epochs(self, steps: int) -> list[float]:
        """How often each source is read over this many steps."""
        return self._mixture.epochs(steps * self._batch_size)

    def keep_order_of(self, fingerprint: str) -> None:
        """Take the order of a run that goes on, known by the fingerprint in its checkpoints, before the first batch."""
        begun = self._mixture.in_first_order()
        if fingerprint == begun.fingerprint(self._data):
            self._mixture = begun

    def leave_out(self, windows: Sequence[tuple[int, int]]) -> None:
        """From now on `batch` is asked for `data_step(step, windows)`, as rollbacks have left out this data."""
        del windows  # nothing else depends on them without phases


class PackedBatches(MixedBatches):
    """Training batches from the shards of one or several sources, in the phases of a run.

    In each phase the sources are mixed by weight (relative shares of its sequences). A source goes on through the
    phases that read it: no token of it is trained on twice in an epoch. In windows of one length an epoch is every
    window once. Where phases read a source in windows of several lengths, an epoch is that of the longest; shorter
    ones are their parts, shuffled within chunks of a sixteenth of the source (at most 1024 long windows), and at a
    change of length the rest of the chunk is not read in this epoch.

    The rows that `batch` is asked for are those of a global batch of `global_batch_size`; a phase with fewer and longer
    ones gives as many tokens for them. With `separate_documents` a document attends only to itself, its positions begin
    at 0, and its last token has no target. `steps_per_epoch`, of the first phase, is rounded up. Raises UsageError when
    a source is shorter than one window.
    """

    def __init__(
        self,
        shards: Sequence[TokenShards],
        phases: Sequence[Phase],
        global_batch_size: int,
        seed: int,
        separate_documents: bool,
    ) -> None:
        self._phases = phases
        self._stream = TokenStream([tokens for item in shards for tokens in item.files])
        self._first_token = np.cumsum([0, *(item.num_tokens for item in shards)])
        self._marks = [item.marks for item in shards] if separate_documents else None
        data = fingerprint_of_all(item.fingerprint for item in shards)
        self._stretches = stretches_of(phases)
        mixture = _first_mixture(shards, phases, seed)
        self._parts = _parts(phases)
        super().__init__(mixture, data, global_batch_size)
        self._mixtures = self._in_stretches()
        self.steps_per_epoch = -(-self._mixture.num_items // phases[0].rows)
        self._plan: tuple[tuple[int, int], _Windows] | None = None

    def batch(self, step: int, rows: range) -> Batch:
        number = bisect_right(self._stretches, step, key=lambda stretch: stretch.step) - 1
        stretch = self._stretches[number]
        phase = self._phases[stretch.phase]
        steps = max(1, PLAN_SEQUENCES // phase.rows)
        key, offset = divmod(step - stretch.step, steps)
        if self._plan is None or self._plan[0] != (number, key):
            self._plan = (number, key), self._plan_windows(number, key * steps * phase.rows, steps * phase.rows)
        first = offset * phase.rows
        start, stop = (place * phase.rows // self._batch_size for place in (rows.start, rows.stop))
        return self._plan[1].batch(slice(first + start, first + stop, rows.step))

    def epochs(self, steps: int) -> list[float]:
        """How often each source is read over this many steps."""
        total = np.zeros(len(self._phases[0].weights))
        ends = [*(phase.first_step for phase in self._phases[1:]), steps]
        for mixture, phase, end in zip(self._mixtures, self._phases, ends, strict=True):
            total += mixture.epochs(max(0, min(end, steps) - phase.first_step) * phase.rows)
        return total.tolist()

    def keep_order_of(self, fingerprint: str) -> None:
        if len(self._phases) == 1:  # the runs that began with the first order had no others
            super().keep_order_of(fingerprint)
            self._mixtures = [self._mixture]

    def leave_out(self, windows: Sequence[tuple[int, int]]) -> None:
        if (stretches := stretches_of(self._phases, windows)) != self._stretches:
            self._stretches, self._plan = stretches, None
            self._mixtures = self._in_stretches()

    def _in_stretches(self) -> list[Mixture]:
        """The mixture of each stretch."""
        mixtures = [self._mixture]
        for before, after in itertools.pairwise(self._stretches):
            visits = (after.step - before.step) * self._phases[before.phase].rows
            mixtures.append(mixtures[-1].then(visits, self._parts[after.phase], self._phases[after.phase].weights))
        return mixtures

    def _plan_windows(self, number: int, first: int, count: int) -> _Windows:
        length = self._phases[self._stretches[number].phase].sequence_length
        sources, windows = self._mixtures[number].items(np.arange(first, first + count))
        starts = self._first_token[sources] + windows * length
        return _Windows(self._stream, starts, length, sources, self._marks)


def fingerprint_of_all(sources: Iterable[str]) -> str:
    """The fingerprint of several sources, in their order, from that of each."""
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def are_data_of(known: str, sources: Iterable[str]) -> bool:
    """Whether sources with these fingerprints are the data of a run whose batches have the fingerprint `known`."""
    data = fingerprint_of_all(sources)
    return known in (data, in_exact_epochs(data))


class Stretch(NamedTuple):
    """Data steps, read one after another in one phase: the first of them, and the number of the phase."""

    step: int
    phase: int


def stretches_of(phases: Sequence[Phase], windows: Sequence[tuple[int, int]] = ()) -> list[Stretch]:
    """What a run reads, with the windows of data that it went back over and has left out since.

    A phase begins with the same training step whatever was left out. Without rollbacks a stretch is a phase; after one
    to before the begin of a phase, the phase before it goes on behind what this one has read.
    """
    found: list[Stretch] = []
    ends = [*(phase.first_step for phase in phases[1:]), sys.maxsize]
    begin, left_out = 0, 0  # of the data steps up to the end of a window, and how many are no training steps
    for start, stop in [*windows, (0, sys.maxsize)]:
        for number, (phase, end) in enumerate(zip(phases, ends, strict=True)):
            first = max(begin, phase.first_step + left_out)
            if first < min(stop, end + left_out) and (not found or found[-1].phase != number):
                found.append(Stretch(first, number))
        begin, left_out = stop, left_out + stop - start
    return found


def _first_mixture(shards: Sequence[TokenShards], phases: Sequence[Phase], seed: int) -> Mixture:
    longest = _longest(phases)
    parts = _parts(phases)[0]
    items = []
    for place, (item, length) in enumerate(zip(shards, longest, strict=True)):
        size, read = _num_windows(item, length), {phase.sequence_length for phase in phases if phase.weights[place]}
        chunk = max(1, min(LONG_WINDOWS, size // 16)) if len(read) > 1 else 1
        items.append(Items(size, parts=parts[place] if phases[0].weights[place] else 1, chunk=chunk))
    return Mixture(items, phases[0].weights, seed)


def _longest(phases: Sequence[Phase]) -> list[int]:
    """The longest windows of each source."""
    sources = range(len(phases[0].weights))
    return [max(phase.sequence_length for phase in phases if phase.weights[place]) for place in sources]


def _parts(phases: Sequence[Phase]) -> list[list[int]]:
    """For each phase, the windows of its length in a source's longest one, by source."""
    return [[max(1, length // phase.sequence_length) for length in _longest(phases)] for phase in phases]


class EvaluationBatches:
    """Every token of a split once and in order, in batches of one shape; padding is token 0 without targets."""

    def __init__(self, shards: TokenShards, sequence_length: int, batch_size: int, separate_documents: bool) -> None:
        self._length = sequence_length
        self._batch_size = batch_size
        self._num_tokens = shards.num_tokens
        self.steps_per_epoch = -(-max(0, shards.num_tokens - 1) // (sequence_length * batch_size))
        padding = np.zeros(sequence_length * batch_size + 1, np.uint16)
        self._stream = TokenStream([*shards.files, padding])
        self._marks = [shards.marks] if separate_documents else None

    def batch(self, step: int, rows: range) -> Batch:
        sequences = step * self._batch_size + np.arange(rows.start, rows.stop, rows.step)
        starts = sequences * self._length
        sources = np.zeros_like(starts)
        windows = _Windows(self._stream, starts, self._length, sources, self._marks, end=self._num_tokens)
        batch = windows.batch(slice(None))
        last = torch.from_numpy(self._num_tokens - 1 - starts)
        batch.targets[torch.arange(self._length) >= last[:, None]] = IGNORE
        return batch


class _Windows:
    """Windows of one length in a token stream, of these `sources`, divided where documents begin by the source's marks.

    Without `marks` they are not divided. What is behind the `end` of the tokens is padding, and a segment of its own.
    """

    def __init__(
        self,
        stream: TokenStream,
        starts: NDArray[np.int64],
        length: int,
        sources: NDArray[np.int64],
        marks: Sequence[Marks] | None,
        end: int | None = None,
    ) -> None:
        self._stream = stream
        self._starts = starts
        self._length = length
        self._sources = sources
        self._marks = marks
        self._end = end

    def batch(self, selection: slice) -> Batch:
        """The selected windows as the rows of a batch."""
        starts = self._starts[selection]
        tokens = self._stream.windows(starts, self._length + 1)
        targets = tokens[:, 1:].astype(np.int32)
        bounds = np.arange(0, targets.size + 1, self._length)
        if self._marks is not None or self._end is not None:
            is_begin = self._document_begins(tokens, starts, self._sources[selection])
            targets[is_begin] = IGNORE
            begins = np.flatnonzero(is_begin) + 1
            bounds = np.sort(np.concatenate([bounds, begins[begins % self._length != 0]]))
        return pack(tokens[:, :-1], targets, bounds)

    def _document_begins(
        self, tokens: NDArray[Any], starts: NDArray[np.int64], sources: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """At i of each row, whether token i + 1 begins a document, up to the one that is only a target."""
        kinds = list(dict.fromkeys(self._marks or ()))
        if len(kinds) == 1:
            found = kinds[0].begins(tokens)
        else:
            found = np.zeros((len(tokens), self._length), bool)
            for source, marks in enumerate(self._marks or ()):
                rows = sources == source
                found[rows] = marks.begins(tokens[rows])
        if self._end is not None:
            place = starts[:, None] + np.arange(1, self._length + 1)
            found = (found & (place < self._end)) | (place == self._end)
        return found


def pack(input_ids: NDArray[Any], targets: NDArray[Any], bounds: NDArray[Any]) -> Batch:
    """A batch of [rows, sequence] tokens with the sorted bounds of its attention segments, from 0 to the last token."""
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int32)),
        targets=torch.from_numpy(targets.astype(np.int32)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(np.diff(bounds).max()),
    )


def _num_windows(shards: TokenShards, sequence_length: int) -> int:
    windows = (shards.num_tokens - 1) // sequence_length
    if windows < 1 and shards.left_out is not None:
        raise UsageError(
            f"{shards.folder} has {shards.num_tokens} {shards.split} tokens left, sequence_length={sequence_length} "
            f"needs at least {sequence_length + 1}: {shards.left_out}; {again(shards.folder)}, or take the source out"
        )
    if windows < 1:
        raise UsageError(
            f"{shards.folder} has {shards.num_tokens} {shards.split} tokens, sequence_length={sequence_length} needs "
            f"at least {sequence_length + 1}; add text or shorten data.sequence_length"
        )
    return windows
