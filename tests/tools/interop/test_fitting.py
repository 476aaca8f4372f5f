"""Which families hold a model, and what stands in the way where none does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel
from moe_lm.tools.interop import families
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.fitting import effective, known_limit, nearest_family, obstacles
from moe_lm.tools.interop.hf_config import read_config, write_config
from tests.conftest import MoeLm
from tests.tools.interop.conftest import Save
from tests.tools.interop.shapes import HELD, LATENT, MOE, NEVER_NEAREST, SHAPE, SOFTMAX

pytestmark = pytest.mark.usefixtures("one_thread")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# Every setting of a model, changed one at a time.
CHANGES: list[dict[str, Any]] = [
    {"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {"head_dim": 16}, {"head_dim": 6},
    {"hidden_size": 40, "num_attention_heads": 3, "head_dim": 8}, {"hidden_size": 40, "num_attention_heads": 3},
    {"q_lora_rank": 8}, {"q_lora_rank": 7}, {"kv_lora_rank": 15}, {"qk_nope_head_dim": 7}, {"v_head_dim": 12},
    {"first_k_dense_replace": 1}, {"first_k_dense_replace": 2}, {"mlp_only_layers": (0,)}, {"mlp_only_layers": (1,)},
    {"n_shared_experts": 0}, {"n_shared_experts": 1}, {"n_shared_experts": 2}, {"shared_expert_intermediate_size": 24},
    {"shared_expert_gate": True}, {"shared_expert_gate": False}, {"scoring_func": "softmax"},
    {"scoring_func": "sigmoid"}, {"norm_topk_prob": False}, {"norm_topk_prob": True}, {"routed_scaling_factor": 2.5},
    {"n_group": 2, "topk_group": 1}, {"n_group": 4, "topk_group": 2}, {"n_group": 2, "topk_group": 2},
    {"n_group": 8, "topk_group": 3}, {"n_routed_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 8},
    {"num_experts_per_tok": 1}, {"norm_type": "layernorm"}, {"rms_norm_eps": 1e-3}, {"hidden_act": "relu"},
    {"hidden_act": "gelu"}, {"mlp_gated": False}, {"position_embedding": "learned"},
    {"position_embedding": "sinusoidal"}, {"rope_theta": 500.0}, {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"truncate": False}}, {"rope_scaling": YARN | {"attention_factor": 0.7}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}}, {"rope_scaling": YARN | {"mscale_all_dim": 0.7}},
    {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}, {"rope_scaling": LLAMA3},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_interleave": True}, {"rope_interleave": False},
    {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5, "rope_scaling": YARN}, {"use_qk_norm": False},
    {"use_qk_norm": True}, {"qk_norm_over": "projection"}, {"qk_norm_over": "head"}, {"attention_bias": True},
    {"attention_out_bias": True}, {"attention_bias": True, "attention_out_bias": True}, {"mlp_bias": True},
    {"lm_head_bias": True}, {"tie_word_embeddings": True}, {"intermediate_size": 56}, {"moe_intermediate_size": 24},
    {"capacity_factor": 1.0}, {"num_hidden_layers": 1},
]  # fmt: skip


def changed(family: str) -> list[ModelConfig]:
    """Every sound model that is one change away from one that the family holds."""
    configs = []
    for change in CHANGES:
        try:
            configs.append(ModelConfig(**SHAPE | HELD[family] | change))
        except ValueError:
            continue  # a change of what a model of this kind does not have
    return configs


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((name, held) for name, held in HELD.items() if name not in NEVER_NEAREST),
        ("dots1", MOE | {"first_k_dense_replace": 1, "n_shared_experts": 3}),
        ("glm4_moe", MOE | {"attention_bias": True}), ("glm4_moe", MOE | {"partial_rotary_factor": 0.5}),
        ("glm4_moe", MOE | {"use_qk_norm": False, "partial_rotary_factor": 0.5}),
        ("qwen3_moe", SOFTMAX | {"mlp_only_layers": (1,)}), ("llama", {"use_qk_norm": False, "mlp_bias": True}),
        ("dots1", MOE | {"capacity_factor": 1.5}),
    ],
)  # fmt: skip
def test_nearest_family(family: str, settings: dict[str, Any]) -> None:
    assert nearest_family(ModelConfig(**SHAPE | settings)).model_type == family


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {}, "use_qk_norm=True"), ("qwen3", MOE, "n_routed_experts=8"), ("dots1", {}, "n_routed_experts=0"),
        ("dots1", MOE | {"n_shared_experts": 0}, "n_shared_experts=0"),
        ("qwen3_moe", SOFTMAX | {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
        ("qwen3_moe", MOE, "scoring_func='sigmoid'"), ("mixtral", SOFTMAX, "use_qk_norm=True"),
        ("dots1", MOE | {"mlp_only_layers": (1,)}, "experts in layers [0]"), ("qwen3", {"hidden_act": "relu"}, None),
        ("qwen3", {"norm_type": "layernorm"}, "norm_type='layernorm'"),
        ("qwen3", {"mlp_gated": False}, "mlp_gated=False"),
        ("qwen3", {"position_embedding": "learned"}, "position_embedding='learned'"),
        ("qwen3", {"lm_head_bias": True}, "lm_head_bias=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("dots1", MOE | LATENT, "kv_lora_rank=16"), ("deepseek_v3", MOE, "kv_lora_rank=None"),
        ("deepseek_v3", MOE | LATENT | {"n_shared_experts": 0}, "n_shared_experts=0"),
        ("deepseek_v2", MOE | LATENT, "scoring_func='sigmoid', norm_topk_prob=True, rope_interleave=False"),
        *((name, held | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5")
          for name, held in HELD.items() if not name.startswith(("glm4_moe", "deepseek", "minimax", "youtu"))),
    ],
)  # fmt: skip
def test_what_a_family_cannot_hold_is_named(family: str, settings: dict[str, Any], said: str | None) -> None:
    config, kind = ModelConfig(**SHAPE | settings), families.family_of(family)
    assert kind is not None
    if said is None:
        assert write_config(config, kind)["hidden_act"] == settings["hidden_act"]
    else:
        with pytest.raises(UsageError, match=f"the family {family} cannot hold .*") as refusal:
            write_config(config, kind)
        assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            MOE | {"n_shared_experts": 0},
            "n_shared_experts=0 (dots1, glm4_moe); qk_norm_over='head' (minimax_m2); "
            "scoring_func='sigmoid' (qwen3_moe)",
        ),
        (MOE | {"scoring_func": "softmax"}, "scoring_func='softmax' (dots1, glm4_moe); n_shared_experts=1 (qwen3_moe)"),
        (MOE | {"rope_interleave": True}, "rope_interleave=True (dots1, glm4_moe)"),
        (MOE | {"mlp_only_layers": (1,)}, "experts in layers [0] (dots1, glm4_moe)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (qwen3)"),
        (MOE | LATENT | {"scoring_func": "softmax"}, "scoring_func='softmax' (deepseek_v3, glm4_moe_lite)"),
        (LATENT | {"mlp_bias": True}, "mlp_bias=True (youtu)"),
        ({"mlp_gated": False, "norm_type": "layernorm"}, "norm_type='layernorm', mlp_gated=False (qwen3)"),
    ],
)
def test_refusal_names_what_stands_in_the_way_of_the_nearest(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        nearest_family(ModelConfig(**SHAPE | settings))
    assert str(refusal.value).endswith(f"what stands in the way of the nearest: {said}")


@pytest.mark.parametrize("name", HELD)
def test_what_a_family_holds_reads_back_the_same(name: str) -> None:
    held = 0
    for config in changed(name):
        for family in families.FAMILIES:
            if not obstacles(config, family):
                assert effective(read_config(write_config(config, family), "").config) == effective(config)
                held += 1
    assert held > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD)
def test_what_a_family_holds_transformers_computes(name: str, save: Save, tmp_path: Path) -> None:
    """Or it is known that it cannot run it."""
    family = families.family_of(name)
    assert family is not None
    for config in changed(name):
        if obstacles(config, family) or known_limit(config, family):
            continue

        def disturb(model: LanguageModel) -> None:
            with torch.no_grad():
                for tensor in (weight for weight in model.state_dict().values() if weight.ndim == 1):
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
                if not family.router_bias:
                    for layer in model.moe_layers:
                        layer.gate.e_score_correction_bias.zero_()

        run = save(config.model_dump(), disturb)
        proof = export_run(run, tmp_path / "out", name)
        assert proof.not_proven == [], config
        assert len(proof.logits) == 2
        shutil.rmtree(run)
        shutil.rmtree(tmp_path / "out")


def test_partly_rotated_model_goes_out_and_comes_back(save: Save, tmp_path: Path, moe_lm: MoeLm) -> None:
    """With QK-norm and stretched positions; of all families one alone rotates a part of a head."""
    run = save(MOE | {"partial_rotary_factor": 0.5, "rope_scaling": YARN})
    exported = moe_lm("export", run, tmp_path / "out")
    assert (exported.code, exported.err) == (0, "")
    assert exported.out.startswith("export step-00000007 (glm4_moe): ")
    assert moe_lm("import", tmp_path / "out", "--run-dir", tmp_path / "again").code == 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (MOE | {"n_routed_experts": 1, "num_experts_per_tok": 1},
         "n_routed_experts=1 in n_group=1 leaves one expert a group, and its router adds up the best two of each"),
        (HELD["deepseek_v2"] | {"kv_lora_rank": 15}, "kv_lora_rank=15 is odd"),
        (HELD["llama"] | {"hidden_size": 40, "num_attention_heads": 3, "head_dim": 8},
         "hidden_size=40 is not divisible by num_attention_heads=3"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_run_is_said(
    settings: dict[str, Any], why: str, save: Save, tmp_path: Path, moe_lm: MoeLm
) -> None:
    run = save(settings)
    refused = moe_lm("export", run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert moe_lm("export", run, tmp_path / "out", "--proof-memory", 0).code == 0
    folder = tmp_path / "out"
    for done in (refused, moe_lm("import", folder, "--run-dir", tmp_path / "again")):
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: transformers ")
        assert f" cannot run this model: {why}" in done.err
        assert done.err.endswith("; nothing was kept (--proof-memory 0 compares the tensors alone)\n")
    assert not list(tmp_path.glob("again*"))


def test_share_of_a_head_that_transformers_would_ignore_is_refused_on_import() -> None:
    family = families.family_of("qwen3")
    assert family is not None
    hf = write_config(ModelConfig(**SHAPE), family)
    for where in (hf, hf["rope_parameters"]):
        where["partial_rotary_factor"] = 0.5
        with pytest.raises(UsageError, match=r"partial_rotary_factor=0.5 cannot be expressed here, expected 1.0"):
            read_config(hf, "config.json")
        del where["partial_rotary_factor"]
    assert read_config(hf, "config.json").config.partial_rotary_factor == 1.0


def hf_of(model_type: str) -> dict[str, Any]:
    """The config.json of the model in shapes.py that the family holds."""
    family = families.family_of(model_type)
    assert family is not None
    return write_config(ModelConfig(**SHAPE | HELD[model_type]), family)


def test_window_that_mistral_has_where_its_file_is_silent_is_refused() -> None:
    hf = hf_of("mistral")
    assert hf["sliding_window"] is None
    hf["max_position_embeddings"] = 8192
    assert read_config(hf, "").config.max_position_embeddings == 8192
    for window in ({"sliding_window": 4096}, {}):
        silent = {name: value for name, value in hf.items() if name != "sliding_window"} | window
        with pytest.raises(UsageError, match="sliding_window=4096 cannot be expressed here, expected null"):
            read_config(silent, "config.json")


@pytest.mark.parametrize(
    ("model_type", "keys", "said"),
    [
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types=['sparse'] cannot be expressed"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "linear"]}, "expected dense or sparse for 2 layers"),
        ("minimax_m2", {"head_dim": None}, "has no head_dim, which a model of type minimax_m2 needs"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "expected 'per_layer' of a minimax_m2"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min=0.1 cannot be expressed here"),
    ],
)
def test_what_a_newer_family_says_that_is_not_computed_is_refused(
    model_type: str, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        read_config(hf_of(model_type) | keys, "config.json")
    assert said in str(refusal.value)


def test_layers_with_experts_at_intervals_and_rotated_entries_by_number_are_read() -> None:
    ernie = hf_of("ernie4_5_moe") | {"num_hidden_layers": 8}
    ernie |= {"moe_layer_start_index": 2, "moe_layer_end_index": -1, "moe_layer_interval": 3}
    config = read_config(ernie, "").config
    assert config.moe_layers == [2, 5]
    family = families.family_of("ernie4_5_moe")
    assert family is not None
    assert not obstacles(config, family)
    uneven = config.model_copy(update={"mlp_only_layers": (0, 3, 4, 6, 7)})
    assert obstacles(uneven, family) == {"mlp_only_layers": "experts in layers [1, 2, 5]"}
    minimax = hf_of("minimax_m2")
    for where in (minimax, minimax["rope_parameters"]):
        del where["partial_rotary_factor"]
    assert read_config(minimax | {"rotary_dim": 4}, "").config.partial_rotary_factor == 0.5
