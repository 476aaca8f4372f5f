"""The operations of a decoding step on a CPU, in C++ (native/few_rows.cpp): few rows, and weights read at full speed.

Each gives what the torch code beside its caller gives, but for the order of a float32 sum. `serves` says when; where
it is False, without a compiler for one, that torch code runs.

Shapes: R rows, D inputs, F outputs, H heads, N head size.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.kernels.native import build

Angles = tuple[Tensor, Tensor]
MAX_ROWS = 64  # of a product with a matrix that serves all of them; PyTorch reads it at more than enough speed for more
ANY = 1 << 62  # rows
MAX_EXPERT_OUTPUTS = 1 << 22  # float32 numbers that `experts` keeps memory for
ACTIVATIONS = ("silu", "relu", "gelu")  # numbered as in the C++


def serves(x: Tensor, weight: Tensor, most: int = MAX_ROWS) -> bool:
    """Whether the operations here may be used: few rows on a CPU, one data type, no gradient, nothing traced.

    Rows are the first dimension of two, else the first two.
    """
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot trace the next one
        and torch.is_inference_mode_enabled()
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and (x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]) <= most
        and not torch.is_autocast_enabled("cpu")
        and _functions(x.dtype) is not None
    )


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    x, weight_FD = x.contiguous(), weight_FD.contiguous()
    outputs, inputs = weight_FD.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    bias = None if bias_F is None else bias_F.data_ptr()
    rows = x.numel() // inputs
    _of(x).linear(x.data_ptr(), rows, weight_FD.data_ptr(), bias, inputs, outputs, out.data_ptr())
    return out


def feed_forward(x: Tensor, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, activation: str) -> Tensor:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""
    x = x.contiguous()
    width, size = up.weight.shape
    rows = x.numel() // size
    hidden, out = x.new_empty(rows, width), torch.empty_like(x)
    pointers = (*(_pointers(gate) if gate is not None else (None, None)), *_pointers(up), *_pointers(down))
    _of(x).feed_forward(
        x.data_ptr(), rows, *pointers, size, width, ACTIVATIONS.index(activation), hidden.data_ptr(), out.data_ptr()
    )
    return out


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`RMSNorm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    _of(x).rms_norm(x.data_ptr(), x.numel() // size, size, weight_D.data_ptr(), eps, out.data_ptr())
    return out


def rotate(x_BSHN: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """`rotary.rotate`."""
    x_BSHN = x_BSHN.contiguous()
    out = torch.empty_like(x_BSHN)
    rows, positions, heads, size = x_BSHN.shape
    cos, sin = (angle.expand(rows, positions, 1, -1).contiguous() for angle in (cos, sin))
    _of(out).rotate(
        x_BSHN.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows * positions, heads, size, cos.shape[-1], interleave,
        out.data_ptr(),
    )  # fmt: skip
    return out


def project(
    x_BSD: Tensor,
    projections: Sequence[nn.Linear],
    norms: Sequence[Tensor] | None,
    eps: float,
    size: int,
    angles: Angles | None,
    interleave: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, S, H, N]`, keys and values `[B, S, K, N]`: what `Attention` gives to `attend`.

    `norms` are the weights for queries and for keys, as long as what is normed together.
    """
    x_BSD = x_BSD.contiguous()
    rows, positions, inputs = x_BSD.shape
    q, k, v = (x_BSD.new_empty(rows, positions, len(layer.weight) // size, size) for layer in projections)
    norm_q, norm_k = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    over = (1, 1) if norms is None else (len(norms[0]) // size, len(norms[1]) // size)
    cos, sin, half = (None, None, 0) if angles is None else (*(x.data_ptr() for x in angles), angles[0].shape[-1])
    _of(x_BSD).project(
        x_BSD.data_ptr(), *(pointer for layer in projections for pointer in _pointers(layer)), norm_q, norm_k, cos, sin,
        rows * positions, inputs, q.shape[2], k.shape[2], size, *over, eps, half, interleave,
        q.data_ptr(), k.data_ptr(), v.data_ptr(),
    )  # fmt: skip
    return q, k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """A token a row, `q [R, 1, H, N]`, `k [R, 1, K, N]`, `v [R, 1, K, M]`: appended to the cache and attending to it.

    `keys [R, K, capacity, N]` and `values [R, K, capacity, M]` are a layer's; without v the values lie in the keys.
    """
    q, k, v = q.contiguous(), k.contiguous(), None if v is None else v.contiguous()
    rows, _, heads, size = q.shape
    out = q.new_empty(rows, 1, heads, values.shape[-1])
    _of(q).attend(
        q.data_ptr(), k.data_ptr(), None if v is None else v.data_ptr(), keys.data_ptr(), values.data_ptr(),
        lengths.data_ptr(), *keys.stride()[:3], rows, heads, k.shape[2], size, values.shape[-1], scale, out.data_ptr(),
    )  # fmt: skip
    return out


def route(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, per_token: int, sigmoid: bool, normalise: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`moe.route` without groups, in float32: logits and scores `[T, E]`, experts and weights `[T, k]`."""
    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    (tokens, size), number = x_TD.shape, len(weight_ED)
    logits, scores = x_TD.new_empty(2, tokens, number)
    weights, chosen = x_TD.new_empty(tokens, per_token), torch.empty(tokens, per_token, dtype=torch.int64)
    _of(x_TD).route(
        x_TD.data_ptr(), weight_ED.data_ptr(), bias_E.data_ptr(), tokens, size, number, per_token, sigmoid, normalise,
        factor, logits.data_ptr(), scores.data_ptr(), chosen.data_ptr(), weights.data_ptr(),
    )  # fmt: skip
    return logits, scores, chosen, weights


def experts(
    x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """What the chosen experts of every token give, added up by weight; no other expert is read."""
    x_TD, chosen_Tk, weights_Tk = x_TD.contiguous(), chosen_Tk.contiguous(), weights_Tk.contiguous()
    out = torch.empty_like(x_TD)
    _of(x_TD).experts(
        x_TD.data_ptr(), chosen_Tk.data_ptr(), weights_Tk.data_ptr(), *chosen_Tk.shape, len(up),
        None if gate is None else gate.data_ptr(), up.data_ptr(), down.data_ptr(), *up.shape[1:],
        ACTIVATIONS.index(activation), out.data_ptr(),
    )  # fmt: skip
    return out


# In the order of the table at the end of the C++: p a pointer, i an int64, f a float32.
SIGNATURES = {
    "linear": "pippiip",
    "feed_forward": "pippppppiiipp",
    "rms_norm": "piipfp",
    "rotate": "pppiiiiip",
    "project": "pppppppppppiiiiiiifiippp",
    "attend": "ppppppiiiiiiiifp",
    "route": "pppiiiiiifpppp",
    "experts": "pppiiipppiiip",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def _pointers(layer: nn.Linear) -> tuple[int, int | None]:
    return layer.weight.data_ptr(), None if layer.bias is None else layer.bias.data_ptr()


def _of(x: Tensor) -> Any:
    return _functions(x.dtype)


@functools.cache
def _functions(dtype: torch.dtype) -> SimpleNamespace | None:
    """The functions of a data type by their names."""
    library = build.library()
    if library is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    table = (ctypes.c_void_p * len(SIGNATURES)).in_dll(library, f"few_rows_{str(dtype).removeprefix('torch.')}")
    functions = {}
    for (name, signature), address in zip(SIGNATURES.items(), table, strict=True):
        functions[name] = ctypes.CFUNCTYPE(None, *map(KINDS.__getitem__, signature))(address)
    return SimpleNamespace(**functions)
