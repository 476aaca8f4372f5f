"""What an operator costs: the shape of a matrix product, the bytes of any other, the kernels that it starts.

Counted as on a GPU: a product's FLOPs are 2 for every multiplication, attention's are those of the causal half of the
scores, and its backward pass multiplies five times where the forward pass does twice, since FlashAttention keeps no
scores. Segments are as long as they may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_lm.tools.plan.trace import CollectiveKind, Product

# By the operator's name. One kernel where nothing is said.
LAUNCHES = {
    "aten::sort": 6,  # radix passes of 64-bit keys
    "aten::topk": 2,
    "aten::cumsum": 2,
    "aten::_grouped_mm": 2,  # the pointers of its groups, then the products
    "aten::repeat_interleave": 3,
    "aten::nonzero_static": 5,  # counts, their sums, then the indices
    "aten::embedding_dense_backward": 6,  # sorts the ids
    "torch_attn::_varlen_attn_backward": 3,  # row sums, gradients, conversion
}
ALLOCATES = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
GATHERS = {"aten::index_select", "aten::gather", "aten::embedding", "aten::index"}  # read what they return
DATA_DEPENDENT = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::repeat_interleave", "aten::masked_select", "aten::unique_dim",
    "aten::_unique2", "aten::equal", "aten::is_nonzero", "aten::unique_consecutive",
}  # fmt: skip
COLLECTIVES: dict[str, CollectiveKind] = {
    "alltoall": "all_to_all", "all_to_all": "all_to_all", "allreduce": "all_reduce", "all_reduce": "all_reduce",
    "allgather": "all_gather", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "broadcast": "broadcast",
}  # fmt: skip
POINTWISE = {
    "aten::_to_copy", "aten::clone", "aten::copy_", "aten::cat", "aten::stack", "aten::where", "aten::full",
    "aten::zeros",
    "aten::ones", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros", "aten::new_full",
    "aten::new_ones", "aten::arange", "aten::index_select", "aten::gather", "aten::embedding", "aten::index",
    "aten::slice_backward", "aten::select_backward", "aten::constant_pad_nd", "aten::fill_", "aten::zero_",
    "aten::silu_backward", "aten::gelu_backward", "aten::sigmoid_backward", "aten::threshold_backward", "aten::repeat",
    "aten::scalar_tensor", "aten::masked_fill", "aten::remainder",
}  # fmt: skip
ROW_REDUCTIONS = {
    "aten::_softmax", "aten::_log_softmax", "aten::_softmax_backward_data", "aten::_log_softmax_backward_data",
    "aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm",
}  # fmt: skip


def collective_kind(name: str) -> CollectiveKind | None:
    """The kind of an operator of torch.distributed; None for any other."""
    space, _, short = name.partition("::")
    if space not in ("c10d", "_c10d_functional", "c10d_functional"):
        return None
    found = next((kind for start, kind in COLLECTIVES.items() if short.lstrip("_").startswith(start)), None)
    return found if found or "wait" in short else "other"


def product(name: str, arguments: Sequence[Any], outputs: Sequence[Tensor]) -> Product | None:
    """The matrix product that an operator is; None for any other operator."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    moved = sum(map(held_bytes, tensors)) + sum(map(held_bytes, outputs))
    short = name.partition("::")[2]
    if name in ("aten::mm", "aten::addmm"):
        a, b = tensors[-2:]
        return _dense(a.shape[0], b.shape[1], a.shape[1], 1, moved, a.element_size())
    if name in ("aten::bmm", "aten::baddbmm"):
        a, b = tensors[-2:]
        return _dense(a.shape[1], b.shape[2], a.shape[2], a.shape[0], moved, a.element_size())
    if name == "aten::_grouped_mm" or short in ("rows_by_weights", "rows_by_rows"):
        a, b = tensors[:2]
        if short == "rows_by_rows":
            return _grouped(len(a), b.shape[-1], a.shape[-1], len(tensors[2]), moved, a)
        if b.ndim == 2:  # the gradient of the weights: groups along the summed rows
            return _grouped(a.shape[1], b.shape[1], a.shape[0], len(tensors[2]), moved, a)
        return _grouped(len(a), b.shape[-1], a.shape[-1], len(b), moved, a)
    if "attn" in short or "attention" in short:
        return _attention(short, arguments, tensors, moved)
    return None


def _dense(rows: int, columns: int, inner: int, groups: int, moved: int, size: int) -> Product:
    return Product("dense", rows, columns, inner, groups, 2 * rows * columns * inner * groups, moved, size)


def _grouped(rows: int, columns: int, inner: int, groups: int, moved: int, a: Tensor) -> Product:
    return Product("grouped", rows, columns, inner, groups, 2 * rows * columns * inner, moved, a.element_size())


def _attention(short: str, arguments: Sequence[Any], tensors: Sequence[Tensor], moved: int) -> Product | None:
    """`[T, H, N]` tensors with bounds and the longest segment, or `[B, H, S, N]` ones without."""
    backward = "backward" in short
    wide = [t for t in tensors if t.ndim >= 3]
    if len(wide) < 3:
        return None
    query, key, value = wide[1:4] if backward else wide[:3]
    if query.ndim == 3:
        tokens, heads = query.shape[:2]
        longest = next((a for a in arguments if isinstance(a, int) and not isinstance(a, bool)), 0) or tokens
    else:
        tokens, heads, longest = query.shape[0] * query.shape[2], query.shape[1], query.shape[2]
    inner, columns = key.shape[-1], value.shape[-1]
    flops = tokens * longest * heads * (inner + columns)  # causal: half of 2 * (inner + columns) * longest
    if backward:
        flops = tokens * longest * heads * (3 * inner + 2 * columns)
    return Product("attention", tokens, columns, inner, heads, flops, moved, query.element_size())


def held_bytes(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor moves: an expanded one is no larger than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
