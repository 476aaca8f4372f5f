"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lm.tokenization import Tokenizer


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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
