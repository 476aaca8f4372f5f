"""What every test may ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moe_lm.config_file import dump_config
from moe_lm.tokenization import Tokenizer

if TYPE_CHECKING:
    from moe_lm.model.transformer import LanguageModel

SaveRun = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the project; a test that needs it is skipped where it is absent."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """1024 ids, trained on the Python standard library."""
    return Tokenizer.load(Path(__file__).parents[1] / "tokenizer" / "tiny")


@pytest.fixture
def save_run(tmp_path: Path, tiny_tokenizer: Tokenizer) -> SaveRun:
    """Makes a run folder with one checkpoint of a model, as training leaves it."""
    from moe_lm.train import checkpoint

    def save(model: LanguageModel, config: str = "") -> Path:
        run = tmp_path / "run"
        tiny_tokenizer.save(tmp_path / "tokenizer")
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        files = {
            "config.yaml": config,
            "model.yaml": dump_config(model.config),
            "trainer.json": "{}",
            "tokenizer": tmp_path / "tokenizer",
        }
        checkpoint.save(run / "checkpoints", 1, state, files)
        return run

    return save


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
