"""Decoding on a CPU in C++ (native/few_rows.cpp): few rows, and weights read at full speed.

`apply` gives a model's plain modules a faster class; adapted ones and those whose experts lie on other ranks stay as
they are. Each operation gives the result of the torch code that it replaces, but for the order of a float32 sum, and
leaves to that code what the C++ does not serve: gradients, autocast, other devices and data types, compiled programs.

Shapes: R rows, D inputs, F outputs, H heads, N head size.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.kernels.native import build
from moe_lm.model import rotary
from moe_lm.model.attention import Attention, AttentionLayer, CachedAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.layers import MLP, RMSNorm
from moe_lm.model.moe import Experts, MoE, Router, Routing, dispatch_locally
from moe_lm.model.rotary import Angles
from moe_lm.model.transformer import LanguageModel

MAX_ROWS = 64  # of a product with a whole matrix; PyTorch reads it fast enough for more
MAX_EXPERT_OUTPUTS = 1 << 22  # float32 numbers that `experts` keeps memory for
ACTIVATIONS = (F.silu, F.relu, F.gelu)  # numbered as in the C++


def apply(model: LanguageModel) -> None:
    """Let plain modules decode in C++. Adapters and expert parallelism come first."""
    model.cached_attention = NativeCachedAttention
    swap(model)


def swap(root: nn.Module) -> None:
    """Give plain modules within `root` their native class, and the others what they call."""
    for module in list(root.modules()):
        children = {type(child) for child in module.children()}
        if isinstance(module, MoE) and module.dispatcher is dispatch_locally and type(module.experts) is Experts:
            module.dispatcher = dispatch
        if isinstance(module, AttentionLayer):
            module.rotate = rotate
        if type(module) in NATIVE and children <= {nn.Linear, RMSNorm, nn.Identity}:
            module.__class__ = NATIVE[type(module)]


def serves(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether the C++ takes these: on a CPU, in one data type, without a gradient, and nothing is traced."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot trace the next one
        and torch.is_inference_mode_enabled()
        and x.is_cpu
        and (weight is None or (weight.is_cpu and x.dtype == weight.dtype))
        and not torch.is_autocast_enabled("cpu")
        and _functions(x.dtype) is not None
    )


def is_few(x: Tensor) -> bool:
    """Whether the rows of `x [R, D]` or `x [B, S, D]` are few enough for a product with a whole matrix."""
    return (x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]) <= MAX_ROWS


class NativeLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if serves(x, self.weight) and is_few(x):
            return linear(x, self.weight, self.bias)
        return super().forward(x)


class NativeRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps) if serves(x, self.weight) else super().forward(x)


class NativeMLP(MLP):
    def forward(self, x_BSD: Tensor) -> Tensor:
        if serves(x_BSD, self.up_proj.weight) and is_few(x_BSD):
            gate = self.gate_proj if self.gated else None
            return feed_forward(x_BSD, gate, self.up_proj, self.down_proj, self.activation)
        return super().forward(x_BSD)


class NativeAttention(Attention):
    def project(self, x_BSD: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        if not (serves(x_BSD, self.q_proj.weight) and is_few(x_BSD)):
            return super().project(x_BSD, angles)
        layers, norms, eps = (self.q_proj, self.k_proj, self.v_proj), None, 0.0
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        return project(x_BSD, layers, norms, eps, self.head_size, angles, self.interleave)


class NativeRouter(Router):
    def choose(self, x_BSD: Tensor) -> Routing:
        if self.config.n_group > 1 or not serves(x_BSD):
            return super().choose(x_BSD)
        config = self.config
        bias, sigmoid = self.e_score_correction_bias.float(), config.scoring_func == "sigmoid"
        how = config.num_experts_per_tok, sigmoid, config.norm_topk_prob, config.routed_scaling_factor
        return Routing(*route(x_BSD.flatten(0, 1).float(), self.weight.float(), bias, *how))


class NativeCachedAttention(CachedAttention):
    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        self.values_in_keys = cache.latent_size is not None

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        keys, values = self.keys[layer.index], self.values[layer.index]
        if q.shape[1] != 1 or not (serves(q, keys) and is_few(q)):
            return super().__call__(layer, q, k, v, kept)
        if self.longest >= keys.shape[2]:  # which torch would notice by itself
            raise IndexError(f"a row of the cache holds {self.longest} positions and has no room for another")
        separate = None if self.values_in_keys else v
        return attend(q, k, separate, keys, values, self.lengths.to(q.device), layer.scale)


def dispatch(
    x_TD: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """`model.moe.dispatch_locally` without sorting: every token goes through its experts by itself."""
    small = routing.experts.numel() * x_TD.shape[-1] <= MAX_EXPERT_OUTPUTS
    if not (small and serves(x_TD, experts.up_proj)):
        return dispatch_locally(x_TD, routing, experts, meanwhile)
    gate = experts.gate_proj if experts.gated else None
    stacks = (gate, experts.up_proj, experts.down_proj)
    return chosen_experts(x_TD, routing.experts, routing.weights, *stacks, experts.activation), meanwhile()


def rotate(x_BSHN: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """`model.rotary.rotate`."""
    if not serves(x_BSHN):
        return rotary.rotate(x_BSHN, cos, sin, interleave)
    x_BSHN = x_BSHN.contiguous()
    out = torch.empty_like(x_BSHN)
    rows, positions, heads, size = x_BSHN.shape
    cos, sin = (angle.expand(rows, positions, 1, -1).contiguous() for angle in (cos, sin))
    _of(out).rotate(
        x_BSHN.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows * positions, heads, size, cos.shape[-1], interleave,
        out.data_ptr(),
    )  # fmt: skip
    return out


NATIVE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NativeLinear,
    RMSNorm: NativeRMSNorm,
    MLP: NativeMLP,
    Attention: NativeAttention,
    Router: NativeRouter,
}


# The functions of the C++, with pointers in place of tensors


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    x, weight_FD = x.contiguous(), weight_FD.contiguous()
    outputs, inputs = weight_FD.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    bias = None if bias_F is None else bias_F.data_ptr()
    rows = x.numel() // inputs
    _of(x).linear(x.data_ptr(), rows, weight_FD.data_ptr(), bias, inputs, outputs, out.data_ptr())
    return out


def feed_forward(x: Tensor, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, activation: Any) -> Tensor:
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


def chosen_experts(
    x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: Any
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
