"""Cached decoding: the tokens that the model without a cache gives, whatever is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.generate.decode import Decoder, Settings, generate
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.kernels import kernels
from moe_lm.model.attention import PackedAttention
from moe_lm.model.transformer import LanguageModel, ModelOutput

BASE = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=40,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    initializer_range=0.3,  # far from uniform, so that no two tokens are nearly equal
)
CONFIGS = {
    "grouped-query": BASE,
    "one query head a key head": BASE.model_copy(update={"num_key_value_heads": 4}),
    "latent": ModelConfig(
        **BASE.model_dump()
        | {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
        | {"q_lora_rank": 24, "num_key_value_heads": None, "use_qk_norm": False, "rope_interleave": True}
    ),
    "dense, tied": BASE.model_copy(update={"n_routed_experts": 0, "tie_word_embeddings": True}),
    "classic": BASE.model_copy(
        update={"n_routed_experts": 0, "norm_type": "layernorm", "position_embedding": "learned", "use_qk_norm": False}
    ),
    "sinusoidal, softmax router": BASE.model_copy(
        update={"position_embedding": "sinusoidal", "scoring_func": "softmax"}
    ),
}
PROMPTS = [[5], [7, 11, 13, 17, 19, 23, 29], [2, 3, 5], [31] * 12]
SAMPLING = {"greedy": GREEDY, "seeded": Sampling(temperature=1.2, top_k=50, top_p=0.95)}


def build(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    model.initialise(seed=3)
    kernels.apply(model, kernels.choose(torch.device("cpu"), decoding=True))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build(BASE)


@torch.inference_mode()
def uncached(model: LanguageModel, prompt: Sequence[int], settings: Settings, row: int) -> list[int]:
    """The whole text through the model for every token; its choice draws as row `row` of a batch."""
    ids = list(prompt)
    generator = torch.Generator().manual_seed(settings.seed + row)
    for _ in range(settings.max_new_tokens):
        ids += settings.sampling(full_logits(model, ids)[None, -1], [generator]).tolist()
    return ids[len(prompt) :]


def full_logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    return full_output(model, ids).logits[0]


def full_output(model: LanguageModel, ids: Sequence[int]) -> ModelOutput:
    attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    output: ModelOutput = model(torch.tensor([ids]), torch.arange(len(ids))[None], attend)
    return output


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_batch_equals_uncached_rows(config: ModelConfig, sampling: Sampling) -> None:
    model = build(config)
    settings = Settings(20, sampling, seed=11)
    texts = generate(model, PROMPTS, settings)
    assert texts == [uncached(model, prompt, settings, row) for row, prompt in enumerate(PROMPTS)]
    assert len(set(map(tuple, texts))) == len(PROMPTS)


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_batch_equals_single_when_rows_end_at_different_steps(model: LanguageModel, sampling: Sampling) -> None:
    stop_ids = range(0, 97, 9)
    batch = generate(model, PROMPTS, Settings(25, sampling, seed=4), stop_ids)
    alone = [generate(model, [p], Settings(25, sampling, seed=4 + row), stop_ids)[0] for row, p in enumerate(PROMPTS)]
    assert batch == alone
    assert len(set(map(len, batch))) > 1


def test_a_row_ends_before_a_stop_token(model: LanguageModel) -> None:
    free = generate(model, PROMPTS, Settings(15))
    stop = free[1][6]
    for text, cut in zip(free, generate(model, PROMPTS, Settings(15), {stop}), strict=True):
        assert cut == (text[: text.index(stop)] if stop in text else text)


def test_rows_end_when_no_position_is_left(model: LanguageModel) -> None:
    texts = generate(model, [[1] * 40, [2] * 37, [3]], Settings(1000))
    assert [len(text) for text in texts] == [1, 4, 40]
    assert texts == [generate(model, [prompt], Settings(1000))[0] for prompt in ([1] * 40, [2] * 37, [3])]


def test_tokens_stream_step_by_step(model: LanguageModel) -> None:
    decoder = Decoder(model, 2, 40)
    for prompt in PROMPTS[:2]:
        decoder.add(prompt, Settings(3))
    pairs = [(step.request, step.token) for step in decoder.run()]
    assert [row for row, _ in pairs] == [0, 1, 0, 1, 0, 1]
    assert [token for row, token in pairs if row == 1] == generate(model, PROMPTS[:2], Settings(3))[1]


def test_ids_beyond_the_tokenizer_are_never_chosen(model: LanguageModel) -> None:
    settings = Settings(30, Sampling(temperature=5.0), seed=1)
    assert max(generate(model, [[5]], settings)[0]) >= 50
    assert max(generate(model, [[5]], settings, vocab_size=50)[0]) < 50


def test_no_prompts_give_no_texts(model: LanguageModel) -> None:
    assert generate(model, [], Settings()) == []


def test_a_prompt_that_does_not_fit_is_refused_before_any_work(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="prompt has 41 tokens, more than the model's max_position_embeddings=40"):
        generate(model, [[1], [1] * 41], Settings())


def test_a_prompt_without_a_token_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="begin it with the tokenizer's bos"):
        generate(model, [[1], []], Settings())


def test_damaged_weights_are_a_clear_error() -> None:
    model = build(BASE)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(MoeLmError, match="logits are not numbers"):
        generate(model, [[1, 2]], Settings())
