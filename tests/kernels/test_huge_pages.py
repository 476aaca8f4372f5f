"""Memory in huge pages is memory like any other."""

from __future__ import annotations

import mmap

import pytest
import torch

from moe_lm.kernels import huge_pages
from moe_lm.model.transformer import LanguageModel
from tests.tiny import tiny


@pytest.mark.parametrize("shape", [(3, 5), (2, 1 << 20), (0, 4)])  # below and above what huge pages are asked for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = huge_pages.zeros(shape, dtype, torch.device("cpu"))
    assert found.equal(torch.zeros(shape, dtype=dtype))
    assert found.fill_(1).equal(torch.ones(shape, dtype=dtype))


def test_a_system_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages.zeros((2, 1 << 20), torch.float32, torch.device("cpu")).equal(torch.zeros(2, 1 << 20))


@pytest.mark.parametrize("tied", [True, False])
def test_a_moved_model_is_filled_as_before(tied: bool) -> None:
    config = tiny(vocab_size=4097, hidden_size=256, head_dim=6, intermediate_size=24, tie_word_embeddings=tied)
    models = [LanguageModel(config) for _ in range(2)]
    huge_pages.move(models[0])
    for model in models:
        model.initialise(3)
    found, expected = (dict(model.named_parameters()) for model in models)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert (models[0].lm_head.weight is models[0].model.embed_tokens.weight) == tied
    assert len({parameter.untyped_storage().data_ptr() for parameter in found.values()}) == 1
