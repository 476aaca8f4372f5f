"""Models that train and sample in milliseconds, and run folders around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.checkpoint import write
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.reading import dump_config
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.engine.build import RankModel, build_engine
from moe_lm.engine.engine import Engine
from moe_lm.kernels import kernels
from moe_lm.model.attention import PackedAttention, segment_positions
from moe_lm.model.moe import all_logical
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import Topology
from moe_lm.tokenizer.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "initializer_range": 0.2,
}  # fmt: skip
LATENT: dict[str, Any] = {  # changes of SHAPE: latent attention
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "num_key_value_heads": None, "use_qk_norm": False,
}  # fmt: skip


def tiny(**changes: Any) -> ModelConfig:
    """A dense layer, then two with experts; grouped-query attention. `initializer_range` makes every weight matter."""
    return ModelConfig(**SHAPE | changes)


def tiny_model(seed: int = 1, **changes: Any) -> LanguageModel:
    """A model of `tiny(**changes)` with random weights."""
    model = LanguageModel(tiny(**changes))
    model.initialise(seed)
    return model


def positions_of(batch: Batch) -> Tensor:
    """The positions that the model is given for a batch."""
    return segment_positions(batch.cu_seqlens, batch.input_ids.shape, batch.part_of_rows)


def packed(lengths: Sequence[int]) -> tuple[Tensor, PackedAttention]:
    """Position ids `[1, T]` and attention of documents of these lengths in one row."""
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return position_ids, PackedAttention(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def logits_of(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """The logits of a document alone: [tokens, vocabulary]."""
    return model(torch.tensor([ids]), *packed([len(ids)])).logits[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one, by their logical names."""
    return all_logical((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)


def engine_of(
    model: LanguageModel, train: TrainConfig, world_size: int = 1, adapters: LoraConfig | None = None
) -> Engine:
    """The torch engine around a model, to predict the next token; id 2 is padding."""
    device = torch.device("cpu")
    kernels.apply(model, kernels.choose(device))
    built = RankModel(model, Topology(world_size=world_size), device, adapters=adapters)
    return build_engine(built, NextToken(), train, ParallelConfig(device="cpu"), pad_id=2)


def write_run(run: Path, model: LanguageModel, tokenizer: Tokenizer, config: str = "", step: int = 1) -> Path:
    """Give the folder `run` one checkpoint of the model, as training leaves it; returns `run`."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    files: dict[str, Any] = {"model.yaml": dump_config(model.config), "trainer.json": "{}", "tokenizer": tokenizer.save}
    write.save(run / "checkpoints", step, state, {"config.yaml": config} | files)
    return run
