"""Token files of other programs: which a path names, where their tokens lie, and what is refused in one sentence."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_lm.common.errors import UsageError
from moe_lm.data.token_files import Located, find, locate, with_held_out
from tests.data import writers

VOCABULARY = 1024
EOS = 1
DOCUMENTS = [[*range(10 * number, 10 * number + 3 + number % 5), EOS] for number in range(1, 40)]
IDS = writers.stream(DOCUMENTS)
ENDS = np.cumsum([len(document) for document in DOCUMENTS]).tolist()


def ends_of(located: Located) -> list[int] | None:
    return None if located.ends is None else [int(end) for part in located.ends() for end in part]


@pytest.mark.parametrize("name", writers.WRITERS)
def test_the_tokens_of_every_kind_of_file_are_found(name: str, tmp_path: Path) -> None:
    located = locate(writers.WRITERS[name](tmp_path / name, DOCUMENTS), None, VOCABULARY)
    assert located.file()[:].tolist() == IDS
    assert located.file(5, 9)[:].tolist() == IDS[5:9]
    has_index = name.endswith(("document.bin", ".ds"))
    assert ends_of(located) == (ENDS if has_index else None)


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        (lambda path: writers.megatron(path / "a.bin", DOCUMENTS, "int32"), "uint32"),
        (lambda path: writers.megatron(path / "a.bin", DOCUMENTS, sequences_each=3), "uint16"),
        (lambda path: writers.datatrove(path / "a.ds", DOCUMENTS, size=4), "uint32"),
        (lambda path: writers.numpy(path / "a.npy", DOCUMENTS, "int32"), "uint32"),
        (lambda path: writers.flat(path / "a.bin", DOCUMENTS, "uint32"), "uint32"),
    ],
    ids=["int32", "documents of three sequences", "datatrove of 4 bytes", "npy of int32", "flat uint32"],
)
def test_ids_of_other_types_and_documents_of_several_sequences(
    write: Callable[[Path], Path], dtype: str, tmp_path: Path
) -> None:
    located = locate(write(tmp_path), np.dtype("<u4"), VOCABULARY)
    assert located.dtype.name == dtype
    assert located.file()[:].tolist() == IDS
    assert ends_of(located) in (None, ENDS)


def test_an_index_is_read_some_entries_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.data.token_files.MOST_INDEX", 7)
    for each in (1, 2):
        assert ends_of(locate(writers.megatron(tmp_path / "a", DOCUMENTS, sequences_each=each), None, 1024)) == ENDS
    assert ends_of(locate(writers.datatrove(tmp_path / "a.ds", DOCUMENTS), None, 1024)) == ENDS


def edit(path: Path, place: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(new)] = new
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


COUNT = len(DOCUMENTS)
POINTERS, BOUNDS = 34 + 4 * COUNT, 34 + 12 * COUNT  # bytes of the index


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda idx: edit(idx, 0, b"TNTIDX"), "does not begin as Megatron's index"),
        (lambda idx: cut(idx, 20), "does not begin as Megatron's index"),
        (lambda idx: edit(idx, 9, b"\2"), "has version 2, expected 1"),
        (lambda idx: edit(idx, 17, b"\5"), "has ids of type int64, expected one of uint16, int16, uint32, int32"),
        (lambda idx: edit(idx, 17, b"\x63"), "has ids of type number 99"),
        (lambda idx: edit(idx, 18, struct.pack("<Q", 1 << 60)), r"has \d+ bytes, expected \d+ for 1152921504606846976"),
        (lambda idx: edit(idx, 18, struct.pack("<QQ", 1 << 63, 1 << 63)), r"has \d+ bytes, expected \d+"),
        (lambda idx: cut(idx, -8), r"has \d+ bytes, expected \d+ for 39 sequences and 40 bounds"),
        (lambda idx: idx.write_bytes(idx.read_bytes() + bytes(COUNT)), "has modes of sequences"),
        (lambda idx: edit(idx, 34, struct.pack("<i", -5)), "has a sequence of -5 tokens"),
        (lambda idx: edit(idx, 34, struct.pack("<i", 9)), "has a sequence at byte 10 of a.bin, expected byte 18"),
        (lambda idx: edit(idx, POINTERS + 8, bytes(8)), "has a sequence at byte 0 of a.bin, expected byte 10, behind"),
        (lambda idx: edit(idx, BOUNDS + 16, struct.pack("<q", 99)), "has documents that overlap"),
        (lambda idx: edit(idx, BOUNDS + 8 * COUNT, struct.pack("<q", 99)), "from sequence 0 to 99, expected from 0"),
        (lambda idx: edit(idx, BOUNDS, struct.pack("<q", 1)), "from sequence 1 to 39, expected from 0 to 39"),
        (lambda idx: cut(idx.with_suffix(".bin"), -2), r"has \d+ uint16 ids, and a.idx counts \d+"),
        (lambda idx: cut(idx.with_suffix(".bin"), -1), "no whole number of uint16 ids"),
        (lambda idx: idx.with_suffix(".bin").unlink(), "a.bin is missing"),
    ],
)  # fmt: skip
def test_a_damaged_index_of_megatron_is_one_sentence(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = writers.megatron(tmp_path / "a.bin", DOCUMENTS)
    damage(path.with_suffix(".idx"))
    with pytest.raises(UsageError, match=message):
        locate(path, None, VOCABULARY)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ds: cut(ds, -2), "has 235 uint16 ids, and a.ds.metadata counts 236"),
        (lambda ds: cut(ds.with_name("a.ds.index"), -8), r"its documents end at \d+ by a.ds.index"),
        (lambda ds: cut(ds.with_name("a.ds.index"), -3), "ends of documents that are out of order"),
        (lambda ds: edit(ds.with_name("a.ds.index"), 8, bytes(8)), "ends of documents that are out of order"),
        (lambda ds: edit(ds.with_name("a.ds.index"), 0, b"\xff" * 8), "ends of documents that are out of order"),
        (lambda ds: ds.with_name("a.ds.metadata").write_text("gpt2"), "does not tell bytes of an id"),
        (lambda ds: ds.with_name("a.ds.metadata").write_bytes(b"\xff|8\n7"), "does not tell bytes of an id"),
    ],
)  # fmt: skip
def test_files_of_datatrove_that_do_not_belong_together(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = writers.datatrove(tmp_path / "a.ds", DOCUMENTS)
    damage(path)
    with pytest.raises(UsageError, match=message):
        locate(path, None, VOCABULARY)


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            locate(path, None, VOCABULARY)

    for size in (-2, -1):
        cut(path := writers.llm_c(tmp_path / "a.bin", DOCUMENTS), size)
        refused(path, "has .* bytes, and its header counts 236 uint16 ids")
    edit(writers.llm_c(path, DOCUMENTS), 8, struct.pack("<i", -1))
    refused(path, "its header counts -1")
    cut(path := writers.numpy(tmp_path / "a.npy", DOCUMENTS), -2)
    refused(path, "has 235 ids, and its header counts 236")
    cut(writers.numpy(path, DOCUMENTS), 40)
    refused(path, "its header is damaged")
    refused(writers.numpy(path, DOCUMENTS, "int64"), "has ids of type int64")
    refused(writers.numpy(path, DOCUMENTS, ">u2"), "has ids of type big-endian uint16")
    np.save(path, np.zeros((3, 4), np.uint16))
    refused(path, r"is an array with axes \(3, 4\)")
    refused(writers.flat(tmp_path / "wide.bin", DOCUMENTS, "uint32"), "holds ids of 4 bytes.*set dtype=uint32")


def test_a_folder_a_glob_a_file_and_the_prefix_of_megatron_name_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = {name: write(tmp_path / "in" / name, DOCUMENTS) for name, write in writers.WRITERS.items()}
    (tmp_path / "in" / "meta.pkl").write_bytes(b"")
    (tmp_path / "in" / ".hidden.bin").write_bytes(b"")
    everything = sorted(files.values())
    assert find(str(tmp_path / "in")) == everything
    assert find(str(tmp_path / "*" / "*")) == everything
    for name in ("corpus_text_document", "corpus_text_document.idx", "corpus_text_document.bin"):
        assert find(str(tmp_path / "in" / name)) == [files["corpus_text_document.bin"]]
    (tmp_path / "in" / "rows.jsonl").write_text("{}")
    for path, message in (
        (tmp_path / "nowhere", "no token file is at"), (tmp_path / "in" / "rows.jsonl", "is text or is packed"),
        (Path("s3://bucket/a.bin"), "are read where they are"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            find(str(path).replace("s3:/", "s3://"))


def test_files_that_are_named_so_are_held_out(tmp_path: Path) -> None:
    names = ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin", "train.bin", "val.bin")
    for name in names:
        (tmp_path / name).write_bytes(b"\1\0")
    train, held_out = with_held_out(str(tmp_path))
    assert [file.name for file in train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "train.bin"]
    assert [file.name for file in held_out] == ["fineweb_val_000000.bin", "val.bin"]
    assert with_held_out(str(tmp_path / "train.bin")) == ([tmp_path / "train.bin"], [tmp_path / "val.bin"])
    assert with_held_out(str(tmp_path / "val.bin")) == ([tmp_path / "val.bin"], [])
