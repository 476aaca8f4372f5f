"""A checkpoint's manifest, signed anew so that what it says is believed, and the files that it names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from moe_lm.checkpoint import checkpoint, write
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_json

FILES = {"config.yaml": "a: 1\n", "model.yaml": "b: 2\n", "trainer.json": '{"step": 7}'}


def _save(folder: Path) -> Path:
    state = {"model.weight": torch.ones(4, 2), "exp_avg.weight": torch.zeros(4, 2)}
    return write.save(folder / "checkpoints", 7, state, FILES)


def prepare(folder: Path) -> Read:
    saved = _save(folder)

    def read(data: bytes) -> None:
        (saved / checkpoint.MANIFEST).write_bytes(data)
        (saved / checkpoint.COMPLETE).write_text(hashlib.sha256(data).hexdigest() + "\n")
        checkpoint.verify(saved)
        checkpoint.read_section(saved, "config.yaml")

    return read


def seeds() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return [(_save(Path(folder)) / checkpoint.MANIFEST).read_bytes()]


READER = Reader("manifest", prepare, seeds, mutate_json, inputs_in_ci=50)
