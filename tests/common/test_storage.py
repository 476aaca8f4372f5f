"""Files in stores: what fsspec has in this process (`memory://`, `file://`), and an S3 that does not answer."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.integrity import entry_of_bytes
from moe_lm.common.storage import MissingError, RefusedError, StorageError


@pytest.fixture(params=["memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder in a store."""
    yield f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/store"
    MemoryFileSystem.store.clear()


@pytest.fixture
def in_memory() -> Iterator[str]:
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/b.jsonl.zst", "s3://bucket/a/b.jsonl.zst"),
        ("gs://bucket", "gs://bucket"),
        ("hf://datasets/owner/name/data", "hf://datasets/owner/name/data"),
        ("file:///tmp/x", "file:///tmp/x"),
        ("memory://x", "memory://x"),
        ("runs/mine", None),
        ("/runs/s3:/mine", None),
        ("C:/runs", None),
        ("owner/name@main", None),
    ],
)
def test_a_url_is_known_as_text_and_as_a_path_that_has_lost_a_slash(text: str, url: str | None) -> None:
    assert storage.url_of(text) == storage.url_of(Path(text)) == url
    assert storage.text_of(Path(text)) == text
    assert storage.is_remote(text) == (url is not None)


def test_what_is_written_is_listed_with_its_size_and_read_back(folder: str, tmp_path: Path) -> None:
    assert storage.find(folder) == []
    storage.write_bytes(f"{folder}/a/one.txt", b"first\nsecond\n")
    (tmp_path / "here").write_bytes(b"x" * 5000)
    storage.upload(tmp_path / "here", f"{folder}/a/b/two.bin")
    found = storage.find(folder)
    assert [(item.name, item.size) for item in found] == [("a/b/two.bin", 5000), ("a/one.txt", 13)]
    assert [item.name for item in storage.find(found[1].url)] == ["one.txt"]
    assert [item.name for item in storage.glob(f"{folder}/a/*.txt")] == ["one.txt"]
    assert [item.url for item in storage.glob(f"{folder}/**/two*")] == [found[0].url]
    assert storage.sizes([Path(item.url) for item in found] + [tmp_path / "here"]) == [5000, 13, 5000]
    with storage.open_binary(found[1].url) as file:
        assert (file.readline(), file.seek(0), file.read()) == (b"first\n", 0, b"first\nsecond\n")
    assert storage.read_range(found[1].url, 6, 9) == b"sec"
    storage.fetch(Path(found[0].url), tmp_path / "deep" / "two.bin", entry_of_bytes(b"x" * 5000))
    assert (tmp_path / "deep" / "two.bin").read_bytes() == b"x" * 5000
    storage.remove([found[0].url, f"{folder}/never", found[1].url])
    assert not storage.exists(found[0].url)
    assert storage.find(folder) == []


def test_what_is_not_there_is_said_and_is_no_file_of_ours(folder: str, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"cannot read \w+://.*/nothing: it is not there; check the address"):
        storage.read_bytes(f"{folder}/nothing")
    with pytest.raises(MissingError, match="cannot fetch"):
        storage.fetch(f"{folder}/nothing", tmp_path / "nothing")
    with pytest.raises(MissingError, match="is no longer in its store"):
        storage.sizes([f"{folder}/nothing"])
    assert not list(tmp_path.glob("nothing*"))


def test_what_was_damaged_on_the_way_never_appears(in_memory: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{in_memory}/x", b"content")
    with pytest.raises(StorageError, match=r"memory://bucket/x does not have the checksum .* upload it again"):
        storage.fetch(f"{in_memory}/x", tmp_path / "x", entry_of_bytes(b"CONTENT"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (PermissionError("Forbidden"), RefusedError, "the store refuses it (Forbidden); check the credentials"),
        (TimeoutError(), StorageError, "the store does not answer as it should (TimeoutError)"),
        (OSError(5, "Internal\nerror"), StorageError, "does not answer as it should ([Errno 5] Internal)"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
        (OSError(errno.EACCES, "Denied", "/here"), OSError, "/here"),
    ],
)
def test_what_a_client_raises_becomes_a_sentence_unless_it_is_of_the_disk_here(
    in_memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception, kind: type, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise failure

    tries: list[int] = []
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    monkeypatch.setattr(storage, "OF_FOLDERS", ())
    with pytest.raises(kind) as raised:
        storage.fetch(f"{in_memory}/x", tmp_path / "x")
    assert message in str(raised.value).replace("\n", " ")
    assert len(tries) == (storage.ATTEMPTS if kind is StorageError else 1)


def test_a_store_that_answers_at_the_second_attempt_is_enough(in_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers = MemoryFileSystem.cat_file, iter([TimeoutError("slow"), None])

    def cat_file(store: MemoryFileSystem, *args: Any, **kwargs: Any) -> bytes:
        if (failure := next(answers)) is not None:
            raise failure
        return bytes(real(store, *args, **kwargs))

    storage.write_bytes(f"{in_memory}/x", b"content")
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert storage.read_bytes(f"{in_memory}/x") == b"content"


def test_a_stream_that_breaks_off_is_an_error_and_no_end_of_the_file(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def read(self, count: int) -> bytes:
            raise ConnectionResetError("reset by peer")

        def close(self) -> None: ...

    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: Broken())
    with storage.open_binary(f"{in_memory}/x") as file, pytest.raises(StorageError, match=r"reset by peer"):
        file.read()


def test_a_folder_that_cannot_be_written_is_said_with_the_setting(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.check_writable(f"{in_memory}/run", "checkpoint.upload_to")
    assert storage.find(in_memory) == []

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(RefusedError, match=r"^checkpoint.upload_to=memory://bucket/run: cannot write .*AccessDenied"):
        storage.check_writable(f"{in_memory}/run", "checkpoint.upload_to")


def test_a_store_that_nobody_knows_or_that_needs_a_package_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="fsspec knows no store nope://"):
        storage.read_bytes("nope://bucket/x")
    pytest.importorskip("fsspec")
    with pytest.raises(MoeLmError, match="gcsfs"):
        storage.read_bytes("gs://bucket/x")


def test_an_s3_that_is_not_there_is_a_sentence_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="pip install s3fs")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0)
    with pytest.raises(StorageError, match="cannot list s3://bucket/x: the store does not answer as it should"):
        storage.find("s3://bucket/x")


def test_a_file_that_is_gone_here_is_not_missed_in_the_store(folder: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        storage.upload(tmp_path / "gone", f"{folder}/there")
