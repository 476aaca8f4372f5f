"""Tensors, put together from the pieces that several ranks wrote: from boxes of earlier versions, and from runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, safetensors_file, write
from moe_lm.checkpoint.placement import INDEX, Plan, index_of
from moe_lm.checkpoint.safetensors_file import Output, write_file
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import open_regular
from moe_lm.parallel.logical import Piece, piece_of
from tests.tiny import tiny_model

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


def test_rows_of_parameters_are_filled_as_whole_models_are(tmp_path: Path) -> None:
    """Gate and up are one parameter, and two tensors of the checkpoint; factors of adapters are not in it."""
    whole = tiny_model(3)
    tensors = {f"model.{name}": tensor for name, tensor in whole.state_dict().items()}
    fill = read.open_weights(write.save(tmp_path, 1, tensors, {}), tensors)
    for name, parameter in whole.named_parameters():
        rows = torch.full_like(parameter, torch.nan)
        half = len(rows) // 2
        for first, part in ((0, rows[:half]), (half, rows[half:])):
            fill(name, part, first)
        assert torch.equal(rows, parameter), name
    factor = torch.ones(2, 2)
    fill("model.layers.0.self_attn.q_proj.lora_A", factor, 0)
    assert bool((factor == 1).all())


def saved_by_three(folder: Path) -> Path:
    """A checkpoint whose tensor three ranks have divided: 30 elements, 40, and 2."""
    plans = []
    (folder / checkpoint.MODEL).mkdir(parents=True)
    for rank, (start, stop) in enumerate([(0, 30), (30, 70), (70, 72)]):
        piece = piece_of(WHOLE).cut(start, stop)
        name = f"{rank}.safetensors"
        output = Output(NAME, (stop - start,), torch.float32, lambda piece=piece: iter(piece.views))
        write_file(folder / checkpoint.MODEL / name, [output], {})
        plans.append(Plan.of({name: {NAME: piece}}))
    (folder / checkpoint.MODEL / INDEX).write_text(index_of(plans))
    return folder


def test_any_elements_are_read_from_the_files_that_have_them(tmp_path: Path) -> None:
    source = read.CheckpointTensors(saved_by_three(tmp_path))
    for start, stop in ((0, 72), (29, 31), (30, 70), (31, 72), (5, 5)):
        out = torch.zeros(stop - start)
        source.read_into(NAME, out, start)
        assert torch.equal(out, WHOLE.flatten()[start:stop])
    for start, stop in ((0, 4), (1, 3), (3, 4)):
        assert torch.equal(source.rows(NAME, start, stop, slice(2, 5)), WHOLE[start:stop, 2:5])


def test_a_rank_opens_only_the_files_that_have_its_piece(tmp_path: Path) -> None:
    saved_by_three(tmp_path)
    for number in (0, 2):
        (tmp_path / checkpoint.MODEL / f"{number}.safetensors").unlink()
    source = read.CheckpointTensors(tmp_path)
    assert source.shape(NAME) == (4, 6, 3)
    piece = Piece((torch.zeros(40),), 30, (4, 6, 3))
    read.fill({NAME: piece}, source)
    assert torch.equal(piece.views[0], WHOLE.flatten()[30:70])
    with pytest.raises(MoeLmError, match=r"cannot read .*2\.safetensors: No such file"):
        source.rows(NAME, 2, 4)


def test_a_piece_in_any_memory_is_filled(tmp_path: Path) -> None:
    """Columns of a wider tensor, in another dtype, from the middle of a row to the middle of another."""
    source = read.CheckpointTensors(saved_by_three(tmp_path))
    wide = torch.zeros(4, 6, 8, dtype=torch.bfloat16)
    piece = piece_of(wide[:, :, 2:5]).cut(5, 50)
    read.fill({NAME: piece}, source)
    expected = torch.zeros(72)
    expected[5:50] = WHOLE.flatten()[5:50]
    assert torch.equal(wide[:, :, 2:5], expected.view(4, 6, 3).bfloat16())
    assert not wide[:, :, :2].any()
    assert not wide[:, :, 5:].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["files"].append("../a.safetensors"),
        lambda index: index["files"].pop(),
        lambda index: index["tensors"][NAME]["runs"].reverse(),
        lambda index: index["tensors"][NAME]["runs"][0].pop(),
        lambda index: index["tensors"][NAME].update(runs=[[0, 72, 0, 0, 0]]),
        lambda index: index["tensors"][NAME].update(runs=[[0, 36, 2, 2, 1]]),
        lambda index: index["tensors"].update({NAME: 3}),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    path = saved_by_three(tmp_path) / checkpoint.MODEL / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(MoeLmError, match=r"pieces\.json is not the index of a checkpoint; copy the checkpoint again"):
        read.CheckpointTensors(tmp_path).shape(NAME)


@pytest.mark.parametrize(("dtype", "runs"), [("F32", [[0, 36, 2, 0, 1]]), ("BF16", [[0, 72, 1, 1, 0]])])
def test_an_index_of_other_files_is_refused(tmp_path: Path, dtype: str, runs: list[list[int]]) -> None:
    path = saved_by_three(tmp_path) / checkpoint.MODEL / INDEX
    index = json.loads(path.read_text())
    index["tensors"][NAME].update(dtype=dtype, runs=runs)
    path.write_text(json.dumps(index))
    with pytest.raises(MoeLmError, match=r"elements of tensor .* in F32, where pieces\.json says that it has"):
        read.CheckpointTensors(tmp_path).rows(NAME, 0, 4)


def test_a_file_is_opened_once_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"model.{number}": torch.ones(3) for number in range(50)}
    folder, opened = write.save(tmp_path, 1, state, {}), list[Path]()
    monkeypatch.setattr(safetensors_file, "open_regular", lambda path: opened.append(path) or open_regular(path))
    read.fill(state, read.CheckpointTensors(folder))
    assert len(opened) == 2  # its header, and all that is in it


def test_what_ranks_divide_evenly_is_one_line_of_the_index() -> None:
    """512 ranks with a piece of every tensor, the last of each a shorter one; of two files a rank, the second."""
    shape, share = (511 * 40 + 7,), 40
    piece = piece_of(torch.zeros(shape))
    plans = []
    for rank in range(512):
        own = piece.cut(rank * share, min((rank + 1) * share, shape[0]))
        other = piece_of(torch.zeros(512)).cut(rank, rank + 1)
        plans.append(Plan.of({f"{rank}-1.safetensors": {"model.b": other}, f"{rank}-2.safetensors": {"model.a": own}}))
    index = json.loads(index_of(plans))
    assert index["tensors"]["model.a"]["runs"] == [[0, 40, 511, 1, 2], [511 * 40, 7, 1, 1023, 0]]
    assert index["tensors"]["model.b"]["runs"] == [[0, 1, 512, 0, 2]]
    with pytest.raises(MoeLmError, match=r"have written 510 of the 512 elements of tensor model\.b"):
        index_of([*plans[:510], *plans[511:]])


def test_rows_that_no_file_has_are_an_error(tmp_path: Path) -> None:
    """Two pieces overlap and others are missing: the elements are as many as they should be."""
    places = {(0, 0): WHOLE[:2], (1, 0): WHOLE[:1], (3, 0): WHOLE[3:]}
    with pytest.raises(MoeLmError, match=f"holds only a part of tensor {NAME}"):
        save_pieces(tmp_path, places).rows(NAME, 2, 4)
