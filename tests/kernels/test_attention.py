"""Every kernel of attention within segments against a masked softmax: document boundaries, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lm.kernels import attention, available
from moe_lm.kernels.kernels import ATTENTION
from moe_lm.model.attention import Attention, PackedAttention, SegmentAttention
from tests.tiny import tiny

SEGMENTS = {
    "one_document": [12],
    "equal_rows": [6, 6, 6],
    "ragged": [5, 1, 9, 2],
    "single_tokens": [1, 1, 1, 4],
    "runs_and_gaps": [3, 3, 0, 3, 7, 0, 0, 7, 1],
    "a_run_before_its_double": [3, 3, 6, 2],
    "longer_than_a_kernel_block": [70, 300, 33],
}


def reference_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Softmax over every visible pair, in float64: same document, not later; query head h reads K/V head h // group."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    places = torch.arange(len(q))
    document = torch.bucketize(places, cu_seqlens.long(), right=True)
    visible = (document[:, None] == document) & (places[:, None] >= places)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * scale
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, head // group])
    return torch.stack(heads, dim=1)


BACKENDS: dict[str, SegmentAttention] = {name: ATTENTION[name] for name in ("plain", "segments")}


def boundaries(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def random_qkv(
    tokens: int, heads: int, kv_heads: int, size: int, value_size: int | None = None, **kind: Any
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + heads * 10 + size)
    shapes = ((tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, value_size or size))
    q, k, v = (torch.randn(shape, generator=generator).to(**kind).requires_grad_() for shape in shapes)
    return q, k, v


def assert_backend_equals_reference(
    backend: SegmentAttention,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    size: int,
    tolerance: float = 1e-5,
    scale: float | None = None,
    **kind: Any,
) -> None:
    """Output and gradients, in float64 on the host; the scale is that of the paper unless it is given."""
    scale = scale or size**-0.5
    q, k, v = random_qkv(sum(lengths), heads, kv_heads, size, **kind)
    cu_seqlens = boundaries(lengths, kind.get("device", "cpu"))
    out = backend(q, k, v, cu_seqlens, max(lengths), scale)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)

    copies = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = reference_attention(*copies, cu_seqlens.cpu(), scale)
    expected_grads = torch.autograd.grad(expected, copies, grad.cpu().double())
    assert out.dtype == q.dtype
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi_head", "grouped", "multi_query"])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_masked_softmax(backend: str, segments: str, kv_heads: int) -> None:
    assert_backend_equals_reference(BACKENDS[backend], SEGMENTS[segments], heads=4, kv_heads=kv_heads, size=16)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any),
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    size=st.sampled_from((2, 6, 16, 40, 64)),
    backend=st.sampled_from(sorted(BACKENDS)),
)
def test_backend_equals_masked_softmax_for_any_documents(
    lengths: list[int], kv_heads: int, repeats: int, size: int, backend: str
) -> None:
    assert_backend_equals_reference(BACKENDS[backend], lengths, kv_heads * repeats, kv_heads, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_in_bfloat16_is_near_the_reference(backend: str) -> None:
    assert_backend_equals_reference(BACKENDS[backend], [40, 7, 33], 4, 2, 16, tolerance=0.03, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_plain_sum_is_right(backend: str) -> None:
    """`.sum().backward()` hands an expanded gradient (stride 0) to the kernel."""
    q, k, v = random_qkv(12, 2, 2, 8)
    cu_seqlens = boundaries([5, 7])
    grads = torch.autograd.grad(BACKENDS[backend](q, k, v, cu_seqlens, 7, 8**-0.5).sum(), (q, k, v))
    expected = torch.autograd.grad(reference_attention(q, k, v, cu_seqlens, 8**-0.5).sum(), (q, k, v))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_layout_are_read_right(backend: str) -> None:
    """Slices of a joint projection, and tensors whose head size is not the innermost in memory."""
    q, k, v = random_qkv(12, 2, 2, 8)
    cu_seqlens = boundaries([5, 7])
    joint = torch.cat((q, k, v), dim=1).detach().requires_grad_()
    sliced = BACKENDS[backend](*joint.split(2, dim=1), cu_seqlens, 7, 8**-0.5)
    turned = BACKENDS[backend](*(x.mT.contiguous().mT for x in (q, k, v)), cu_seqlens, 7, 8**-0.5)
    expected = reference_attention(q, k, v, cu_seqlens, 8**-0.5)
    for out in (sliced, turned):
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    expected_grad = torch.cat(torch.autograd.grad(expected, (q, k, v), grad.double()), dim=1)
    torch.testing.assert_close(torch.autograd.grad(sliced, joint, grad)[0], expected_grad, rtol=1e-5, atol=1e-5)
    turned_grads = torch.autograd.grad(turned, (q, k, v), grad)
    torch.testing.assert_close(torch.cat(turned_grads, dim=1), expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_documents_change_nothing_to_the_bit(backend: str) -> None:
    q, k, v = random_qkv(17, 4, 4, 16)
    cu_seqlens, mine = boundaries([6, 8, 3]), slice(6, 14)
    out = BACKENDS[backend](q, k, v, cu_seqlens, 8, 16**-0.5)
    others = [x.detach().clone() for x in (q, k, v)]
    for x in others:
        x[:6], x[14:] = 1e3, -1e3
    assert torch.equal(BACKENDS[backend](*others, cu_seqlens, 8, 16**-0.5)[mine], out[mine])
    for grad in torch.autograd.grad(out[mine].square().sum(), (q, k, v)):
        assert not grad[:6].any()
        assert not grad[14:].any()
        assert grad[mine].any()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("size", "value_size"), [(24, 16), (12, 20), (6, 1)])
@pytest.mark.parametrize("segments", ["equal_rows", "ragged", "longer_than_a_kernel_block"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_may_have_another_size_and_scores_another_scale(
    backend: str, segments: str, size: int, value_size: int, scale: float | None
) -> None:
    kind = {"value_size": value_size, "scale": scale}
    assert_backend_equals_reference(BACKENDS[backend], SEGMENTS[segments], 4, 2, size, **kind)


def test_packed_attention_flattens_rows_and_keeps_their_shape() -> None:
    q, k, v = random_qkv(12, 4, 2, 8)
    rows = [x.detach().unflatten(0, (2, 6)) for x in (q, k, v)]
    out = PackedAttention(boundaries([4, 2, 6]), 6)(Attention(tiny(), 0), *rows)
    expected = reference_attention(q, k, v, boundaries([4, 2, 6]), 8**-0.5).float()
    torch.testing.assert_close(out, expected.unflatten(0, (2, 6)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[6, 6], [5, 1, 6]])
def test_segment_operator_keeps_the_contract_of_custom_operators(lengths: list[int]) -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time tracing."""
    q, k, v = random_qkv(12, 2, 2, 8)
    cu_seqlens = boundaries(lengths)
    torch.library.opcheck(attention._segment_attention, (q, k, v, cu_seqlens, 6, 0.3))
    out, log_sum_exp = attention._segment_attention(q.detach(), k.detach(), v.detach(), cu_seqlens, 6, 0.3)
    inputs = (torch.ones_like(out), q.detach(), k.detach(), v.detach(), out, log_sum_exp, cu_seqlens, 6, 0.3)
    torch.library.opcheck(attention._segment_attention_backward, inputs)


def test_segment_operator_returns_the_log_sum_exp_of_the_scores() -> None:
    q, k, v = random_qkv(5, 2, 2, 8)
    _, log_sum_exp = attention._segment_attention(q, k, v, boundaries([2, 3]), 3, 8**-0.5)
    scores = torch.einsum("ihn,jhn->hij", q, k) / 8**0.5
    visible = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    torch.testing.assert_close(log_sum_exp, scores.masked_fill(~visible, -torch.inf).logsumexp(-1).T)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA_BACKENDS = ["flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_varlen"]


def cuda_backend(name: str) -> SegmentAttention:
    if lack := available.lack(name):
        pytest.skip(f"{name}: {lack.why}")
    return ATTENTION[available.pick("cuda", name)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi_head", "grouped", "multi_query"])
@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (64, 32), (64, 96), (192, 128)])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_backend_in_bfloat16_is_near_the_reference(
    backend: str, size: int, value_size: int, kv_heads: int
) -> None:
    kind = {"device": "cuda", "dtype": torch.bfloat16, "value_size": value_size}
    assert_backend_equals_reference(cuda_backend(backend), [70, 300, 1, 33], 4, kv_heads, size, tolerance=0.03, **kind)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi_head", "grouped"])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_in_float32_equals_the_reference(backend: str, kv_heads: int) -> None:
    assert_backend_equals_reference(cuda_backend(backend), [70, 300, 1, 33], 4, kv_heads, 64, device="cuda")
