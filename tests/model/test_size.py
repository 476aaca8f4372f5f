"""Parameters and FLOPs: by part, of the whole model and of what one token passes through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.model.size import Parameters, count_parameters, flops_per_token, on_meta
from tests.processes import ROOT

FILES = sorted((ROOT / "configs" / "model").glob("*.yaml"))
LADDER = ("modern-dense", "every-expert", "switch", "gshard", "deepseekmoe")


def config_named(name: str) -> ModelConfig:
    return load_config(ModelConfig, FILES[0].parent / f"{name}.yaml")


def built_parameters(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any small model that the config class accepts: every switch, dense and sparse layers mixed."""
    kv_heads, repeats = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 4))
    n_shared_experts, use_qk_norm = draw(st.integers(0, 2)), draw(st.booleans())
    latent = draw(st.sampled_from((None, 8, 20)))
    if latent is None:
        attention = {
            "num_key_value_heads": kv_heads, "head_dim": 2 * draw(st.integers(1, 8)), "use_qk_norm": use_qk_norm,
            "qk_norm_over": draw(st.sampled_from(("head", "projection"))) if use_qk_norm else "head",
            "position_embedding": draw(st.sampled_from(("rope", "learned", "sinusoidal"))),
        }  # fmt: skip
    else:
        attention = {
            "kv_lora_rank": latent, "q_lora_rank": draw(st.sampled_from((None, 12))), "use_qk_norm": False,
            "qk_nope_head_dim": draw(st.integers(1, 8)), "qk_rope_head_dim": 2 * draw(st.integers(1, 4)),
            "v_head_dim": draw(st.integers(1, 8)),
        }  # fmt: skip
    return ModelConfig(
        vocab_size=draw(st.integers(1, 64)),
        hidden_size=8 * draw(st.integers(1, 4)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * repeats,
        intermediate_size=draw(st.integers(1, 40)),
        max_position_embeddings=draw(st.integers(1, 32)),
        moe_intermediate_size=8 * draw(st.integers(1, 3)),
        n_routed_experts=draw(st.sampled_from((0, groups * per_group))),
        num_experts_per_tok=draw(st.integers(1, topk_group * per_group)),
        n_shared_experts=n_shared_experts,
        shared_expert_intermediate_size=draw(st.sampled_from((None, 20))) if n_shared_experts else None,
        shared_expert_gate=draw(st.booleans()) if n_shared_experts else False,
        mlp_only_layers=tuple(draw(st.sets(st.integers(0, layers - 1), max_size=1))),
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_group=groups,
        topk_group=topk_group,
        norm_type=draw(st.sampled_from(("rmsnorm", "layernorm"))),
        mlp_gated=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        attention_out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        lm_head_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        **attention,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_count_equals_the_built_model_for_every_file(path: Path) -> None:
    config = load_config(ModelConfig, path)
    assert count_parameters(config).total == built_parameters(config)


@settings(max_examples=150, deadline=None)
@given(config=configs())
def test_count_equals_the_built_model_for_any_config(config: ModelConfig) -> None:
    count, model = count_parameters(config), on_meta(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    tables = [model.model.embed_positions] if config.position_embedding == "learned" else []
    tables += [] if config.tie_word_embeddings else [model.model.embed_tokens]
    assert count.embedding == sum(table.weight.numel() for table in tables)
    assert count.total_non_embedding == count.total - count.embedding
    assert count.routed == sum(weight.numel() for moe in model.moe_layers for weight in moe.experts.parameters())


@settings(max_examples=50, deadline=None)
@given(config=configs())
def test_active_parameters_are_those_of_a_model_with_only_the_chosen_experts(config: ModelConfig) -> None:
    chosen = config.model_copy(update={"n_routed_experts": config.num_experts_per_tok if config.moe_layers else 0})
    count = count_parameters(config)
    assert count.active == built_parameters(chosen) + count.router - count_parameters(chosen).router
    assert count.active_non_embedding == count.active - count.embedding


@pytest.mark.parametrize(("name", "expected"), [("classic-gpt-438k", 437_764), ("classic-gpt-15m", 15_466_756)])
def test_classic_gpt_has_exactly_its_known_size(name: str, expected: int) -> None:
    assert built_parameters(config_named(name)) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_comment_of_a_model_file_states_its_measured_size(path: Path) -> None:
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    stated = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}(?= parameters| active)", first_line)]
    count = count_parameters(load_config(ModelConfig, path))
    assert stated == ([count.total, count.active] if count.routed else [count.total])


def test_steps_of_the_ladder_have_the_same_active_size() -> None:
    counts = {name: count_parameters(config_named(name)) for name in LADDER}
    dense = counts["modern-dense"]
    for name, count in counts.items():
        assert count.routed_active + count.shared + count.dense == dense.dense, name
        assert count.active == pytest.approx(dense.active, rel=0.01), name
    sparse = [counts[name].total for name in ("switch", "gshard", "deepseekmoe")]
    assert max(sparse) < 1.03 * min(sparse)


def test_anchor_has_the_shape_that_throughput_was_measured_on() -> None:
    config = config_named("anchor-20m")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 256, 4096)
    assert (config.n_routed_experts, config.expert_size, config.num_experts_per_tok) == (32, 128, 4)
    assert config.moe_layers == [1, 2, 3, 4, 5]
    assert round(count_parameters(config).total, -5) == 20_500_000


def test_deepseekmoe_2b_reproduces_the_papers_table_1() -> None:
    """Table 1 of arXiv 2401.06066: 2.0B parameters, 0.3B active, 4.3T FLOPs per 2K tokens; the dense model 2.9T."""
    config = config_named("deepseekmoe-2b")
    dense = config.model_copy(update={"n_routed_experts": 0})
    count = count_parameters(config)
    assert round(count.total / 1e9, 1) == 2.0
    assert round(count.active / 1e9, 1) == 0.3
    assert round(count_parameters(dense).total / 1e9, 1) == 0.2
    assert round(2048 * flops_per_token(config, 2048, causal_half=False) / 1e12, 1) == 4.3
    assert round(2048 * flops_per_token(dense, 2048, causal_half=False) / 1e12, 1) == 2.9
    assert count.routed + count.shared == pytest.approx(16 * count_parameters(dense).dense)
    assert count.routed_active + count.shared == pytest.approx(2 * count_parameters(dense).dense)


@settings(max_examples=50, deadline=None)
@given(config=configs(), sequence_length=st.integers(1, 64))
def test_flops_are_six_for_every_multiplied_weight_plus_the_scores(config: ModelConfig, sequence_length: int) -> None:
    """Counted over the modules of the built model: every linear layer, and `k/E` of the stacked experts."""
    model = on_meta(config)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    router = sum(moe.gate.weight.numel() for moe in model.moe_layers)
    routed = sum(weight.numel() for moe in model.moe_layers for weight in moe.experts.parameters())
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts if config.n_routed_experts else 0
    width = config.num_attention_heads * (config.head_size + config.value_size)
    scores = 6 * config.num_hidden_layers * width * sequence_length
    assert flops_per_token(config, sequence_length, causal_half=False) == 6 * (linear + router + chosen) + scores
    assert flops_per_token(config, sequence_length, causal_half=True) == 6 * (linear + router + chosen) + scores // 2


def test_a_hand_counted_model() -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12, moe_intermediate_size=16, n_routed_experts=6, num_experts_per_tok=3, n_shared_experts=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    attention = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8)  # query; key and value of one head; output
    dense = 3 * 8 * 12
    experts = 6 * 8 + (3 + 1) * 3 * 8 * 16  # router; three routed and one shared expert
    head = 8 * 10
    scores = 2 * 2 * (2 * 8 * 5) * 3  # layers; q @ k and weights @ v; multiply and add x width x length; backward twice
    expected = 6 * (attention + dense + experts + head)
    assert flops_per_token(config, 5, causal_half=False) == expected + scores
    assert flops_per_token(config, 5, causal_half=True) == expected + scores // 2
    one_expert = 3 * 8 * 16
    assert count_parameters(config) == Parameters(
        embedding=10 * 8, attention=attention, dense=dense, router=6 * 8, shared=one_expert, routed=6 * one_expert,
        routed_active=3 * one_expert, head=head, vectors=8 * (2 * 2 + 1) + 2 * 2 * 4,
    )  # fmt: skip
