"""A decoding step as one compiled program of fixed shapes: `torch.compile`, and on a GPU a CUDA graph of it.

A CUDA graph is for GPUs, where starting kernels one by one takes longer than most of them; on a CPU the step's C++
(kernels/cpu_decode.py) is faster than what this compiles to, and needs no half minute before the first token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.kernels.device import compiling_needs
from moe_lm.model.attention import StaticAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.moe import Routing
from moe_lm.model.transformer import LanguageModel


class CompiledStep:
    """Adds a token to the first rows of a cache.

    There are two programs, each compiled when it is first needed: for one row and for all rows of the cache. The
    second also computes the rows that are not being written; what it stores there lies beyond their lengths.

    Raises UsageError for a model on several devices, and where `torch.compile` lacks something.
    """

    def __init__(self, model: LanguageModel) -> None:
        if model.layer_devices is not None:
            raise UsageError(
                "compiled decoding needs the whole model on one device, but it lies on several; leave it out"
            )
        if needed := compiling_needs(model.device):
            raise UsageError(f"compiled decoding needs {needed}; install it, or leave it out")
        self.model = model
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self._run = torch.compile(self._forward, fullgraph=True, dynamic=False, mode=mode)
        self._cache: KVCache | None = None
        self._parts: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, cache: KVCache, tokens: Sequence[int]) -> tuple[Tensor, list[Routing]]:
        """Logits `[R, V]` after the tokens, and the routing of every row of the program.

        On a GPU the next call overwrites both. Raises MoeLmError when the program cannot be compiled.
        """
        if cache is not self._cache:
            self._cache, self._parts = cache, {}
        slots, capacity = cache.keys[0].shape[0], cache.keys[0].shape[2]
        size = 1 if len(tokens) == 1 else slots
        if size not in self._parts:
            self._parts[size] = _memory_of(cache.view(0, size))
        ids_R1 = torch.tensor([[token] for token in [*tokens, *[0] * (size - len(tokens))]], device=self.model.device)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            logits_RV, routings = self._run(*self._parts[size], ids_R1, cache.lengths[:size].clamp(max=capacity - 1))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise MoeLmError(
                f"the decoding step does not compile here ({str(error).strip().splitlines()[0]}); leave compiling out"
            ) from error
        cache.lengths[: len(tokens)] += 1
        return logits_RV[: len(tokens)], routings

    def _forward(
        self, keys: Tensor, values: Tensor | None, ids_R1: Tensor, lengths_R: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        values = keys[..., : self.model.config.kv_lora_rank] if values is None else values
        attend = StaticAttention(keys, values, lengths_R)
        hidden_R1D, routings = self.model.model(ids_R1, lengths_R[:, None], attend)
        return self.model.lm_head(hidden_R1D[:, -1]), routings


def _memory_of(part: KVCache) -> tuple[Tensor, Tensor | None]:
    """Keys, and values where they do not lie within the keys. A graph writes to them in place, without a copy."""
    assert isinstance(part.keys, Tensor)
    assert isinstance(part.values, Tensor)
    values = part.values if part.latent_size is None else None
    for memory in (part.keys, values):
        if memory is not None:
            torch._dynamo.mark_static_address(memory)
    return part.keys, values
