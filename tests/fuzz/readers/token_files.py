"""Token files of other programs, and what lies beside them: Megatron's index, datatrove's, the headers of NumPy, llm.c.

An input is the file's name, and behind each SEPARATOR the content of the file and of those beside it, by their suffix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from moe_lm.data.token_files import locate
from tests.data.writers import WRITERS
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes

SEPARATOR = b"\n--- file "
BESIDE = (".ds.index", ".ds.metadata", ".idx")
DOCUMENTS = [[*range(8, 9 + number), 1] for number in range(20)]


def prepare(folder: Path) -> Read:
    def read(data: bytes) -> None:
        name, content, *beside = data.split(SEPARATOR)
        file = folder / Path(name.decode()).name
        for old in folder.iterdir():
            old.unlink()
        file.write_bytes(content)
        for part in beside:
            suffix, _, written = part.partition(b"\n")
            file.with_name(file.stem + suffix.decode()).write_bytes(written)
        located = locate(file, None, 1024)
        for tokens in located.file().chunks():
            assert tokens.ndim == 1
        assert all(0 <= end <= located.tokens for ends in (located.ends or list)() for end in ends.tolist())

    return read


def seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [packed(write(Path(folder) / name, DOCUMENTS)) for name, write in WRITERS.items()]


def packed(path: Path) -> bytes:
    beside = [path.with_name(path.stem + suffix) for suffix in BESIDE]
    parts = [
        file.name.removeprefix(path.stem).encode() + b"\n" + file.read_bytes() for file in beside if file.is_file()
    ]
    return SEPARATOR.join([path.name.encode(), path.read_bytes(), *parts])


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """One of the files becomes another; names stay, and so do suffixes."""
    name, *files = data.split(SEPARATOR)
    number = draw.randrange(len(files))
    suffix, line, content = files[number].partition(b"\n") if number else (b"", b"", files[number])
    files[number] = suffix + line + mutate_bytes(draw, content, [content])
    return SEPARATOR.join([name, *files])


READER = Reader("token_files", prepare, seeds, mutate, inputs_in_ci=200)
