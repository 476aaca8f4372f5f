"""Documents of `prepare`, from plain or compressed text and JSON lines, and their tokens.

The first line of an input is the suffix of its file's name.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from moe_lm.config.data import SourceConfig
from moe_lm.text.files import UNREADABLE, Report, zstd
from moe_lm.text.sources import read_documents
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_json

ROOT = Path(__file__).parents[3]
TEXT = "The sky is blue.\n\nSnow is white; 中文也可以。\r\n\tdef f(x):\n\t\treturn x\n".encode()
LINES = b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in ("One.", "Two \u4e2d.", "a" * 999))
Convert = Callable[[bytes], bytes]
PACKED: dict[str, tuple[Convert, Convert]] = {
    "": (bytes, bytes),
    ".gz": (gzip.compress, gzip.decompress),
    ".xz": (lzma.compress, lzma.decompress),
}
if zstd is not None:
    PACKED[".zst"] = (zstd.compress, zstd.decompress)


def prepare(folder: Path) -> Read:
    tokenizer = Tokenizer.load(ROOT / "tokenizer" / "tiny")

    def read(data: bytes) -> None:
        kind, suffix, content = split(data)
        file = folder / f"file{kind}{suffix}"
        file.write_bytes(content)
        for document in read_documents(SourceConfig(name="fuzz", path=str(file)), Report()):
            tokenizer.encode_batch([document.text])

    return read


def split(data: bytes) -> tuple[str, str, bytes]:
    """The kind of file, its compression and its content."""
    name, _, content = data.partition(b"\n")
    kind, suffix = (".jsonl" if b"jsonl" in name else ".json" if b"json" in name else ".txt"), name[-4:].strip()
    return kind, next((known for known in PACKED if known and suffix.endswith(known.encode())), ""), content


def seeds() -> list[bytes]:
    return [
        f"{kind}{suffix}\n".encode() + pack(content)
        for kind, content in ((".txt", TEXT), (".jsonl", LINES), (".json", LINES))
        for suffix, (pack, _) in PACKED.items()
    ] + [b".txt.gz\n" + gzip.compress(TEXT + b"a" * (17 << 20)), b".txt\n" + TEXT * 2000]


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    kind, suffix, content = split(data)
    pack, unpack = PACKED[suffix]
    name = f"{kind}{suffix}\n".encode()
    try:
        plain = unpack(content) if len(content) < 10_000 and draw.randrange(3) else None
    except (*UNREADABLE, ValueError):
        plain = None
    if plain is None or len(plain) > 1 << 20:
        return name + mutate_bytes(draw, content, seeds)
    lines = plain.splitlines(keepends=True)
    if kind != ".txt" and lines and draw.randrange(2):
        number = draw.randrange(len(lines))
        lines[number] = mutate_json(draw, lines[number], seeds) + b"\n"
        return name + pack(b"".join(lines))
    return name + pack(mutate_bytes(draw, plain, seeds))


# A few bytes may decompress to many, which count: to lines of 16 MiB, of which `tokenizers` encodes 4 Mi characters at
# once, at 100 bytes each.
READER = Reader("documents", prepare, seeds, mutate, seconds=20, memory=512 << 20, inputs_in_ci=100)
