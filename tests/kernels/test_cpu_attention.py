"""Attention in C++ against a masked softmax in float64, and its rounding against that of torch's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.kernels import attention, available, cpu_attention, kernels
from moe_lm.kernels.native import build
from moe_lm.model.attention import SegmentAttention
from tests.kernels.test_attention import SEGMENTS, boundaries, random_qkv, reference_attention

Results = tuple[Tensor, ...]
BF16 = torch.bfloat16
cpp = cpu_attention.cpp


@pytest.fixture
def served() -> None:
    if lack := available.lack("cpp"):
        pytest.skip(lack.why)


@pytest.fixture
def _unavailable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load() -> None:
        raise build.UnavailableError("no C++ compiler")

    monkeypatch.setitem(available.PACKAGES, "cpp", available.PACKAGES["cpp"]._replace(load=load))
    available.lack.cache_clear()
    yield
    available.lack.cache_clear()


def run(backend: SegmentAttention, inputs: Results, lengths: list[int], scale: float, grad: Tensor) -> Results:
    """The output and the gradients of q, k and v, in float64."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = backend(*inputs, boundaries(lengths), max(lengths), scale)  # type: ignore[arg-type]
    return tuple(x.double() for x in (out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))))


def reference(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: int, scale: float) -> Tensor:
    return reference_attention(q, k, v, ends, scale)


def assert_near_the_reference(lengths: list[int], heads: int, kv_heads: int, size: int, values: int) -> None:
    """Every number is near, and the errors together are no larger than those of torch's kernel."""
    q, k, v = random_qkv(sum(lengths), heads, kv_heads, size, values, dtype=BF16)
    grad = torch.randn(len(q), heads, values, generator=torch.Generator().manual_seed(1)).to(BF16)
    expected = run(reference, (q, k, v), lengths, size**-0.5, grad)
    ours, theirs = (run(kernel, (q, k, v), lengths, size**-0.5, grad) for kernel in (cpp, attention.segments))
    for mine, other, wanted in zip(ours, theirs, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0.03, atol=0.03)
        # A document of one token has no gradient of q and k; what each kernel leaves of it is the rounding of float32.
        assert (mine - wanted).norm() <= 1.1 * (other - wanted).norm() + 1e-3 * wanted.norm() + 1e-5


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("size", "values"), [(16, 16), (64, 64), (32, 80), (192, 128)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi_head", "grouped", "multi_query"])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_cpp_equals_masked_softmax(segments: str, kv_heads: int, size: int, values: int) -> None:
    assert_near_the_reference(SEGMENTS[segments], 4, kv_heads, size, values)


@pytest.mark.usefixtures("served")
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any),
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    size=st.sampled_from((16, 48, 64, 96)),
    values=st.sampled_from((16, 32, 112)),
)
def test_cpp_equals_masked_softmax_for_any_documents(
    lengths: list[int], kv_heads: int, repeats: int, size: int, values: int
) -> None:
    assert_near_the_reference(lengths, kv_heads * repeats, kv_heads, size, values)


@pytest.mark.usefixtures("served")
def test_inputs_of_any_layout_are_read_right() -> None:
    """Slices of a joint projection, a head size that is not innermost in memory, and an expanded gradient."""
    lengths, generator = [40, 7, 33], torch.Generator().manual_seed(0)
    joint = torch.randn(80, 8, 32, generator=generator).to(BF16)
    q, k, v = joint.split([4, 2, 2], dim=1)
    grad = torch.ones((), dtype=BF16).expand(80, 4, 32)
    plain = run(cpp, tuple(x.contiguous() for x in (q, k, v)), lengths, 0.2, grad.contiguous())
    turned = tuple(x.mT.contiguous().mT for x in (q, k, v))
    for inputs in ((q, k, v), turned):
        for mine, same in zip(run(cpp, inputs, lengths, 0.2, grad), plain, strict=True):
            assert torch.equal(mine, same)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("threads", [1, 3])
def test_other_documents_and_threads_change_nothing_to_the_bit(threads: int) -> None:
    q, k, v = random_qkv(150, 4, 2, 32, dtype=BF16)
    grad = torch.randn(150, 4, 32, generator=torch.Generator().manual_seed(1)).to(BF16)
    mine = slice(60, 101)
    alone = run(cpp, tuple(x[mine] for x in (q, k, v)), [41], 0.3, grad[mine])
    others = tuple(x.detach().clone() for x in (q, k, v))
    for x in others:
        x[:60], x[101:] = torch.nan, 1e3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        among = run(cpp, others, [60, 41, 49], 0.3, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x[mine], y) for x, y in zip(among, alone, strict=True))
    assert among[0][:60].isnan().all()


@pytest.mark.usefixtures("served")
def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    q, k, v = (x * 60 for x in random_qkv(50, 2, 2, 32, dtype=BF16))
    grad = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(1)).to(BF16)
    ours, expected = (run(kernel, (q, k, v), [50], 1.0, grad) for kernel in (cpp, reference))
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0], expected[0], rtol=0.03, atol=1.0)


@pytest.mark.usefixtures("served")
def test_cpp_returns_the_log_sum_exp_of_the_scores() -> None:
    q, k, v = (x.detach() for x in random_qkv(5, 2, 2, 16, dtype=BF16))
    _, log_sum_exp = cpu_attention._cpu_attention(q, k, v, boundaries([2, 3]), 3, 0.25)
    scores = torch.einsum("ihn,jhn->hij", q.float(), k.float()) * 0.25
    document = torch.tensor([0, 0, 1, 1, 1])
    visible = (document[:, None] == document) & torch.ones(5, 5).tril().bool()
    torch.testing.assert_close(log_sum_exp, scores.masked_fill(~visible, -torch.inf).logsumexp(-1))


@pytest.mark.usefixtures("served")
def test_cpp_operators_keep_the_contract_of_custom_operators() -> None:
    q, k, v = random_qkv(12, 2, 1, 16, 32, dtype=BF16)
    ends = boundaries([5, 7])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cpu_attention._cpu_attention, (q, k, v, ends, 7, 0.3), test_utils=checks)
    out, log_sum_exp = cpu_attention._cpu_attention(q.detach(), k.detach(), v.detach(), ends, 7, 0.3)
    inputs = (torch.ones_like(out), q.detach(), k.detach(), v.detach(), out, log_sum_exp, ends, 7, 0.3)
    torch.library.opcheck(cpu_attention._cpu_attention_backward, inputs, test_utils=checks)


@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float32), (24, BF16)])
def test_what_the_cpp_does_not_take_runs_in_torch(size: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(12, 2, 1, size, dtype=dtype)
    ends = boundaries([5, 7])
    assert torch.equal(cpp(q, k, v, ends, 7, 0.3), attention.segments(q, k, v, ends, 7, 0.3))


@pytest.mark.usefixtures("_unavailable")
def test_without_the_cpp_torch_serves_and_nothing_is_said() -> None:
    assert kernels.choose(torch.device("cpu")).attention == "segments"
    assert available.passed_over("cpu", "segments") == []
    with pytest.raises(UsageError, match=r"attention_kernel=cpp does not serve here: no C\+\+ compiler; install g\+\+"):
        kernels.choose(torch.device("cpu"), attention="cpp")


def test_a_processor_without_bfloat16_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(build, "load", lambda: pytest.fail("compiled"))
    with pytest.raises(build.UnavailableError, match="does not multiply bfloat16"):
        cpu_attention.load()
