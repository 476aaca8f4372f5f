"""Rows of tensors, put together from the pieces that several ranks wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, write
from moe_lm.checkpoint.safetensors_file import Output, write_file
from moe_lm.common.errors import MoeLmError

WHOLE = torch.arange(4.0 * 6 * 3).view(4, 6, 3)
PIECES = {(0, 0): WHOLE[:2, :3], (0, 3): WHOLE[:2, 3:], (2, 0): WHOLE[2:, :3], (2, 3): WHOLE[2:, 3:]}
NAME = "model.experts"


def save_pieces(folder: Path, pieces: dict[tuple[int, int], Tensor], **places: Any) -> read.CheckpointTensors:
    """A checkpoint's weights as four ranks leave them, each piece in a file; `places` replaces what the files say."""
    (folder / checkpoint.MODEL).mkdir(parents=True)
    for number, (begin, piece) in enumerate(pieces.items()):
        places_of_file = {NAME: {"saved_offsets": [*begin, 0]}} | places
        output = Output(NAME, tuple(piece.shape), piece.dtype, lambda piece=piece: iter([piece]))
        path = folder / checkpoint.MODEL / f"{number}.safetensors"
        write_file(path, [output], {"DCP_SHARDING_INFO": json.dumps(places_of_file)})
    return read.CheckpointTensors(folder)


def test_any_box_is_put_together_from_the_pieces(tmp_path: Path) -> None:
    source = save_pieces(tmp_path, PIECES)
    assert list(source.names()) == [NAME]
    assert source.shape(NAME) == (4, 6, 3)
    assert source.dtype(NAME) == torch.float32
    for start, stop in ((0, 4), (1, 3), (3, 4), (2, 2)):
        assert torch.equal(source.rows(NAME, start, stop), WHOLE[start:stop])
        for across in (slice(0, 6), slice(2, 5), slice(3, 4)):
            assert torch.equal(source.rows(NAME, start, stop, across), WHOLE[start:stop, across])
            assert torch.equal(source.rows(NAME, start, stop, across, slice(1, 3)), WHOLE[start:stop, across, 1:3])
    assert torch.equal(torch.cat(list(read.pieces(source, NAME))), WHOLE)


def test_a_part_reads_no_file_of_another_part(tmp_path: Path) -> None:
    """A rank that loads what it saved reads its own piece only."""
    source = save_pieces(tmp_path, PIECES)
    assert source.shape(NAME) == (4, 6, 3)  # the headers are read
    for number in (0, 1, 3):
        (tmp_path / checkpoint.MODEL / f"{number}.safetensors").unlink()
    assert torch.equal(source.rows(NAME, 2, 4, slice(0, 3)), WHOLE[2:, :3])
    with pytest.raises(MoeLmError, match=r"cannot read .*3\.safetensors: No such file"):
        source.rows(NAME, 2, 4)


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    source = save_pieces(tmp_path, {begin: piece for begin, piece in PIECES.items() if begin != (0, 3)})
    with pytest.raises(MoeLmError, match=f"holds only a part of tensor {NAME}"):
        read.check_fits({NAME: WHOLE}, source, whole=True)


@pytest.mark.parametrize("place", [[0, 0], [-1, 0, 0], ["a", 0, 0], None, {}, {"saved_offsets": 3}])
def test_a_place_that_makes_no_sense_is_refused(tmp_path: Path, place: Any) -> None:
    entry = place if isinstance(place, dict) else {"saved_offsets": place}
    source = save_pieces(tmp_path, PIECES, **{NAME: entry})
    with pytest.raises(MoeLmError, match=r"0\.safetensors does not say soundly where its pieces of tensors belong"):
        source.shape(NAME)


def test_tensors_are_filled_a_piece_at_a_time_and_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.checkpoint.safetensors_file.PIECE_BYTES", 40)
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    folder = write.save(tmp_path, 1, {"model.a": weight, "model.b": torch.tensor(3.5)}, {})
    source = read.open_tensors(folder)
    assert [len(rows) for rows in read.pieces(source, "model.a")] == [2, 2, 2, 1]
    filled = {"model.a": torch.zeros(7, 5, dtype=torch.bfloat16), "model.b": torch.zeros(())}
    read.load_weights(folder, filled)
    assert torch.equal(filled["model.a"], weight.bfloat16())
    assert float(filled["model.b"]) == 3.5


def test_pieces_of_whole_rows_are_read_straight_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rows of it, from several files; no other tensor is made on the way."""
    source = save_pieces(tmp_path, {(0, 0): WHOLE[:1], (1, 0): WHOLE[1:3], (3, 0): WHOLE[3:]})
    assert source.shape(NAME) == (4, 6, 3)
    monkeypatch.setattr(source, "rows", None)
    for start, stop in ((0, 4), (1, 3), (2, 4), (3, 3)):
        out = torch.zeros(stop - start, 6, 3)
        assert source.read_into(NAME, out, (slice(start, stop), slice(0, 6), slice(0, 3)))
        assert torch.equal(out, WHOLE[start:stop])
    (tmp_path / checkpoint.MODEL / "1.safetensors").unlink()
    with pytest.raises(MoeLmError, match=r"cannot read .*1\.safetensors"):
        source.read_into(NAME, torch.zeros(4, 6, 3), (slice(0, 4), slice(0, 6), slice(0, 3)))


@pytest.mark.parametrize(
    ("out", "box"),
    [
        (torch.zeros(4, 3, 3), (slice(0, 4), slice(0, 3), slice(0, 3))),  # a part of each row
        (torch.zeros(4, 6, 3, dtype=torch.bfloat16), (slice(0, 4), slice(0, 6), slice(0, 3))),
        (torch.zeros(6, 4, 3).transpose(0, 1), (slice(0, 4), slice(0, 6), slice(0, 3))),
    ],
)
def test_rows_that_memory_has_otherwise_are_not_read_straight_into_it(tmp_path: Path, out: Tensor, box: Any) -> None:
    assert not save_pieces(tmp_path, {(0, 0): WHOLE}).read_into(NAME, out, box)
    assert not out.any()


def test_rows_that_no_file_has_are_an_error(tmp_path: Path) -> None:
    """Two pieces overlap and others are missing: the elements are as many as they should be."""
    places = {(0, 0): WHOLE[:2], (1, 0): WHOLE[:1], (3, 0): WHOLE[3:]}
    with pytest.raises(MoeLmError, match=f"holds only a part of tensor {NAME}"):
        save_pieces(tmp_path, places).read_into(NAME, torch.zeros(2, 6, 3), (slice(2, 4), slice(0, 6), slice(0, 3)))
