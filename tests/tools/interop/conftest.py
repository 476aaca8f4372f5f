"""Folders of `transformers` and runs imported from them, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.importing import import_folder
from tests.tools.interop.folders import write_folder

Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Folder:
    """The folder of a variant."""
    root = tmp_path_factory.mktemp("published")

    def make(variant: str) -> Path:
        folder = root / variant.replace(" ", "-")
        return folder if folder.exists() else write_folder(folder, variant, tiny_tokenizer)

    return make


@pytest.fixture(scope="session")
def imported_run(tmp_path_factory: pytest.TempPathFactory, hf_folder: Folder) -> Folder:
    """The run of a variant's folder, taken without comparing logits."""
    root = tmp_path_factory.mktemp("imported")

    def make(variant: str) -> Path:
        run = root / variant.replace(" ", "-")
        if not run.exists():
            import_folder(hf_folder(variant), run, proof_bytes=0)
        return run

    return make
