"""Decoding on a CPU in C++ (native/few_rows.cpp): few rows, and weights read at full speed.

`apply` gives plain modules a faster class; adapted ones, and experts that lie on several ranks, stay as they are. Each
class subclasses the plain one and calls super() for what the C++ does not serve: gradients, autocast, other devices
and data types, and compiled programs. Results are the same but for the order of float32 sums.

Shapes: B rows, S positions, R = B*S, D hidden_size, H heads, K key-value heads, N head size, M head size of the values,
T tokens, E experts, k experts for each token.
"""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.kernels.native import build
from moe_lm.model import rotary
from moe_lm.model.attention import Attention, AttentionLayer, CachedAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.layers import MLP, Head, RMSNorm
from moe_lm.model.moe import Experts, MoE, Router, Routing, dispatch_locally
from moe_lm.model.rotary import Angles
from moe_lm.model.transformer import LanguageModel

MAX_ROWS = 64  # of a product with a whole matrix; with more of them PyTorch reads it fast enough
MAX_EXPERT_OUTPUTS = 1 << 22  # float32 numbers that the C++ keeps memory for
ACTIVATIONS = (F.silu, F.relu, F.gelu)  # numbered as in the C++


def apply(model: LanguageModel) -> None:
    """Let plain modules decode in C++. Adapters and expert parallelism come first."""
    model.cached_attention = NativeCachedAttention
    swap(model)


def swap(root: nn.Module) -> None:
    """Give plain modules within `root` their native class, and the others native functions to call."""
    for module in list(root.modules()):  # a module comes before its children
        if isinstance(module, MoE) and module.dispatcher is dispatch_locally and type(module.experts) is Experts:
            module.dispatcher = dispatch
        if isinstance(module, AttentionLayer):
            module.rotate = rotate
        children = {type(child) for child in module.children()}
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
    """Whether the rows of `x [R, D]` or `x [B, S, ...]` are few enough for a product with a whole matrix."""
    return (x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]) <= MAX_ROWS


class NativeLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not (serves(x, self.weight) and is_few(x)):
            return super().forward(x)
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        _of(x).linear(x.data_ptr(), rows, *_pointers(self), self.in_features, self.out_features, out.data_ptr())
        return out


class NativeHead(Head, NativeLinear):
    pass


class NativeRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not serves(x, self.weight):
            return super().forward(x)
        x = x.contiguous()
        out, size = torch.empty_like(x), x.shape[-1]
        _of(x).rms_norm(x.data_ptr(), x.numel() // size, size, self.weight.data_ptr(), self.eps, out.data_ptr())
        return out


class NativeMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if not (serves(x, self.up_proj.weight) and is_few(x)):
            return super().forward(x)
        x = x.contiguous()
        width, size = self.up_proj.weight.shape
        rows = x.numel() // size
        hidden, out = x.new_empty(rows, width), torch.empty_like(x)
        gate = _pointers(self.gate_proj) if self.gated else (None, None)
        _of(x).feed_forward(
            x.data_ptr(), rows, *gate, *_pointers(self.up_proj), *_pointers(self.down_proj), size, width,
            ACTIVATIONS.index(self.activation), hidden.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


class NativeAttention(Attention):
    def project(self, x_BSD: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        if not (serves(x_BSD, self.q_proj.weight) and is_few(x_BSD)):
            return super().project(x_BSD, angles)
        x_BSD, size = x_BSD.contiguous(), self.head_size
        rows, positions, inputs = x_BSD.shape
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (x_BSD.new_empty(rows, positions, layer.out_features // size, size) for layer in layers)
        norms: tuple[Any, ...] = (None, None, 1, 1, 0.0)  # weights, heads that are normed together, epsilon
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            weights = (self.q_norm.weight, self.k_norm.weight)
            norms = (*(w.data_ptr() for w in weights), *(len(w) // size for w in weights), self.q_norm.eps)
        cos, sin, half = (None, None, 0) if angles is None else (*(x.data_ptr() for x in angles), angles[0].shape[-1])
        _of(x_BSD).project(
            x_BSD.data_ptr(), *(pointer for layer in layers for pointer in _pointers(layer)), *norms[:2], cos, sin,
            rows * positions, inputs, q.shape[2], k.shape[2], size, *norms[2:], half, self.interleave,
            q.data_ptr(), k.data_ptr(), v.data_ptr(),
        )  # fmt: skip
        return q, k, v


class NativeCachedAttention(CachedAttention):
    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        self.values_in_keys = cache.latent_size is not None

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        keys, values = self.keys[layer.index], self.values[layer.index]  # [R, K, capacity, N] and [R, K, capacity, M]
        rows, new, heads, size = q.shape
        if new != 1 or not (serves(q, keys) and is_few(q)):
            return super().__call__(layer, q, k, v, kept)
        if self.longest >= keys.shape[2]:  # which torch would notice by itself
            raise IndexError(f"a row of the cache holds {self.longest} positions and has no room for another")
        q, k, v, lengths = q.contiguous(), k.contiguous(), v.contiguous(), self.lengths.to(q.device)
        out = q.new_empty(rows, 1, heads, values.shape[-1])
        _of(q).attend(
            q.data_ptr(), k.data_ptr(), None if self.values_in_keys else v.data_ptr(), keys.data_ptr(),
            values.data_ptr(), lengths.data_ptr(), *keys.stride()[:3], rows, heads, k.shape[2], size, values.shape[-1],
            layer.scale, out.data_ptr(),
        )  # fmt: skip
        return out


class NativeRouter(Router):
    def choose(self, x_BSD: Tensor) -> Routing:
        if self.config.n_group > 1 or not serves(x_BSD):
            return super().choose(x_BSD)
        x_TD = x_BSD.flatten(0, 1).float().contiguous()
        weight_ED, bias_E = self.weight.float(), self.e_score_correction_bias.float()
        (tokens, size), experts, per_token = x_TD.shape, len(weight_ED), self.config.num_experts_per_tok
        logits_TE, scores_TE = x_TD.new_empty(2, tokens, experts)
        weights_Tk, chosen_Tk = x_TD.new_empty(tokens, per_token), torch.empty(tokens, per_token, dtype=torch.int64)
        _of(x_TD).route(
            x_TD.data_ptr(), weight_ED.data_ptr(), bias_E.data_ptr(), tokens, size, experts, per_token,
            self.config.scoring_func == "sigmoid", self.config.norm_topk_prob, self.config.routed_scaling_factor,
            logits_TE.data_ptr(), scores_TE.data_ptr(), chosen_Tk.data_ptr(), weights_Tk.data_ptr(),
        )  # fmt: skip
        return Routing(logits_TE, scores_TE, chosen_Tk, weights_Tk)


def dispatch(x_TD: Tensor, routing: Routing, experts: Experts, shared: MLP | None) -> tuple[Tensor, Tensor | None]:
    """`model.moe.dispatch_locally` without sorting, which reads only the experts that were chosen."""
    few = routing.experts.numel() * x_TD.shape[-1] <= MAX_EXPERT_OUTPUTS
    if not (few and serves(x_TD, experts.down_proj)):
        return dispatch_locally(x_TD, routing, experts, shared)
    x_TD, chosen_Tk, weights_Tk = x_TD.contiguous(), routing.experts.contiguous(), routing.weights.contiguous()
    out_TD = torch.empty_like(x_TD)
    _of(x_TD).experts(
        x_TD.data_ptr(), chosen_Tk.data_ptr(), weights_Tk.data_ptr(), *chosen_Tk.shape, len(experts.down_proj),
        experts.get_parameter(experts.wide).data_ptr(), experts.down_proj.data_ptr(), experts.gated,
        *experts.down_proj.mT.shape[1:], ACTIVATIONS.index(experts.activation), out_TD.data_ptr(),
    )  # fmt: skip
    return out_TD, None if shared is None else shared(x_TD)


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
    Head: NativeHead,
    RMSNorm: NativeRMSNorm,
    MLP: NativeMLP,
    Attention: NativeAttention,
    Router: NativeRouter,
}

# The arguments of each function, in the order of the table at the end of the C++: p pointer, i int64, f float32.
SIGNATURES = {
    "linear": "pippiip",
    "feed_forward": "pippppppiiipp",
    "rms_norm": "piipfp",
    "rotate": "pppiiiiip",
    "project": "pppppppppppiiiiiiifiippp",
    "attend": "ppppppiiiiiiiifp",
    "route": "pppiiiiiifpppp",
    "experts": "pppiiippiiiip",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def _pointers(layer: nn.Linear) -> tuple[int, int | None]:
    """Where weight and bias of a layer are."""
    return layer.weight.data_ptr(), None if layer.bias is None else layer.bias.data_ptr()


def _of(x: Tensor) -> Any:
    return _functions(x.dtype)


@functools.cache
def _functions(dtype: torch.dtype) -> SimpleNamespace | None:
    """The functions of a data type by name; None where there are none."""
    library = build.library()
    if library is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    table = (ctypes.c_void_p * len(SIGNATURES)).in_dll(library, f"few_rows_{str(dtype).removeprefix('torch.')}")
    functions = {}
    for (name, signature), address in zip(SIGNATURES.items(), table, strict=True):
        functions[name] = ctypes.CFUNCTYPE(None, *map(KINDS.__getitem__, signature))(address)
    return SimpleNamespace(**functions)
