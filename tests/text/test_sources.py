import gzip
import io
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFile

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.storage import StorageError
from moe_lm.config.data import SourceConfig
from moe_lm.text.files import zstd
from moe_lm.text.sources import Document, Report, read_documents, source_files
from tests.data.rows import write

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def read(path: Path | str, **settings: Any) -> tuple[list[Document], Report]:
    report = Report()
    documents = list(read_documents(SourceConfig(name="s", path=str(path), **settings), report))
    return documents, report


def texts(path: Path | str, **settings: Any) -> list[str]:
    return [document.text for document in read(path, **settings)[0]]


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["folder", "store"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "两句话。\r\nsecond line\n".encode()),
        ("a.jsonl", b'{"text": "\\u4e24\\u53e5\\u8bdd\\u3002\\r\\nsecond line\\n"}\n'),
        ("a.json", b'[{"text": "\\u4e24\\u53e5\\u8bdd\\u3002\\r\\nsecond line\\n"}]'),
        ("a.parquet", parquet(text=["两句话。\r\nsecond line\n"])),
    ],
)
def test_every_format_gives_the_same_text_compressed_or_not(
    tmp_path: Path, name: str, content: bytes, compression: str, place: str
) -> None:
    path = (
        str(tmp_path / (name + compression)) if place == "folder" else f"memory://{tmp_path.name}/{name}{compression}"
    )
    storage.write_bytes(f"file://{path}" if place == "folder" else path, COMPRESS[compression](content))
    assert texts(path) == ["两句话。\r\nsecond line\n"]


def test_a_folder_and_a_glob_in_a_store_have_the_documents_of_the_same_folder_here(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "deep/c.txt", ".hidden/d.txt", ".e.txt", "picture.jpg"):
        content = b'{"text": "row"}' if name.endswith("l") else f"text of {name}".encode()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        storage.write_bytes(f"memory://folder/{name}", content)
    assert read("memory://folder") == read(tmp_path)
    assert read("memory://folder/*.txt")[0] == read(f"{tmp_path}/*.txt")[0]
    assert read("memory://folder/**/*.txt")[0] == read(f"{tmp_path}/**/*.txt")[0]
    with pytest.raises(UsageError, match=r"source 's': path memory://nowhere matches no file to read"):
        read("memory://nowhere")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_a_store_that_dies_while_it_is_read_ends_the_reading(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is left out in silence would make other shards."""
    content = parquet(text=["x" * 100]) if name.endswith("parquet") else b'{"text": "x"}\n' * 100
    storage.write_bytes(
        f"memory://{name}", COMPRESS[Path(name).suffix if name.endswith(("gz", "zst")) else ""](content)
    )

    def die(*_: Any) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(MemoryFile, "read", die)
    with pytest.raises(StorageError, match=rf"cannot read memory://{name}: .*reset by peer"):
        texts(f"memory://{name}")


def test_a_folder_is_read_in_path_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.py", "B.rst", ".hidden.txt", ".git/config.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, report = read(tmp_path)
    assert [document.id for document in documents] == ["B.rst", "a/b.py", "a/z.md", "b.txt"]
    assert [document.text for document in documents] == [document.id for document in documents]
    assert report.skipped == {"unknown kind of file": 1}
    assert report.examples == {"unknown kind of file": "picture.png"}


def test_a_glob_names_documents_from_its_first_fixed_folder(tmp_path: Path) -> None:
    for name in ("x/b.txt", "x/deep/a.txt", "y.txt", "x/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    documents, _ = read(tmp_path / "**" / "*.txt")
    assert [document.id for document in documents] == ["x/b.txt", "x/deep/a.txt", "y.txt"]


def test_a_long_text_comes_in_pieces_that_join_to_the_whole(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}.\n" + "words and words\n" * 40 + "\n" for number in range(1000)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    documents, _ = read(tmp_path / "book.txt")
    assert "".join(document.text for document in documents) == "".join(paragraphs)
    assert [document.id for document in documents[:3]] == ["book.txt", "book.txt#1", "book.txt#2"]
    assert all(64 << 10 <= len(document.text) < (64 << 10) + 1000 for document in documents[:-1])
    assert all(document.text.startswith("Paragraph ") for document in documents)


def test_a_text_without_blank_lines_is_cut_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("x" * 99 + "\n" + ("y" * 99 + "\n") * 10_000)
    assert max(map(len, texts(tmp_path))) < 300_000


def test_rows_are_named_by_their_text(tmp_path: Path) -> None:
    """Equal texts fall on the same side of the split, and a row added in front renames none."""
    one, _ = read(write(tmp_path / "a.jsonl", [{"text": "same"}, {"text": "other"}, {"text": "same"}]))
    two, _ = read(write(tmp_path / "b.jsonl", [{"text": "new"}, {"text": "same"}]))
    assert one[0].id == one[2].id == two[1].id != one[1].id


@pytest.mark.parametrize(
    ("content", "expected", "skipped"),
    [
        ('[{"text": "one"}, {"text": "two"}]', ["one", "two"], {}),
        ('\ufeff[\n  {"text": "one"},\n  {"text": "two"}\n]\n', ["one", "two"], {}),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"], {}),
        ('{\n  "title": "t",\n  "text": "one"\n}\n', ["one"], {}),
        ('[\n {"text": "one"},\n {"text": "tw', [], {"broken JSON": 1}),
    ],
)
def test_a_json_file_may_be_an_array_lines_or_one_object(
    tmp_path: Path, content: str, expected: list[str], skipped: dict[str, int]
) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    (tmp_path / "b.txt").write_text("good")
    documents, report = read(tmp_path)
    assert ([document.text for document in documents], report.skipped) == ([*expected, "good"], skipped)


def test_a_json_file_too_large_to_parse_whole_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.text.files.MAX_JSON_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * (1 << 20)}]))
    with pytest.raises(UsageError, match=r"\.json file over 1 MiB, convert it to \.jsonl"):
        read(tmp_path)


BAD_ROWS = [
    (b'{"text": "broken"', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'{"text": 1' + b"0" * 10_000 + b"}", "broken JSON"),
    (b'["a list"]', "row is not an object"),
    (b'{"title": "no text"}', "no field 'text'"),
    (b'{"text": null}', "field 'text' is not text"),
    (b'{"text": ["a"]}', "field 'text' is not text"),
    (b'{"text": ""}', "empty document"),
    (b'{"text": " \\n "}', "empty document"),
    (b'{"text": "a\\u0000b"}', "NUL byte"),
    (b'{"text": "a\0b"}', "NUL byte"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "invalid UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS)
def test_a_bad_row_is_skipped_counted_and_named(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n' + line)
    documents, report = read(tmp_path / "a.jsonl")
    assert [document.text for document in documents] == ["first", "last"]
    assert report.skipped == {reason: 2}
    assert report.examples[reason].startswith("a.jsonl:3")
    assert (report.documents, report.text_bytes) == (2, 9)


def test_a_missing_field_is_reported_with_the_fields_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"title": "t", "content": "c"}])
    with pytest.raises(UsageError, match=r"no usable document: 1 skipped: no field 'text' \(first: a.jsonl:1, which"):
        read(path)
    assert texts(path, text_field="content") == ["c"]


@pytest.mark.parametrize(
    ("content", "reason", "where"),
    [
        (b"", "empty document", "bad.txt:1"),
        (b"\n \n", "empty document", "bad.txt:1"),
        (b"fine\nfine\n\xff\xfe\n", "invalid UTF-8", "bad.txt:3"),
        (b"a\0b", "NUL byte", "bad.txt:1"),
    ],
)
def test_a_bad_text_file_is_skipped_counted_and_named(tmp_path: Path, content: bytes, reason: str, where: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    documents, report = read(tmp_path)
    assert [document.id for document in documents] == ["good.txt"]
    assert report.skipped == {reason: 1}
    assert report.examples == {reason: where}


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_file_is_counted_and_the_next_one_read(
    tmp_path: Path, kind: str, compression: str, damage: str
) -> None:
    content = b"".join(b'{"text": "row %d"}\n' % number for number in range(20_000))
    data = COMPRESS[compression](content)
    path = tmp_path / f"a.{kind}{compression}"
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"garbage")
    (tmp_path / "b.txt").write_text("good")
    documents, report = read(tmp_path)
    assert documents[-1] == Document("b.txt", "good")
    assert report.skipped["unreadable file"] == 1
    assert report.examples["unreadable file"].startswith(path.name)


def test_concatenated_compressed_files_are_read_whole(tmp_path: Path) -> None:
    for suffix, compress in list(COMPRESS.items())[1:]:
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one\n") + compress(b"two\n"))
        assert texts(path) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_of_100_megabytes_is_passed_over_in_bounded_memory(tmp_path: Path, name: str) -> None:
    with open(tmp_path / name, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    documents, report = read(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert report.skipped == {"line over 16 MiB": 1}
    assert report.examples == {"line over 16 MiB": f"{name}:2"}
    assert "".join(document.text for document in documents).endswith("after" if name == "a.jsonl" else 'after"}\n')


def test_parquet_is_read_row_by_row_with_bad_ones_counted(tmp_path: Path) -> None:
    strings = pyarrow.array([b"good", b"\xff", None, b"also good"]).view(pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(4, *strings.buffers()[1:], strings.buffers()[0])
    (tmp_path / "a.parquet").write_bytes(parquet(text=column, other=[1, 2, 3, 4]))
    documents, report = read(tmp_path / "a.parquet")
    assert [document.text for document in documents] == ["good", "also good"]
    assert report.skipped == {"invalid UTF-8": 1, "field 'text' is not text": 1}
    assert report.examples["invalid UTF-8"] == "a.parquet:2"


@pytest.mark.parametrize(
    ("column", "reason"), [({"title": ["a", "b"]}, "no field 'text'"), ({"text": [1, 2]}, "field 'text' is not text")]
)
def test_parquet_without_a_text_column_is_counted_once(tmp_path: Path, column: dict[str, Any], reason: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(**column))
    (tmp_path / "b.parquet").write_bytes(parquet(text=["good"]))
    documents, report = read(tmp_path)
    assert ([document.text for document in documents], report.skipped) == (["good"], {reason: 1})


def test_a_data_set_folder_is_read_through_datasets(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"body": "one"}, {"body": ""}, {"body": "two"}])
    report = Report()
    source = SourceConfig(name="s", dataset=str(tmp_path), text_field="body")
    assert [document.text for document in read_documents(source, report)] == ["one", "two"]
    assert report.skipped == {"empty document": 1}


def test_a_data_set_that_does_not_exist_is_named(tmp_path: Path) -> None:
    source = SourceConfig(name="s", dataset=str(tmp_path / "nowhere"))
    with pytest.raises(MoeLmError, match=r"source 's': data set .*nowhere .* cannot be read"):
        list(read_documents(source, Report()))


def test_the_standard_library_is_its_modules_without_tests() -> None:
    source = SourceConfig(name="s", stdlib=True)
    documents = {document.id: document.text for document in read_documents(source, Report())}
    assert documents["json/decoder.py"] == Path(json.__file__).with_name("decoder.py").read_text()
    assert documents["pydoc_data/topics/lambda"].startswith("Lambdas\n*******\n")
    parts = {part for name in documents for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert all(name.endswith(".py") or name.startswith("pydoc_data/topics/") for name in documents)


def test_max_bytes_stops_a_source_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    """It is each source's own when a report is shared."""
    source = SourceConfig(name="s", path=str(write(tmp_path / "a.jsonl", [{"text": "x" * 10}] * 9)), max_bytes=35)
    report = Report()
    assert [len(list(read_documents(source, report))) for _ in range(3)] == [4, 4, 4]
    assert report.text_bytes == 120


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "does not exist"), ("*.txt", "matches no file"), ("empty", "matches no file"), ("blank.txt", "empty")],
)
def test_a_source_without_text_is_refused_by_name(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").touch() if path == "blank.txt" else None
    with pytest.raises(UsageError, match=f"source 's'.*{message}"):
        read(tmp_path / path)


def test_zstd_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"text"))
    monkeypatch.setattr("moe_lm.text.files.zstd", None)
    with pytest.raises(UsageError, match=r"pip install backports\.zstd"):
        read(tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="needs a file system that takes any bytes as a name")
def test_a_file_name_that_is_not_utf8_is_written_out(tmp_path: Path) -> None:
    Path(bytes(tmp_path).decode() + "/bad\udcff.txt").write_text("text")
    assert source_files(SourceConfig(name="s", path=str(tmp_path)))[0][0] == "bad\\xff.txt"


def test_real_text_in_two_languages(shared_data: Path) -> None:
    documents, report = read(shared_data / "text" / "*zh.jsonl.xz", max_bytes=3_000_000)
    assert not report.skipped
    assert report.text_bytes == sum(len(document.text.encode()) for document in documents)
    assert len(texts(shared_data / "text" / "tinyshakespeare.txt.xz")) == 17


def test_a_text_that_ends_with_a_whole_piece_has_no_empty_document(tmp_path: Path) -> None:
    """Nor has a file of nothing but a line that is too long."""
    (tmp_path / "a.txt").write_text(("word " * 20 + "\n") * 800 + "\n")
    report = Report()
    assert len(list(read_documents(SourceConfig(name="a", path=str(tmp_path / "a.txt")), report))) == 1
    assert report.skipped == {}
    (tmp_path / "b.txt").write_bytes(b"b" * (17 << 20))
    with pytest.raises(UsageError):
        list(read_documents(SourceConfig(name="b", path=str(tmp_path / "b.txt")), report))
    assert report.skipped == {"line over 16 MiB": 1}
