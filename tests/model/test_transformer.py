"""The whole model: packing leaks nothing, causality, initialisation, autocast, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.kernels import kernels
from moe_lm.model.attention import PackedAttention
from moe_lm.model.size import on_meta
from moe_lm.model.transformer import LanguageModel, initialise_tensor
from tests.tiny import LATENT, packed, tiny, tiny_model

VOCABULARY, HIDDEN = 64, 32
DENSE: dict[str, Any] = {"n_routed_experts": 0, "first_k_dense_replace": 0}
MOE: dict[str, Any] = {"n_routed_experts": 8}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {**MOE, "first_k_dense_replace": 1},
    "qwen2_moe": {
        **MOE, "shared_expert_gate": True, "shared_expert_intermediate_size": 24, "mlp_only_layers": (1,),
        "partial_rotary_factor": 0.5, "rope_interleave": True, "qk_norm_over": "projection",
        "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
    },
    "deepseek_v3": {
        **MOE, **LATENT, "first_k_dense_replace": 1, "v_head_dim": 16, "rope_interleave": True, "attention_bias": True,
    },
    "classic": {
        "norm_type": "layernorm", "hidden_act": "relu", "mlp_gated": False, "position_embedding": "learned",
        "use_qk_norm": False, "attention_out_bias": True, "mlp_bias": True, "lm_head_bias": True,
    },
    "sinusoidal": {"position_embedding": "sinusoidal", "hidden_act": "gelu", "tie_word_embeddings": True},
}  # fmt: skip


def build(seed: int = 0, **changes: Any) -> LanguageModel:
    """A model whose logits are of order 1, in the kernels that it trains in."""
    model = tiny_model(seed, **DENSE | changes)
    kernels.apply(model, kernels.choose(model.device))
    return model


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


LENGTHS = [7, 1, 9, 4]
MINE = slice(8, 17)  # the third document


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_equal_each_document_alone(kind: str) -> None:
    model, tokens = build(**KINDS[kind]), random_tokens(sum(LENGTHS))
    logits = model(tokens, *packed(LENGTHS)).logits[0]
    for piece, document in zip(logits.split(LENGTHS), tokens[0].split(LENGTHS), strict=True):
        alone = model(document[None], *packed([len(document)])).logits[0]
        torch.testing.assert_close(piece, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "rounding"), [("dense", 0), ("classic", 0), ("sinusoidal", 0), ("moe", 1e-5)])
def test_other_documents_do_not_change_a_bit_of_the_logits(kind: str, rounding: float) -> None:
    """But an expert's matrix product gets other neighbours, and so may round differently."""
    model, tokens = build(**KINDS[kind]), random_tokens(sum(LENGTHS))
    other = random_tokens(sum(LENGTHS), seed=1)
    other[:, MINE] = tokens[:, MINE]
    first, second = (model(ids, *packed(LENGTHS)).logits[:, MINE] for ids in (tokens, other))
    torch.testing.assert_close(first, second, rtol=0, atol=rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_nan_do_not_cross_documents(kind: str) -> None:
    model, tokens = build(**KINDS[kind]), random_tokens(sum(LENGTHS))
    kept: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _module, _input, out: kept.append(out) or out)
    model(tokens, *packed(LENGTHS)).logits[:, MINE].square().sum().backward(inputs=kept)
    grad = kept[0].grad[0]
    assert grad[MINE].abs().amax(-1).gt(0).all()
    assert not grad[: MINE.start].any()
    assert not grad[MINE.stop :].any()

    poison = torch.full((1, sum(LENGTHS), 1), torch.nan)
    poison[:, MINE] = 0.0
    model.model.embed_tokens.register_forward_hook(lambda _module, _input, out: out + poison)
    logits = model(tokens, *packed(LENGTHS)).logits
    assert logits[:, MINE].isfinite().all()
    assert logits[:, : MINE.start].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_do_not_change_earlier_logits(kind: str) -> None:
    model, tokens = build(**KINDS[kind]), random_tokens(12)
    later = tokens.clone()
    later[:, 8:] = random_tokens(4, seed=1)
    first, second = (model(ids, *packed([12])).logits[:, :8] for ids in (tokens, later))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_rows_are_independent() -> None:
    model, tokens = build(**KINDS["moe"]), random_tokens(16).view(2, 8)
    position_ids = torch.arange(8).expand(2, -1)
    together = model(tokens, position_ids, PackedAttention(torch.tensor([0, 8, 16]).int(), 8)).logits
    for row in range(2):
        alone = model(tokens[row : row + 1], *packed([8])).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


def test_each_moe_layer_reports_its_routing() -> None:
    model = build(**MOE, mlp_only_layers=(1,))
    output = model(random_tokens(10), *packed([10]))
    assert [layer for layer in range(3) if model.config.is_moe_layer(layer)] == [0, 2]
    assert len(model.moe_layers) == len(output.routings) == 2
    for routing in output.routings:
        assert routing.experts.shape == routing.weights.shape == (10, 3)
        assert routing.logits.shape == routing.scores.shape == (10, 8)


def test_initial_weights_depend_only_on_seed_and_name() -> None:
    first, again, other = build(0, **MOE), build(0, **MOE), build(1, **MOE)
    deeper = dict(build(0, **MOE, num_hidden_layers=4, vocab_size=65).named_parameters())
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        if weight.ndim >= 2:
            assert not torch.equal(weight, other.get_parameter(name))
        if weight.shape == deeper[name].shape:
            assert torch.equal(weight, deeper[name])
    same_shape = [weight.flatten() for name, weight in first.named_parameters() if name.endswith("q_proj.weight")]
    assert not torch.equal(same_shape[0], same_shape[1])


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (3, 5), (7, 8)])
def test_a_slice_of_the_experts_starts_as_the_slice_of_the_whole(start: int, stop: int) -> None:
    whole = build(7, **MOE)
    for name, stack in whole.named_parameters():
        if ".experts." in name:
            part = torch.empty_like(stack[start:stop])
            initialise_tensor(name, part, whole.config, seed=7, first=start)
            assert torch.equal(part, stack[start:stop])


def test_initial_weights_have_the_spread_that_the_config_asks_for() -> None:
    model = build(**MOE, initializer_range=0.006, attention_bias=True, lm_head_bias=True)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("norm.weight"):
            assert bool((tensor == 1).all()), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert tensor.std().item() == pytest.approx(0.006, rel=0.15), name
            assert abs(tensor.mean().item()) < 0.006 * 6 / tensor.numel() ** 0.5, name


def test_a_model_built_on_meta_starts_as_one_built_on_the_cpu() -> None:
    model = on_meta(tiny(first_k_dense_replace=0)).to_empty(device="cpu")
    model.initialise(3)
    for name, tensor in tiny_model(3, first_k_dense_replace=0).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_tied_embeddings_are_one_matrix_with_the_gradient_of_both() -> None:
    tied, tokens = build(tie_word_embeddings=True), random_tokens(9)
    apart = build()
    apart.load_state_dict(tied.state_dict())
    for model in (tied, apart):
        model(tokens, *packed([9])).logits.square().mean().backward()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    both = apart.lm_head.weight.grad + apart.model.embed_tokens.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, both)


def loss_and_gradients(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor | None]]:
    tokens = random_tokens(sum(LENGTHS))
    output = model(tokens, *packed(LENGTHS))
    loss = F.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:])
    for routing in output.routings:
        loss = loss + 0.01 * routing.logits.logsumexp(-1).square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_near_float32(kind: str) -> None:
    """Weights and gradients stay in float32; loss and gradients agree to bfloat16's 3 digits."""
    model = build(**KINDS[kind])
    exact, exact_grads = loss_and_gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, near_grads = loss_and_gradients(model)
    torch.testing.assert_close(near, exact, rtol=0.01, atol=0)
    for name, grad in near_grads.items():
        assert grad.dtype == torch.float32
        assert F.cosine_similarity(grad.flatten(), exact_grads[name].flatten(), dim=0) > 0.98, name


def test_a_capacity_is_shared_by_the_documents_of_a_row() -> None:
    """The one thing that packed documents share, by Switch's and GShard's definition: room at the experts."""
    model, tokens = build(**MOE, capacity_factor=0.5), random_tokens(sum(LENGTHS))
    kept = [routing.weights[MINE] > 0 for routing in model(tokens, *packed(LENGTHS)).routings]
    alone = [routing.weights > 0 for routing in model(tokens[:, MINE], *packed([9])).routings]
    assert not all(torch.equal(*pair) for pair in zip(kept, alone, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "moe", "qwen2_moe", "deepseek_v3"])
def test_compiled_blocks_equal_eager_ones(kind: str, autocast: bool) -> None:
    """Block by block, as training compiles them; another packing must not fail either."""
    model = build(**KINDS[kind], num_hidden_layers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, grads = loss_and_gradients(model)
        for layer in model.model.layers:
            layer.compile()
        compiled, compiled_grads = loss_and_gradients(model)
        model(random_tokens(sum(LENGTHS)), *packed([10, 11]))
    torch.testing.assert_close(compiled, loss, rtol=0.01 if autocast else 1e-5, atol=0)
    for name, grad in compiled_grads.items():
        if autocast:
            assert F.cosine_similarity(grad.flatten(), grads[name].flatten(), dim=0) > 0.98, name
        else:
            torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["moe", "deepseek_v3"])
def test_blocks_are_traced_whole(kind: str) -> None:
    """A break would compile training in pieces, slowly and silently. Tracing needs no compiler."""
    model = build(**KINDS[kind], num_hidden_layers=2)
    loss, _ = loss_and_gradients(model)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    traced, _ = loss_and_gradients(model)
    torch._dynamo.reset()
    torch.testing.assert_close(traced, loss, rtol=1e-5, atol=0)
