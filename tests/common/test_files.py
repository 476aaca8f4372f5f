"""A file or folder is whole under its name or not there, and a lock is held once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import read_regular, try_lock, unfinished_path, whole_file, whole_folder
from tests.processes import ROOT

HOLD = """
import sys
from pathlib import Path
from moe_lm.common.files import try_lock
lock = try_lock(Path(sys.argv[1]))
print("held" if lock else "refused", flush=True)
sys.stdin.read()
"""


def die_in_the_middle(writing: AbstractContextManager[Path]) -> None:
    with writing as path:
        (path / "a" if path.is_dir() else path).write_bytes(b"half")
        raise ZeroDivisionError


@pytest.mark.parametrize("contested", [False, True])
def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path, contested: bool) -> None:
    path = tmp_path / "file"
    with whole_file(path, contested) as written:
        written.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError):
        die_in_the_middle(whole_file(path, contested))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"new"}


def test_two_writers_of_a_contested_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path, contested=True) as one, whole_file(path, contested=True) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(ZeroDivisionError):
        die_in_the_middle(whole_folder(path))
    assert list(tmp_path.iterdir()) == []
    path.mkdir()  # an empty folder gives way
    with whole_folder(path) as written:
        assert written == unfinished_path(path)
        (written / "a").write_bytes(b"new")
    assert [file.name for file in path.iterdir()] == ["a"]


def test_a_folder_takes_no_place_that_is_taken(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with whole_folder(path):
            raise AssertionError

    (tmp_path / "file").write_bytes(b"")
    unfinished_path(tmp_path / "new").mkdir()
    with pytest.raises(UsageError, match="file exists already; give the name of a new folder, or delete it"):
        write(tmp_path / "file")
    with pytest.raises(UsageError, match=r"new\.tmp exists: another process is writing .*new, or one was killed"):
        write(tmp_path / "new")
    with pytest.raises(UsageError, match=r"cannot write to .*file: Not a directory; choose another folder"):
        write(tmp_path / "file" / "new")


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(MoeLmError, match=r"cannot write .*new: No space left"), whole_folder(tmp_path / "new"):
        raise OSError(28, "No space left on device")


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path, pipe = tmp_path / ".lock", subprocess.PIPE
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=pipe, stdout=pipe, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert try_lock(path) is None
    other.kill()
    other.communicate()
    lock = try_lock(path)
    assert lock is not None
    lock.release()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot read .*: No such file"),
        (lambda path: path.mkdir(), "cannot read .*: it is not a regular file"),
        (os.mkfifo, "cannot read .*: it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link, which is not followed"),
        (lambda path: path.symlink_to(path), "is a symbolic link, which is not followed"),
        (lambda path: path.write_bytes(b"123456789"), "has 9 bytes, expected at most 8"),
    ],
)
def test_a_file_from_elsewhere_is_opened_only_if_it_is_a_file_of_its_size(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "file")
    with pytest.raises(UsageError, match=said):
        read_regular(tmp_path / "file", 8)


def test_a_link_is_followed_within_the_repository_of_a_cache_alone(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for folder, name in ((repository / "blobs", "0123"), (repository / "refs", "0123"), (tmp_path / "blobs", "0123")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"text")
    (snapshot / "good").symlink_to("../../blobs/0123")
    assert read_regular(snapshot / "good", 8) == b"text"
    for bad in ("../../refs/0123", "../../../blobs/0123", f"{tmp_path}/blobs/0123", "../../blobs", "/etc/hostname"):
        (snapshot / "bad").unlink(missing_ok=True)
        (snapshot / "bad").symlink_to(bad)
        with pytest.raises(UsageError, match="symbolic link"):
            read_regular(snapshot / "bad", 1 << 20)
