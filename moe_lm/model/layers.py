"""Norms, feed-forward layers, fixed positions and the head.

Shapes: B rows, S positions, T = B*S tokens, D hidden_size, F width of a feed-forward layer, V vocab_size, C tokens of
a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467, equation 4) over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream that `config` asks for."""
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class MLP(nn.Module):
    """Feed-forward: `down(act(gate(x)) * up(x))` when gated (SwiGLU, arXiv 2002.05202), else `down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        bias = config.mlp_bias
        if config.mlp_gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.gated = config.mlp_gated
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.contract(*self.expand(x_BSD))

    def expand(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """The products to the layer's width: gate and up `[B, S, F]`, or up alone."""
        up = self.up_proj(x_BSD)
        return (self.gate_proj(x_BSD), up) if self.gated else (up,)

    def contract(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        """The way back from what `expand` gives: the activation and the last product."""
        hidden = self.activation(first)
        return self.down_proj(hidden if up is None else hidden * up)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The data type of matrix products with `x`: autocast's when it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sinusoidal_positions(position_ids: Tensor, size: int) -> Tensor:
    """Fixed position vectors `[B, S, D]` (arXiv 1706.03762, section 3.5): sine on even, cosine on odd entries."""
    exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
    angles = position_ids[..., None].float() / 10000.0**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class Head(nn.Linear):
    """The output layer: hidden states `[..., D]` in, logits `[..., V]` out.

    With `measure` it returns `measure(hidden, weight, bias, *arguments)` instead: something that takes the logits of
    some positions at a time. It is called in here because weights may be in place only during a layer's forward pass
    (ZeRO 3, offloading).
    """

    def forward(self, hidden: Tensor, measure: Callable[..., Any] | None = None, *arguments: Any) -> Any:
        if measure is None:
            return super().forward(hidden)
        return measure(hidden, self.weight, self.bias, *arguments)


# Float32 logits of a chunk: on a CPU what its cache holds, elsewhere enough to keep the device busy. A chunk of few
# rows would read the weight, and add to its gradient, too often.
CHUNK_BYTES = {"cpu": 8 * 2**20}
CHUNK_ROWS = {"cpu": 128}
OTHER_BYTES, OTHER_ROWS = 64 * 2**20, 1024

# logits [C, V], targets [C] of at least 0 -> negative log-likelihoods [C] in float32, their gradients [C, V]
ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_loss(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in float32, and its gradient in the logits' data type: the probabilities, minus 1 at the target."""
    targets_C1 = targets_C[:, None]
    log_probs_CV = F.log_softmax(logits_CV, -1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
    nll_C = -log_probs_CV.gather(1, targets_C1)[:, 0]
    gradient_CV = log_probs_CV.exp_().scatter_add_(1, targets_C1, -log_probs_CV.new_ones(targets_C1.shape))
    return nll_C, gradient_CV.to(logits_CV.dtype)


def summed_nll(
    hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_BS: Tensor, loss: ChunkLoss = chunk_loss
) -> Tensor:
    """Negative log-likelihood of the targets in nats, summed in float32; targets below 0 count nothing.

    The gradients are computed in the forward pass, as in Liger (arXiv 2410.10989), so no logits are kept and none are
    computed twice. Its backward pass can run once.
    """
    summed: Tensor = _SummedNLL.apply(
        hidden_BSD.flatten(0, -2), weight_VD, bias_V, targets_BS.flatten(), compute_dtype(hidden_BSD), loss
    )
    return summed


def token_nll(
    hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_BS: Tensor, loss: ChunkLoss = chunk_loss
) -> Tensor:
    """Negative log-likelihood of every target in nats, `[B, S]` float32; 0 for targets below 0.

    The weight of a token in the loss is known only later, so the backward pass computes the logits once more.
    """
    nll_T: Tensor = _TokenNLL.apply(
        hidden_BSD.flatten(0, -2), weight_VD, bias_V, targets_BS.flatten(), compute_dtype(hidden_BSD), loss
    )
    return nll_T.view(targets_BS.shape)


def likeliest(hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """The likeliest token after every position, `[B, S]`."""
    head = _Products(hidden_BSD.flatten(0, -2), weight_VD, bias_V, compute_dtype(hidden_BSD))
    tokens = [head.logits(chunk).argmax(-1) for chunk in head.chunks()]
    return torch.cat(tokens).view(hidden_BSD.shape[:-1])


class _SummedNLL(torch.autograd.Function):
    """The sum over the tokens. All its gradients have the same factor, so the forward pass computes them without it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, dtype: torch.dtype,
        loss: ChunkLoss,
    ) -> Tensor:  # fmt: skip
        head = _Products(hidden_TD, weight_VD, bias_V, dtype)
        gradients = _Gradients(head, ctx.needs_input_grad)
        sums = []
        for chunk in head.chunks():
            targets_C, counted_C = _targets(targets_T[chunk])
            nll_C, gradient_CV = loss(head.logits(chunk), targets_C)
            sums.append((nll_C * counted_C).sum())
            gradients.add(chunk, gradient_CV, counted_C)
        ctx.gradients = gradients.of_inputs()
        return torch.stack(sums).sum() if sums else hidden_TD.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve once
        return *(gradient if gradient is None else gradient.mul_(factor) for gradient in gradients), None, None, None


class _TokenNLL(torch.autograd.Function):
    """The negative log-likelihood of every token."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, dtype: torch.dtype,
        loss: ChunkLoss,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T)
        ctx.dtype, ctx.loss = dtype, loss
        head = _Products(hidden_TD, weight_VD, bias_V, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        nll_T = hidden_TD.new_empty(len(hidden_TD), dtype=wide)
        for chunk in head.chunks():
            targets_C, counted_C = _targets(targets_T[chunk])
            nll_T[chunk] = F.cross_entropy(head.logits(chunk).to(wide), targets_C, reduction="none") * counted_C
        return nll_T

    @staticmethod
    def backward(ctx: Any, factor_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, targets_T = ctx.saved_tensors
        head = _Products(hidden_TD, weight_VD, bias_V, ctx.dtype)
        gradients = _Gradients(head, ctx.needs_input_grad)
        for chunk in head.chunks():
            targets_C, counted_C = _targets(targets_T[chunk])
            _, gradient_CV = ctx.loss(head.logits(chunk), targets_C)
            gradients.add(chunk, gradient_CV, factor_T[chunk] * counted_C)
        return *gradients.of_inputs(), None, None, None


class _Products:
    """The head's product for some positions at a time, in one data type."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> None:
        self.given = (hidden_TD, weight_VD, bias_V)
        self.hidden_TD, self.weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)

    def chunks(self) -> Iterator[slice]:
        """The positions, in chunks of about equal size."""
        kind, (vocabulary, _) = self.hidden_TD.device.type, self.weight_VD.shape
        at_once = max(CHUNK_ROWS.get(kind, OTHER_ROWS), CHUNK_BYTES.get(kind, OTHER_BYTES) // (4 * vocabulary))
        tokens = len(self.hidden_TD)
        number = -(-tokens // at_once)
        for index in range(number):
            yield slice(index * tokens // number, (index + 1) * tokens // number)

    def logits(self, chunk: slice) -> Tensor:
        return F.linear(self.hidden_TD[chunk], self.weight_VD, self.bias_V)


class _Gradients:
    """The gradients of hidden states, weight and bias, as far as they are needed, added up in float32."""

    def __init__(self, head: _Products, needed: tuple[bool, ...]) -> None:
        self._head = head
        self._sums = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if tensor is not None and need
            else None
            for tensor, need in zip(head.given, needed, strict=False)
        ]

    def add(self, chunk: slice, gradient_CV: Tensor, factor_C: Tensor) -> None:
        """Add the gradient at the logits of a chunk, times a factor for each token."""
        # The factor goes to what is D wide, not V.
        factor_C1 = factor_C[:, None].to(gradient_CV.dtype)
        hidden_TD, weight_VD, bias_V = self._sums
        if hidden_TD is not None:
            hidden_TD[chunk] = (gradient_CV @ self._head.weight_VD) * factor_C[:, None]
        if weight_VD is not None:
            add_product(weight_VD, gradient_CV.T, self._head.hidden_TD[chunk] * factor_C1)
        if bias_V is not None:
            add_product(bias_V[:, None], gradient_CV.T, factor_C1)

    def of_inputs(self) -> tuple[Tensor | None, ...]:
        sums = zip(self._sums, self._head.given, strict=True)
        return tuple(None if total is None or of is None else total.to(_gradient_dtype(of)) for total, of in sums)


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """Of a weight in bfloat16 whose gradients are added up in float32, they stay as they are."""
    wanted = tensor.grad_dtype if tensor.is_leaf else None
    return wanted or tensor.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` in the data type of the total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _targets(targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The targets with token 0 in place of those that do not count, and 1 for each that does, 0 for the others."""
    return targets_C.clamp(min=0).long(), (targets_C >= 0).float()
