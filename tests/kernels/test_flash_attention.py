"""The calls of CUDA's attention kernels, without CUDA: what they are given, and that the result has its shape.

What a kernel computes is tested on a GPU (test_attention.py). Here a package of a known signature computes in torch,
and PyTorch's own kernels run on fake tensors, which have shapes and no numbers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.kernels import flash_attention
from moe_lm.kernels.kernels import ATTENTION
from moe_lm.model.attention import SegmentAttention
from tests.kernels.test_attention import assert_backend_equals_reference, boundaries, reference_attention

VARLEN = {"torch_varlen", "flash_attn_3", "flash_attn_4"}


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, ...]]:
    """Stand in for flash-attn 2.8, which asks for one head size, and note the shapes that it is given."""
    given: list[tuple[torch.Size, ...]] = []

    def flash_attn_varlen_func(  # its whole signature
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        given.append((q.shape, k.shape, v.shape))
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert causal
        assert softmax_scale is not None
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        return reference_attention(q, k, v, cu_seqlens_q, softmax_scale).to(q.dtype)

    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return given


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi_head", "grouped", "multi_query"])
@pytest.mark.parametrize("value_size", [16, 8, 24])
def test_flash_attn_2_is_called_as_it_is_declared(
    flash_attn: list[tuple[torch.Size, ...]], value_size: int, kv_heads: int
) -> None:
    kind = {"dtype": torch.bfloat16, "value_size": value_size}
    assert_backend_equals_reference(ATTENTION["flash_attn_2"], [40, 7, 33], 4, kv_heads, 16, tolerance=0.03, **kind)
    width = max(16, value_size)
    assert flash_attn == [((80, 4, width), (80, kv_heads, width), (80, kv_heads, width))]


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operator).rsplit(".", 1)[0])
        return operator(*args, **(kwargs or {}))


def run_fake(
    kernel: SegmentAttention, heads: tuple[int, int], sizes: tuple[int, int]
) -> tuple[list[str], list[torch.Size]]:
    """The operators of a forward and backward pass of 12 tokens, and the shapes of the output and the gradients."""
    with FakeTensorMode(), Operators() as seen:
        q = torch.empty(12, heads[0], sizes[0], dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(12, heads[1], size, dtype=torch.bfloat16, requires_grad=True) for size in sizes)
        ends = boundaries([5, 7])
        seen.names.clear()
        out = kernel(q, k, v, ends, 7, 0.3)
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    return seen.names, [out.shape, *(grad.shape for grad in grads)]


@pytest.mark.parametrize("name", sorted(VARLEN))
def test_grouped_keys_are_not_repeated(name: str) -> None:
    operators, shapes = run_fake(ATTENTION[name], heads=(4, 2), sizes=(64, 64))
    assert shapes == [(12, 4, 64), (12, 4, 64), (12, 2, 64), (12, 2, 64)]
    assert {"torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"} <= set(operators)
    assert not [name for name in operators if any(word in name for word in ("repeat", "index", "pad", "cat", "copy"))]


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4"])
def test_values_of_latent_attention_are_not_padded(name: str) -> None:
    operators, shapes = run_fake(ATTENTION[name], heads=(4, 4), sizes=(192, 128))
    assert shapes == [(12, 4, 128), (12, 4, 192), (12, 4, 192), (12, 4, 128)]
    assert {"moe_lm.uneven_attention", "moe_lm.uneven_attention_backward"} <= set(operators)
    assert not [name for name in operators if any(word in name for word in ("pad", "slice", "copy"))]


@pytest.mark.parametrize("sizes", [(192, 128), (24, 16), (16, 24)])
def test_values_of_another_size_are_padded_where_the_kernel_asks_for_one(sizes: tuple[int, int]) -> None:
    operators, shapes = run_fake(ATTENTION["torch_varlen"], heads=(4, 2), sizes=sizes)
    assert shapes == [(12, 4, sizes[1]), (12, 4, sizes[0]), (12, 2, sizes[0]), (12, 2, sizes[1])]
    assert "aten.constant_pad_nd" in operators
    assert "torch_attn._varlen_attn" in operators


@pytest.mark.parametrize("name", sorted(VARLEN | {"flash_attn_2"}))
def test_float32_is_computed_in_plain_torch(name: str) -> None:
    assert_backend_equals_reference(ATTENTION[name], [5, 7], 4, 2, 16)


def reference_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Of `reference_attention`, by hand: an operator's implementation is below autograd."""
    places, group = torch.arange(len(q)), q.shape[1] // k.shape[1]
    document = torch.bucketize(places, ends.long(), right=True)
    hidden = (document[:, None] != document) | (places[:, None] < places)
    grads = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    for head in range(q.shape[1]):
        query, key, value, out = (
            x[:, i].double() for x, i in ((q, head), (k, head // group), (v, head // group), (grad, head))
        )
        weights = (query @ key.T * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        products = out @ value.T
        scores = weights * (products - (weights * products).sum(-1, keepdim=True)) * scale
        for all_heads, index, own in zip(
            grads, (head, head // group, head // group), (scores @ key, scores.T @ query, weights.T @ out), strict=True
        ):
            all_heads[:, index] += own
    return tuple(x.to(q.dtype) for x in grads)


def test_the_operator_for_uneven_sizes_calls_pytorch_as_varlen_attn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators that FlashAttention 3 and 4 replace, here by the reference: forward and gradients."""
    library = torch.library.Library("aten", "IMPL")
    saved: list[Tensor] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, same: Tensor, longest: int, also: int, dropout: float,
        causal: bool, debug: bool, **settings: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (causal, debug, dropout, longest, also) == (True, False, 0.0, 7, 7)
        out = reference_attention(q, k, v, ends, settings["scale"]).to(q.dtype)
        saved.append(out)
        return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), ends, ends, ends

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        assert torch.equal(out, saved[0])
        assert lse.shape == (q.shape[1], len(q))
        return reference_gradients(grad, q, k, v, ends, scale)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        monkeypatch.setattr(flash_attention, "UNEVEN_SIZES", (24, 16))
        kind = {"dtype": torch.bfloat16, "value_size": 16}
        assert_backend_equals_reference(ATTENTION["flash_attn_3"], [5, 7], 4, 2, 24, tolerance=0.03, **kind)
        assert len(saved) == 1
    finally:
        library._destroy()
