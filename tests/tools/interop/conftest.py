"""Folders of `transformers` and runs imported from them, made once; and runs as training leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.importing import import_folder
from tests.tiny import write_run
from tests.tools.interop.folders import write_folder
from tests.tools.interop.shapes import MOE, SHAPE

Folder = Callable[[str], Path]
Save = Callable[..., Path]


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


@pytest.fixture
def save(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Save:
    """Makes a run folder with a checkpoint of a model with these settings, as training writes it."""

    def make(settings: dict[str, Any] = MOE, change: Callable[[LanguageModel], object] = lambda model: None) -> Path:
        model = LanguageModel(ModelConfig(**SHAPE | settings))
        model.initialise(0)
        change(model)
        return write_run(tmp_path / "run", model, tiny_tokenizer, step=7)

    return make
