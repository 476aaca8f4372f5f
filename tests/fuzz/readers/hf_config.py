"""config.json of a Hugging Face folder: its settings, and the names of the tensors that it promises."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from moe_lm.tools.interop.families import FAMILIES, REQUIRED
from moe_lm.tools.interop.hf_config import read_config
from moe_lm.tools.interop.hf_folder import CONFIG, read_json
from moe_lm.tools.interop.hf_tensors import check_counts, tensor_pairs
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_json

SIZES = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 64, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "shared_expert_intermediate_size": 16, "num_key_value_heads": 2,
    "head_dim": 8, "moe_num_experts": 4, "moe_k": 2,
}  # fmt: skip
MORE = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "layer_types": ["full_attention", "full_attention"], "sliding_window": None, "mlp_only_layers": [0],
    "decoder_sparse_step": 1, "first_k_dense_replace": 1, "torch_dtype": "bfloat16", "quantization_config": None,
}  # fmt: skip


class Tensors:
    """A folder of a hundred tensors, whose names do not matter here."""

    def names(self) -> Iterable[str]:
        return map(str, range(100))

    def shape(self, name: str) -> tuple[int, ...]:
        raise AssertionError

    def dtype(self, name: str) -> torch.dtype:
        raise AssertionError

    where = shape

    def rows(self, name: str, start: int, stop: int, *across: slice) -> torch.Tensor:
        raise AssertionError


def prepare(folder: Path) -> Read:
    file = folder / CONFIG

    def read(data: bytes) -> None:
        file.write_bytes(data)
        family, config, _ = read_config(read_json(file), str(file))
        check_counts(Tensors(), config, str(folder))
        tensor_pairs(config, family)

    return read


def seeds() -> list[bytes]:
    found = []
    for family in FAMILIES:
        config = {key.theirs: SIZES[key.theirs] for key in family.keys if key.default is REQUIRED}
        config |= {key.theirs: key.default for key in family.keys if key.default is not REQUIRED}
        found.append({"model_type": family.model_type, "architectures": [family.architecture], **config})
    return [json.dumps(config | more).encode() for config in found for more in ({}, MORE) if not more or _takes(config)]


def _takes(config: dict[str, object]) -> bool:
    return config["model_type"] in ("deepseek_v3", "qwen3_moe")


READER = Reader("hf-config", prepare, seeds, mutate_json, inputs_in_ci=40)
