"""The decoder-only language model: embedding, blocks, head, initialisation. One device; nothing here is parallel.

Shapes: B rows, S positions, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.model.attention import Attend, Attention, CachedAttention
from moe_lm.model.drawing import fill_normal
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.latent_attention import LatentAttention
from moe_lm.model.layers import MLP, Head, build_norm, compute_dtype, sinusoidal_positions
from moe_lm.model.moe import MoE, Routing, logical
from moe_lm.model.rotary import Angles, Rotary


class ModelOutput(NamedTuple):
    """Logits `[B, S, V]` and what the router of every MoE layer decided, in layer order."""

    logits: Tensor
    routings: list[Routing]


class LayerDevices(NamedTuple):
    """The devices of a model that lies on several: the one that takes its ids, and that of each layer."""

    entry: torch.device
    layers: tuple[torch.device, ...]


class LanguageModel(nn.Module):
    """Token ids in, next-token logits out. Parameters are named as in Hugging Face's `dots1` and `deepseek_v3`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layer_devices: LayerDevices | None = None  # on one device
        self.cached_attention: Callable[[KVCache], Attend] = CachedAttention  # or a kernel
        self.model = Transformer(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self._tie()

    def forward(self, input_ids_BS: Tensor, position_ids_BS: Tensor, attend: Attend) -> ModelOutput:
        hidden_BSD, routings = self.model(input_ids_BS, position_ids_BS, attend)
        return ModelOutput(self.lm_head(hidden_BSD), routings)

    @property
    def device(self) -> torch.device:
        """The device that takes the ids."""
        return self.lm_head.weight.device if self.layer_devices is None else self.layer_devices.entry

    @property
    def moe_layers(self) -> list[MoE]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    def materialise(self, device: torch.device) -> None:
        """Allocate the memory of a model that was built on the meta device, without filling it."""
        self.to_empty(device=device)
        self._tie()

    def materialise_buffers(self, device: torch.device) -> None:
        """As `materialise`, but for the parameters, which stay on the meta device."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))

    def initialise(self, seed: int, first_expert: int = 0) -> None:
        """Fill every parameter and buffer as `initialise_tensor` does."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            initialise_tensor(name, tensor, self.config, seed, first_expert if is_expert(name) else 0)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class Transformer(nn.Module):
    """Embedding, blocks and the last norm: token ids in, hidden states out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.residual_dtype: torch.dtype | None = None  # of the stream between the blocks; None: the embedding's

    def forward(self, input_ids_BS: Tensor, position_ids_BS: Tensor, attend: Attend) -> tuple[Tensor, list[Routing]]:
        x_BSD = self.embed_tokens(input_ids_BS)
        angles = None
        if self.config.position_embedding == "rope":
            angles = self.rotary.angles(position_ids_BS)
        elif self.config.position_embedding == "learned":
            x_BSD = x_BSD + self.embed_positions(position_ids_BS)
        else:
            x_BSD = x_BSD + sinusoidal_positions(position_ids_BS, self.config.hidden_size).to(x_BSD.dtype)
        x_BSD = x_BSD.to(self.residual_dtype or x_BSD.dtype)
        routings = []
        for layer in self.layers:
            x_BSD, routing = layer(x_BSD, angles, attend)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BSD), routings


class Block(nn.Module):
    """Pre-norm block: attention, then a dense feed-forward layer or a Mixture of Experts.

    Recomputation (engine/recomputation.py) wraps `attend_and_route`, and `contract` of the feed-forward layers.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = LatentAttention(config, layer) if config.kv_lora_rank else Attention(config, layer)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config, config.intermediate_size)

    def forward(self, x_BSD: Tensor, angles: Angles | None, attend: Attend) -> tuple[Tensor, Routing | None]:
        x_BSD, normed_BSD, routing = self.attend_and_route(x_BSD, angles, attend)
        out_BSD = self.mlp(normed_BSD) if routing is None else self.mlp(normed_BSD, routing)[0]
        return x_BSD + out_BSD, routing

    def attend_and_route(
        self, x_BSD: Tensor, angles: Angles | None, attend: Attend
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """The residual stream behind the attention, its norm in the data type of products, and what the router says."""
        normed_BSD = self.input_layernorm(x_BSD)
        x_BSD = x_BSD + self.self_attn(normed_BSD.to(compute_dtype(normed_BSD)), angles, attend)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        routing = self.mlp.gate(normed_BSD) if isinstance(self.mlp, MoE) else None
        return x_BSD, normed_BSD.to(compute_dtype(normed_BSD)), routing


# The initial value of a tensor, by its logical name:
#   *norm.weight              ones
#   *.bias, *correction_bias  zeros
#   everything else           normal, mean 0, standard deviation `initializer_range`, drawn by (seed, name, index) with
#                             the index in the logical tensor: a rank that holds only a part of the model draws only
#                             that, and the same numbers.


@torch.no_grad()
def initialise_tensor(name: str, rows: Tensor, config: ModelConfig, seed: int, first: int = 0) -> None:
    """Fill one tensor, or the rows of one from its row `first` on; those of a stack are its experts."""
    for part, view in logical(name, rows).items():
        initialise_logical(part, view, config, seed, first * view[0].numel())


def initialise_logical(name: str, tensor: Tensor, config: ModelConfig, seed: int, first: int = 0) -> None:
    """Fill a logical tensor, or the elements of one from its element `first` on, in row-major order."""
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
    elif name.endswith("bias"):
        tensor.zero_()
    else:
        fill_normal(tensor, config.initializer_range, f"{seed}/{name}", first)


def is_expert(name: str) -> bool:
    """Whether a parameter of this name is a stack of routed experts."""
    return ".mlp.experts." in name


def generator_of(key: str) -> torch.Generator:
    """A generator seeded by `key`; on the CPU, so that every device starts from the same numbers."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
