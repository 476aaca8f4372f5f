"""Carrying tensors between our format and theirs, a piece at a time, and auditing what arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, write
from moe_lm.checkpoint.read import TensorSource, open_tensors, pieces
from moe_lm.checkpoint.safetensors_file import Output, as_bytes, write_files
from moe_lm.common.errors import MoeLmError
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import dump_config
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.carried import WithCarried, read_carried
from moe_lm.tools.interop.hf_tensors import Part, TensorPair

Tell = Callable[[int, int | None], None]  # bytes done, and in all
FILE_BYTES = 4 << 30  # tensors go into files of about this size


def write_run(
    run_dir: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    outputs: Sequence[Output],
    generation: str | None,
    carried: Sequence[Output] = (),
    about_carried: Mapping[str, str] | None = None,
) -> TensorSource:
    """Write a run folder with a checkpoint of step 0, a piece at a time; returns its tensors, read back and verified.

    `generation` is the text of generation_config.json, if there is one. `carried` are tensors beside the model's.
    """

    def write_tensors(outputs: Sequence[Output], about: Mapping[str, str], path: Path) -> None:
        path.mkdir()
        write_files(path, outputs, {"format": "pt", **about}, FILE_BYTES)

    files: dict[str, write.Content] = {
        "model.yaml": dump_config(config),
        "tokenizer": tokenizer.save,
        checkpoint.MODEL: partial(write_tensors, outputs, {}),
    }
    if carried:
        files[checkpoint.CARRIED] = partial(write_tensors, carried, about_carried or {})
    if generation is not None:
        files[checkpoint.GENERATION] = generation
    folder = write.save(run_dir / "checkpoints", 0, {}, files)
    beside = read_carried(folder)
    return WithCarried(open_tensors(folder), beside.source) if beside else open_tensors(folder)


class Meter:
    """Counts the bytes that were carried and audited, each byte once in each, and tells them and their total."""

    def __init__(self, tell: Tell | None, carried: int) -> None:
        self._tell, self._total, self._done = tell or (lambda done, total: None), 2 * carried, 0

    def add(self, piece: Tensor) -> None:
        self._done += piece.nbytes
        self._tell(self._done, max(self._done, self._total))

    def watch(self, outputs: Sequence[Output]) -> list[Output]:
        """The same outputs, with their pieces counted as they are made."""

        def counted(output: Output) -> Iterator[Tensor]:
            for piece in output.pieces():
                yield piece
                self.add(piece)

        return [output._replace(pieces=partial(counted, output)) for output in outputs]


def outputs_of_ours(theirs: TensorSource, pairs: Sequence[TensorPair], dtype: torch.dtype | None) -> list[Output]:
    """Our tensors, made from a folder's. `dtype` None keeps the folder's; biases of routers are float32."""
    return [
        Output(pair.ours, pair.shape, _our_dtype(theirs, pair, dtype), partial(_our_pieces, theirs, pair))
        for pair in pairs
    ]


def outputs_of_theirs(ours: TensorSource, pairs: Sequence[TensorPair], dtype: torch.dtype | None) -> list[Output]:
    """A folder's tensors, made from ours; `dtype` as in `outputs_of_ours`."""
    return [
        Output(part.name, part.shape, _their_dtype(ours, pair, dtype), partial(_their_pieces, ours, pair, part))
        for pair in pairs
        for part in pair.parts
        if not pair.copied
    ]


def audit(
    ours: TensorSource,
    theirs: TensorSource,
    pairs: Sequence[TensorPair],
    written: TensorSource,
    meter: Meter | None = None,
) -> int:
    """Read both formats again and compare every value, in the dtype of the source that was `written`.

    Returns their number. Raises MoeLmError naming the first tensor that differs, is missing, or should not be there.
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
            both = zip(_part_of_ours(ours, pair, part), _part_of_theirs(theirs, part), strict=True)
            for our_piece, their_piece in both:
                dtype = (our_piece if written is ours else their_piece).dtype
                if as_bytes(our_piece.to(dtype)) != as_bytes(their_piece.to(dtype)):
                    raise MoeLmError(f"the audit failed: {pair.ours} and {part.name} differ")
                values += our_piece.numel()
                if meter:
                    meter.add(our_piece)
    return values


def _our_dtype(theirs: TensorSource, pair: TensorPair, dtype: torch.dtype | None) -> torch.dtype:
    if pair.is_bias_of_router:
        return torch.float32
    return dtype or reduce(torch.promote_types, {theirs.dtype(part.name) for part in pair.parts})


def _their_dtype(ours: TensorSource, pair: TensorPair, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if pair.is_bias_of_router else dtype or ours.dtype(pair.ours)


def _our_pieces(theirs: TensorSource, pair: TensorPair) -> Iterator[Tensor]:
    if not pair.parts:
        yield torch.zeros(pair.shape)
    for part in pair.parts:
        yield from _part_of_theirs(theirs, part)


def _their_pieces(ours: TensorSource, pair: TensorPair, part: Part) -> Iterator[Tensor]:
    for piece in _part_of_ours(ours, pair, part):
        yield piece if part.expert is None else piece.mT


def _part_of_ours(ours: TensorSource, pair: TensorPair, part: Part) -> Iterator[Tensor]:
    """A part of our tensor, in pieces: one expert of a stack, or all of its rows."""
    if part.expert is None:
        yield from pieces(ours, pair.ours)
    else:
        yield ours.rows(pair.ours, part.expert, part.expert + 1)[0]


def _part_of_theirs(theirs: TensorSource, part: Part) -> Iterator[Tensor]:
    """The same part read from their tensor, in the same pieces."""
    if part.expert is None:
        yield from pieces(theirs, part.name)
    elif part.within is None:
        yield theirs.rows(part.name, 0, part.shape[0]).mT
    else:
        yield theirs.rows(part.name, part.expert, part.expert + 1, part.within)[0].mT
