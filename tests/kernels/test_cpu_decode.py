"""The C++ of a decoding step against the torch code that it replaces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from moe_lm.config.model import LoraConfig
from moe_lm.kernels import cpu_decode
from moe_lm.kernels.native.build import library
from moe_lm.model import lora, rotary
from moe_lm.model.attention import Attention, CachedAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.layers import ACTIVATIONS, MLP, RMSNorm
from moe_lm.model.lora import LoraExperts, LoraLinear
from moe_lm.model.moe import MoE, dispatch_locally
from moe_lm.model.transformer import LanguageModel
from tests.model.test_decoding import KINDS, build, empty_cache, extend, prefill, random_prompts
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Module = TypeVar("Module", bound=nn.Module)


def native(module: Module) -> Module:
    """A copy that decodes in C++."""
    module = copy.deepcopy(module)
    if isinstance(module, LanguageModel):
        cpu_decode.apply(module)
    else:
        cpu_decode.swap(module)
    return module


def both_ways(module: Module, compute: Callable[[Module], Any]) -> tuple[Any, Any]:
    """The results of the C++ and of torch."""
    with torch.inference_mode():
        return compute(native(module)), compute(module)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """As near as the data type allows for the size of the largest entry: bfloat16 is rounded in other places."""
    atol = TOLERANCE[expected.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 128), (7, 1), (33, 70), (100, 131)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33])
def test_linear(rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    x = random(rows, 1, inputs, dtype=dtype)
    assert_near(*both_ways(layer, lambda layer: layer(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward(bias: bool, gated: bool, activation: str, dtype: torch.dtype) -> None:
    shape = {"hidden_size": 20, "num_attention_heads": 2, "n_routed_experts": 0}
    config = tiny(**shape, mlp_bias=bias, mlp_gated=gated, hidden_act=activation)
    mlp, x = MLP(config, 70).to(dtype), random(5, 1, 20, dtype=dtype)
    assert_near(*both_ways(mlp, lambda mlp: mlp(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 64, 100])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(size, 1e-6)
    norm.weight.data = random(size, dtype=dtype)
    x = random(3, 1, 2 * size, dtype=dtype)[..., size:]  # not contiguous, like the latent of latent attention
    assert_near(*both_ways(norm, lambda norm: norm(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("size", [12, 20])  # of which 12 are rotated
def test_rotate(size: int, interleave: bool, dtype: torch.dtype) -> None:
    x, angles = random(3, 2, 4, size, dtype=dtype), random(3, 2, 1, 6, seed=1)
    with torch.inference_mode():
        found, expected = (f(x, angles.cos(), angles.sin(), interleave) for f in (cpu_decode.rotate, rotary.rotate))
    assert_near(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[0], [3, 0, 40, 17], [9, 9]])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 16), (6, 2, 10), (8, 1, 64)])
def test_attention_over_a_cache(heads: int, key_heads: int, size: int, lengths: list[int], dtype: torch.dtype) -> None:
    config = tiny(num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=size)
    rows, layer = len(lengths), Attention(config, 1)
    q = random(rows, 1, heads, size, dtype=dtype)
    k, v = (random(rows, 1, key_heads, size, dtype=dtype, seed=seed) for seed in (1, 2))

    def compute(attention: type[CachedAttention]) -> tuple[Tensor, Tensor, Tensor]:
        cache = KVCache(config, rows + 1, 48, torch.device("cpu"), dtype).view(0, rows)
        cache.keys.copy_(random(*cache.keys.shape, dtype=dtype, seed=3))
        cache.values.copy_(random(*cache.values.shape, dtype=dtype, seed=4))
        cache.lengths.copy_(torch.tensor(lengths))
        return attention(cache)(layer, q, k, v), cache.keys, cache.values

    with torch.inference_mode():
        found, expected = compute(cpu_decode.NativeCachedAttention), compute(CachedAttention)
    assert_near(found[0], expected[0])
    assert found[1].equal(expected[1])
    assert found[2].equal(expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_experts(tokens: int, gated: bool, activation: str, dtype: torch.dtype) -> None:
    moe = mixture(dtype, mlp_gated=gated, hidden_act=activation)
    x = random(tokens, 1, 48, dtype=dtype)
    assert_near(*both_ways(moe, lambda moe: moe(x)[0]))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_router(dtype: torch.dtype, normalise: bool, scoring: str) -> None:
    moe = mixture(dtype, scoring_func=scoring, norm_topk_prob=normalise, routed_scaling_factor=2.5)
    moe.gate.e_score_correction_bias = random(8, seed=5)
    x = random(9, 1, 48, dtype=dtype)
    found, expected = both_ways(moe.gate, lambda gate: gate(x))
    assert found.experts.equal(expected.experts)
    for name in ("logits", "scores", "weights"):
        assert_near(getattr(found, name), getattr(expected, name))


def test_experts_that_nobody_chose_are_not_read() -> None:
    moe = native(mixture(torch.float32))
    x = random(1, 1, 48)
    with torch.inference_mode():
        expected, routing = moe(x)
        others = [expert for expert in range(8) if expert not in routing.experts]
        for stack in moe.experts.parameters():
            stack[others] = torch.nan
        assert moe(x)[0].equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 24, 40])  # whole vectors, and a rest
def test_rows_get_the_same_bits_whatever_is_beside_them(width: int, dtype: torch.dtype) -> None:
    widths = {"intermediate_size": width, "moe_intermediate_size": width}
    model = native(build(**KINDS["moe"] | widths, head_dim=32).to(dtype))
    with torch.inference_mode():
        cache, rows = empty_cache(model, 4, dtype), range(4)
        prefill(model, random_prompts(), cache)
        alone = []
        for row in rows:
            cache_of_row = empty_cache(model, 1, dtype)
            cache_of_row.keys.copy_(cache.keys[:, row : row + 1])
            cache_of_row.values.copy_(cache.values[:, row : row + 1])
            cache_of_row.lengths = cache.lengths[row : row + 1].clone()
            alone.append(extend(model, torch.tensor([[row]]), cache_of_row))
        assert extend(model, torch.tensor(rows)[:, None], cache).equal(torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_whole_model(kind: str) -> None:
    model = build(**KINDS[kind])

    def compute(model: LanguageModel) -> Tensor:
        cache = empty_cache(model, 4)
        prefill(model, random_prompts(), cache)
        return extend(model, torch.tensor([[1], [2], [3], [4]]), cache)

    found, expected = both_ways(model, compute)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_threads_change_no_bit() -> None:
    """Also when two callers come at the same time, so that one finds the helpers taken."""
    layer, x = native(nn.Linear(256, 4096, bias=False)), random(3, 1, 256)
    before = torch.get_num_threads()

    def compute(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return torch.stack([layer(x) for _ in range(300)])

    try:
        expected = compute(1)[0]
        with ThreadPoolExecutor(2) as callers:
            for found in (compute(3), *callers.map(compute, (3, 3))):
                assert all(result.equal(expected) for result in found)
    finally:
        torch.set_num_threads(before)


def test_what_has_no_room_in_the_cache_is_not_written() -> None:
    model = native(build(**KINDS["moe"]))
    cache = empty_cache(model, 1)
    cache.lengths += cache.keys.shape[3]
    with torch.inference_mode(), pytest.raises(IndexError, match="has no room for another"):
        extend(model, torch.tensor([[1]]), cache)


def test_broken_logits_choose_different_experts() -> None:
    gate = native(mixture(torch.float32)).gate
    with torch.inference_mode():
        routing = gate(torch.full((2, 1, 48), torch.nan))
    assert routing.experts.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.weights.isnan().all()


def test_angles_of_one_row_serve_all() -> None:
    x, angles = random(3, 2, 4, 12), random(1, 2, 1, 6, seed=1)
    with torch.inference_mode():
        each = [angle.expand(3, -1, -1, -1) for angle in (angles.cos(), angles.sin())]
        assert cpu_decode.rotate(x, angles.cos(), angles.sin()).equal(cpu_decode.rotate(x, *each))


def test_broken_weights_give_no_numbers() -> None:
    layer, norm = native(nn.Linear(64, 8, bias=False)), native(RMSNorm(64, 1e-6))
    x = random(2, 1, 64)
    x[0, 0, 3] = torch.nan
    torch.nn.init.ones_(norm.weight)
    with torch.inference_mode():
        out = layer(norm(x))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_serves_inference_in_one_data_type_only() -> None:
    x, weight = random(2, 1, 8), random(4, 8)
    assert not cpu_decode.serves(x, weight)
    with torch.no_grad():
        assert not cpu_decode.serves(x, weight)
    with torch.inference_mode():
        assert cpu_decode.serves(x, weight)
        assert cpu_decode.is_few(x)
        assert not cpu_decode.is_few(random(cpu_decode.MAX_ROWS + 1, 8))
        assert not cpu_decode.serves(x.bfloat16(), weight)
        assert not cpu_decode.serves(x.double(), weight.double())
        with torch.autocast("cpu"):
            assert not cpu_decode.serves(x, weight)


def test_adapted_modules_keep_their_class() -> None:
    """So that their adapters count, whatever else of the model decodes in C++."""
    model = build(**KINDS["moe"])
    lora.freeze(model, LoraConfig(targets=("experts", "attention")), None)
    adapted = native(model)
    for name, module in model.named_modules():
        swapped = adapted.get_submodule(name)
        is_adapted = isinstance(module, LoraLinear | LoraExperts | Attention)
        assert type(swapped) is (type(module) if is_adapted else cpu_decode.NATIVE.get(type(module), type(module)))
    assert all(layer.dispatcher is dispatch_locally for layer in adapted.moe_layers)


def mixture(dtype: torch.dtype, **changes: Any) -> MoE:
    moe = MoE(tiny(hidden_size=48, moe_intermediate_size=40, **changes)).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(moe.parameters()):
            parameter.copy_(random(*parameter.shape, seed=index) * 0.3)
        moe.gate.e_score_correction_bias.zero_()
    return moe
