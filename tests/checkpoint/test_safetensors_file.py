"""One safetensors file: the library reads what is written, and a header is refused before anything is allocated."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lm.checkpoint.safetensors_file import ALIGNMENT, Output, read_header, write_file
from moe_lm.common.errors import MoeLmError

MODEL = "model.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the tensors `norm` [32] and `query` [4, 8]."""
    save_file({"norm": torch.ones(32), "query": torch.ones(4, 8)}, tmp_path / MODEL, {"format": "pt"})
    return tmp_path / MODEL


def refusal(path: Path) -> str:
    with pytest.raises(MoeLmError) as raised:
        read_header(path)
    assert f"{path} is not a sound safetensors file: " in str(raised.value)
    return str(raised.value)


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    """Mixed data types, sizes that are no multiple of another, an empty tensor."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, generator=draw).bfloat16(), "b": torch.randn(5, 7, generator=draw),
        "c": torch.randn(1, generator=draw).half(), "d": torch.zeros(0, 4), "e": torch.randn(2, 2, 3, generator=draw),
    }  # fmt: skip
    outputs = [Output(name, tuple(t.shape), t.dtype, lambda t=t: iter(t.split(1))) for name, t in tensors.items()]
    write_file(tmp_path / MODEL, outputs, {"format": "pt"})
    found = load_file(tmp_path / MODEL)
    header = read_header(tmp_path / MODEL)
    assert found.keys() == tensors.keys() == header.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(header.tensors[name].rows(0, len(tensor)), tensor)
        assert header.tensors[name].start % tensor.element_size() == 0
    assert min(stored.start for stored in header.tensors.values()) % ALIGNMENT == 0


def entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["norm"].update(values)


def empty(shape: list[int]) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update(empty={"dtype": "F32", "shape": shape, "data_offsets": [0, 0]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header["query"].update(data_offsets=[112, 240]), "invalid offset for tensor"),  # they overlap
        (lambda header: header.pop("norm"), "invalid offset for tensor"),  # a hole
        (entry(shape=[64]), "invalid shape, data type, or offset"),
        (entry(shape=[-8, -4]), "expected usize"),
        (entry(shape=[1 << 62, 1 << 62]), "overflow computing buffer size"),
        (empty([0, 1 << 48]), "tensor empty has more than 16 dimensions, or one of 2**48 rows"),
        (empty([0] * 17), "tensor empty has more than 16 dimensions"),
        (entry(dtype="F31"), "unknown variant `F31`"),
        (lambda header: header["norm"].pop("data_offsets"), "missing field `data_offsets`"),
    ],
)
def test_header_that_contradicts_itself(path: Path, change: Any, said: str) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (1 << 62, f"its header has {1 << 62} bytes, expected at most "),
        (150_000_000, "its header has 150000000 bytes, expected at most 100000000"),
        (40_000_000, "its header has 40000000 bytes, expected at most 19999992"),
    ],
)
def test_absurd_header_length_allocates_nothing(path: Path, length: int, said: str) -> None:
    raw = path.read_bytes()
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + raw[8:])
        if length < 1 << 40:
            file.truncate(length * 2 if length > 100_000_000 else length // 2)
    tracemalloc.start()
    assert said in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda raw: raw[:-1], "file not fully covered"),
        (lambda raw: raw + b"x", "file not fully covered"),
        (lambda raw: raw[:40], "bytes, expected at most 32"),
        (lambda raw: raw[:4], "bytes, expected at most 0"),
        (lambda raw: b"", "header too small"),
    ],
)
def test_file_that_is_cut_off_or_goes_on(path: Path, content: Any, said: str) -> None:
    path.write_bytes(content(path.read_bytes()))
    assert said in refusal(path)


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"a":{},"a":{}}', b"[" * 100_000, b'{"__metadata__":{"a":1}}'])
def test_header_that_is_not_a_table(path: Path, text: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refusal(path)


def test_only_a_regular_file_is_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    for name, said in (
        ("link", "is a symbolic link"),
        ("absent", "No such file"),
        (".", "it is not a regular file"),
    ):
        with pytest.raises(MoeLmError, match=said):
            read_header(tmp_path / name)
