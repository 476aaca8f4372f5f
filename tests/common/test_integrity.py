"""Checksums of files, against published ones, and what is said of a file that differs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.integrity import CHUNK_BYTES, SHA256, XXH3, Hashed, checksum_of, damage_in, entry_of, entry_of_bytes

ABC = {
    SHA256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, appendix B.1
    XXH3: "06b05ab6733a618578af5f94892f3950",  # xxhsum -H2 of the reference implementation
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"abc")
    return tmp_path / "file"


@pytest.mark.parametrize("kind", ABC)
def test_checksums_are_those_of_the_standards(path: Path, kind: str) -> None:
    assert checksum_of(path, kind) == ABC[kind]
    assert damage_in(path, {"size": 3, kind: ABC[kind]}) is None


def test_what_is_hashed_on_the_way_is_what_the_file_has(tmp_path: Path) -> None:
    pieces = [b"", b"a", bytes(range(256)) * (CHUNK_BYTES // 100), b"z" * 7]
    with (tmp_path / "file").open("wb") as raw:
        file = Hashed(raw)
        assert [file.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
    assert file.entry == entry_of(tmp_path / "file") == entry_of_bytes(b"".join(pieces))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_file_that_writes_something_else_does_not_get_its_checksum() -> None:
    class Faulty(io.BytesIO):
        def write(self, content: Any) -> int:
            return super().write(bytes(content).replace(b"b", b"x"))

    raw = Faulty()
    file = Hashed(raw)
    file.write(b"abc")
    assert raw.getvalue() == b"axc"
    assert file.entry == entry_of_bytes(b"abc")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"size": 4, XXH3: ABC[XXH3]}, "has 3 bytes, expected 4"),
        ({"size": 3, XXH3: ABC[SHA256]}, "does not have the checksum that the manifest gives"),
        ({"size": 3, SHA256: ABC[XXH3]}, "does not have the checksum that the manifest gives"),
    ],
)
def test_a_file_that_differs_is_described(path: Path, entry: dict[str, Any], said: str) -> None:
    assert damage_in(path, entry) == said
    assert damage_in(path.with_name("absent"), entry) == "is missing"


def test_a_line_without_a_known_checksum_is_an_error(path: Path) -> None:
    with pytest.raises(KeyError, match="none of xxh3_128, sha256"):
        damage_in(path, {"size": 3, "md5": "0"})
