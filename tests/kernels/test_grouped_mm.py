"""The grouped product against one matrix product per group."""

from __future__ import annotations

import pytest
import torch

from moe_lm.config.model import ModelConfig
from moe_lm.kernels.grouped_mm import BUCKET, _rows_by_rows, _rows_by_weights, grouped_mm, runs_of
from moe_lm.model.transformer import LanguageModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_contract_of_custom_operators(dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time tracing, in both data types."""
    x, weight = torch.randn(12, 8, dtype=dtype, requires_grad=True), torch.randn(3, 8, 16, dtype=dtype)
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    torch.library.opcheck(_rows_by_weights, (x, weight.requires_grad_(), ends))
    torch.library.opcheck(_rows_by_rows, (x.detach(), torch.randn(12, 16, dtype=dtype), ends))


@pytest.mark.parametrize(
    "loads",
    [
        [5, 0, 7],
        [0, 0, 0],
        [BUCKET, BUCKET, BUCKET],
        [3 * BUCKET + 1, 1, 0, BUCKET - 1, 2 * BUCKET, 5],
        [0, 0, 0, 2 * BUCKET + 3],
        [1, 1, 1, 1, 1, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_a_product_per_group_with_its_gradients(loads: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(loads), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(loads), 16, 24, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(sum(loads), 24, generator=generator).to(dtype)
    out = grouped_mm(x, weight, torch.tensor(loads).cumsum(0).to(torch.int32))
    expected = torch.cat([rows @ matrix for rows, matrix in zip(x.split(loads), weight, strict=True)])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad)
    )


def test_an_expanded_gradient_as_a_sum_gives_is_taken() -> None:
    x, weight = torch.randn(12, 8, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    out = grouped_mm(x, weight, torch.tensor([5, 5, 12], dtype=torch.int32))
    expected = torch.cat((x[:5] @ weight[0], x[5:] @ weight[2]))
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight))
    )


def test_not_a_number_in_one_group_stays_there() -> None:
    x, weight = torch.randn(12, 8), torch.randn(3, 8, 16, requires_grad=True)
    x[:5] = float("nan")
    x.requires_grad_()
    out = grouped_mm(x, weight, torch.tensor([5, 9, 12], dtype=torch.int32))
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()
    (weight_grad,) = torch.autograd.grad(out[5:].sum(), weight)
    assert weight_grad[1:].isfinite().all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_few_tokens_without_a_gradient_get_what_sorted_slots_give(tokens: int, gated: bool) -> None:
    """The way of a decoding step, which runs the chosen experts alone, against the way of training."""
    config = ModelConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, mlp_gated=gated, initializer_range=0.3,
    )  # fmt: skip
    model = LanguageModel(config)
    model.initialise(0)
    [moe] = model.moe_layers
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
    expected, _ = moe(x)
    with torch.inference_mode():
        assert moe.experts.can_run_few(x)
        found, _ = moe(x)
    assert not moe.experts.can_run_few(x)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def test_runs_of_equal_experts() -> None:
    assert runs_of([0, 0, 3, 5, 5, 5]) == [(0, 0, 2), (3, 2, 3), (5, 3, 6)]
    assert runs_of([]) == []
