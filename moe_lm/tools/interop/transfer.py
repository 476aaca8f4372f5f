"""Carrying tensors from one side to the other, a piece at a time, and auditing what arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.checkpoint.read import TensorSource
from moe_lm.checkpoint.safetensors_file import Output, as_bytes, pieces_of
from moe_lm.common.errors import MoeLmError
from moe_lm.tools.interop.hf_tensors import Pair, Part

Tell = Callable[[int, int | None], None]  # bytes done, and in all
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def no_one(done: int, total: int | None) -> None:
    """Whom a meter tells when nobody watches."""


class Meter:
    """Tells how many bytes were carried and audited, of how many: every byte counts once in each."""

    def __init__(self, tell: Tell, carried: int) -> None:
        self._tell, self._total, self._done = tell, 2 * carried, 0

    def add(self, piece: Tensor) -> None:
        self._done += piece.nbytes
        self._tell(self._done, max(self._done, self._total))

    def watch(self, outputs: Sequence[Output]) -> list[Output]:
        """The same outputs, whose pieces are counted while they are made."""

        def counted(output: Output) -> Iterator[Tensor]:
            for piece in output.pieces():
                yield piece
                self.add(piece)

        return [output._replace(pieces=partial(counted, output)) for output in outputs]


class Audit(NamedTuple):
    """What was read back and found equal, bit by bit."""

    our_tensors: int
    their_tensors: int
    values: int


def outputs_of_ours(theirs: TensorSource, pairs: Sequence[Pair], dtype: torch.dtype | None) -> list[Output]:
    """Our tensors, out of a folder's. `dtype` None keeps what the folder has; the router's biases are float32."""
    return [Output(pair.ours, pair.shape, _our_dtype(theirs, pair, dtype), _our_pieces(theirs, pair)) for pair in pairs]


def outputs_of_theirs(ours: TensorSource, pairs: Sequence[Pair], dtype: torch.dtype | None) -> list[Output]:
    """A folder's tensors, out of ours; `dtype` as above."""
    return [
        Output(part.name, part.shape, _their_dtype(ours, pair, dtype), _their_pieces(ours, pair, part))
        for pair in pairs
        for part in pair.parts
        if not pair.copied
    ]


def audit(
    ours: TensorSource, theirs: TensorSource, pairs: Sequence[Pair], written: TensorSource, meter: Meter | None = None
) -> Audit:
    """Read both sides again and compare every value in the data type of the side that was `written`.

    Raises MoeLmError naming the first tensor that differs, is missing, or is there without being asked for.
    """
    for source, names in (
        (ours, {pair.ours for pair in pairs}),
        (theirs, {part.name for pair in pairs for part in pair.parts}),
    ):
        if source is written and set(source.names()) != names:
            wrong = min(set(source.names()) ^ names)
            raise MoeLmError(f"the audit failed: tensor {wrong} should {'' if wrong in names else 'not '}be there")
    values = 0
    for pair in pairs:
        if not pair.parts and ours.rows(pair.ours, 0, pair.shape[0]).any():
            raise MoeLmError(f"the audit failed: {pair.ours} is not zero, and has no place in the other format")
        for part in pair.parts:
            for our_piece, their_piece in _pieces_of_both(ours, theirs, pair, part):
                dtype = (our_piece if written is ours else their_piece).dtype
                if as_bytes(our_piece.to(dtype)) != as_bytes(their_piece.to(dtype)):
                    raise MoeLmError(f"the audit failed: {pair.ours} and {part.name} differ")
                values += our_piece.numel()
                if meter:
                    meter.add(our_piece)
    return Audit(len(pairs), len({part.name for pair in pairs for part in pair.parts}), values)


def first_unwritable(ours: TensorSource, pairs: Sequence[Pair]) -> str | None:
    """A router's bias that is not zero and that the other side has no tensor for."""
    lost = (pair.ours for pair in pairs if not pair.parts and ours.rows(pair.ours, 0, pair.shape[0]).any())
    return next(lost, None)


def _our_dtype(theirs: TensorSource, pair: Pair, dtype: torch.dtype | None) -> torch.dtype:
    if pair.is_bias_of_router:
        return torch.float32
    return dtype or reduce(torch.promote_types, {theirs.dtype(part.name) for part in pair.parts})


def _their_dtype(ours: TensorSource, pair: Pair, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if pair.is_bias_of_router else dtype or ours.dtype(pair.ours)


def _our_pieces(theirs: TensorSource, pair: Pair) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        if not pair.parts:
            yield torch.zeros(pair.shape)
        for part in pair.parts:
            if part.expert is None:
                for start, stop in pieces_of(part.shape, 4):
                    yield theirs.rows(part.name, start, stop)
            else:
                yield theirs.rows(part.name, 0, part.shape[0]).mT

    return pieces


def _their_pieces(ours: TensorSource, pair: Pair, part: Part) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        if part.expert is None:
            for start, stop in pieces_of(part.shape, 4):
                yield ours.rows(pair.ours, start, stop)
        else:
            yield ours.rows(pair.ours, part.expert, part.expert + 1)[0].mT

    return pieces


def _pieces_of_both(
    ours: TensorSource, theirs: TensorSource, pair: Pair, part: Part
) -> Iterator[tuple[Tensor, Tensor]]:
    if part.expert is None:
        for start, stop in pieces_of(part.shape, 4):
            yield ours.rows(pair.ours, start, stop), theirs.rows(part.name, start, stop)
    else:
        expert = ours.rows(pair.ours, part.expert, part.expert + 1)[0]
        yield expert, theirs.rows(part.name, 0, part.shape[0]).mT
