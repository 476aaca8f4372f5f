"""Token files as other programs write them, byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Documents = Sequence[Sequence[int]]
MEGATRON_CODES = {"int32": 4, "int64": 5, "uint16": 8}


def megatron(path: Path, documents: Documents, dtype: str = "uint16", sequences_each: int = 1) -> Path:
    """Megatron's preprocess_data: a document may be several sequences, which the index counts."""
    sequences = [list(part) for ids in documents for part in np.array_split(ids, sequences_each)]
    lengths = np.array([len(part) for part in sequences], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    bounds = np.arange(len(documents) + 1, dtype="<i8") * sequences_each
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(sequences), len(bounds))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    np.array(stream(sequences), dtype).tofile(path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def datatrove(path: Path, documents: Documents, size: int = 2) -> Path:
    """datatrove's DocumentTokenizer."""
    ids = stream(documents)
    path.write_bytes(struct.pack(f"<{len(ids)}{'H' if size == 2 else 'I'}", *ids))
    ends = np.cumsum([len(document) for document in documents])
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    path.with_name(f"{path.name}.metadata").write_text(f"gpt2|{size}\n{len(ids)}\n{len(ids)} T")
    return path


def flat(path: Path, documents: Documents, dtype: str = "uint16") -> Path:
    """nanoGPT's prepare.py (.bin), and dolma's memory maps (.npy), which have no header."""
    ids = stream(documents)
    np.memmap(path, dtype, "w+", shape=(len(ids),))[:] = ids
    return path


def numpy(path: Path, documents: Documents, dtype: str = "uint16") -> Path:
    np.save(path, np.array(stream(documents), dtype))
    return path


def llm_c(path: Path, documents: Documents) -> Path:
    """llm.c and modded-nanogpt."""
    ids = stream(documents)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return path


def stream(documents: Documents) -> list[int]:
    return [int(id_) for document in documents for id_ in document]


WRITERS: dict[str, Callable[[Path, Documents], Path]] = {
    "corpus_text_document.bin": megatron,
    "00000_shuffled.ds": datatrove,
    "part-0.npy": flat,
    "saved.npy": numpy,
    "train.bin": flat,
    "fineweb_train_000001.bin": llm_c,
}
