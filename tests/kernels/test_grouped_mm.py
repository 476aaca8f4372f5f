"""The grouped product against one matrix product per group."""

from __future__ import annotations

import pytest
import torch

from moe_lm.kernels.grouped_mm import BUCKET, _rows_by_rows, _rows_by_weights, bucketed


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
    ends = torch.tensor(loads).cumsum(0).to(torch.int32)
    out = bucketed(x, weight, ends)
    expected = torch.cat([rows @ matrix for rows, matrix in zip(x.split(loads), weight, strict=True)])
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(bucketed(x, weight, ends), expected)
    found, wanted = (torch.autograd.grad(product, (x, weight), grad) for product in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_an_expanded_gradient_as_a_sum_gives_is_taken() -> None:
    x, weight = torch.randn(12, 8, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    out = bucketed(x, weight, torch.tensor([5, 5, 12], dtype=torch.int32))
    expected = torch.cat((x[:5] @ weight[0], x[5:] @ weight[2]))
    found, wanted = (torch.autograd.grad(product.sum(), (x, weight)) for product in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_not_a_number_in_one_group_stays_there() -> None:
    x, weight = torch.randn(12, 8), torch.randn(3, 8, 16, requires_grad=True)
    x[:5] = float("nan")
    x.requires_grad_()
    out = bucketed(x, weight, torch.tensor([5, 9, 12], dtype=torch.int32))
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()
    (weight_grad,) = torch.autograd.grad(out[5:].sum(), weight)
    assert weight_grad[1:].isfinite().all()
