"""Activations computed again in the backward pass: the same numbers, fewer bytes, and nothing dear twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import Recomputation, TrainConfig
from moe_lm.data.batches import BatchSource
from moe_lm.kernels import kernels
from moe_lm.model import lora
from moe_lm.model.layers import MLP
from moe_lm.model.moe import Experts
from moe_lm.model.transformer import LanguageModel
from moe_lm.tools.plan.simulate import simulate
from tests.model.test_transformer import DENSE, KINDS, LENGTHS, loss_and_gradients, random_tokens
from tests.processes import ROOT
from tests.tiny import engine_of, packed, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["classic", "moe", "qwen2_moe", "deepseek_v3"])
def test_gradients_are_the_same_to_the_bit(kind: str, autocast: bool, how: Recomputation) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, gradients = loss_and_gradients(recomputing("none", kind))
        again, gradients_again = loss_and_gradients(recomputing(how, kind))
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients_again[name]), name


@pytest.mark.parametrize("how", ["selective", "full"])
def test_steps_are_the_same_to_the_bit_with_adapters_that_drop_inputs(ragged: BatchSource, how: Recomputation) -> None:
    results = []
    for each in ("none", how):
        model, adapters = tiny_model(3), LoraConfig(rank=2, alpha=8, dropout=0.5)
        lora.freeze(model, adapters, None)
        lora.initialise_adapters(model, 3)
        engine = engine_of(model, train_config(each), adapters=adapters)
        for step in range(2):
            halves = [ragged.batch(step, rows) for rows in (range(4), range(4, 8))]
            results.append(engine.train_step(step, halves))
    losses = [(result.loss, result.grad_norm) for result in results]
    assert losses[:2] == losses[2:]


def test_what_runs_around_a_block_may_differ_when_it_is_repeated() -> None:
    """ZeRO 3 gathers and frees weights in hooks; when evaluation came before training it frees other ones."""
    _, expected = loss_and_gradients(recomputing("none", "moe"))
    model, calls = recomputing("selective", "moe"), []

    def free(*_: object) -> None:
        calls.append(torch.empty(0) if calls else None)

    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(free)
    _, gradients = loss_and_gradients(model)
    assert len(calls) == 2  # in the forward pass and in the repeated one
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, expected[name]), name


def test_bytes_that_are_kept() -> None:
    """Of a layer without experts and two with them; the logits and the embedding are kept in any case."""
    kept = {}
    for how in ("none", "selective", "full"):
        model = recomputing(how, "moe")
        with Operations() as operations:
            output = model(random_tokens(sum(LENGTHS)), *packed(LENGTHS))
        kept[how] = operations.bytes_alive()
        del output
    assert kept["selective"] < 0.52 * kept["none"]
    assert kept["full"] < 0.15 * kept["none"]


# In each of three layers the projections to queries, keys and values and out of attention; in two the router's product.
@pytest.mark.parametrize(("kind", "repeated"), [("moe", 3 * 4 + 2), ("deepseek_v3", 3 * 5 + 2)])
def test_selective_recomputation_repeats_nothing_dear(kind: str, repeated: int) -> None:
    counts = {}
    for how in ("none", "selective", "full"):
        model = recomputing(how, kind)
        with Operations() as operations:
            loss_and_gradients(model)
        counts[how] = operations.counts
    products = {how: sum(counts[how][name] for name in ("aten::mm", "aten::addmm")) for how in counts}
    assert products["none"] + repeated == products["selective"] < products["full"]
    for name in ("aten::_grouped_mm", "aten::topk", "moe_lm::segment_attention"):
        assert counts["none"][name] == counts["selective"][name] < counts["full"][name], name
    layers = sum(isinstance(module, MLP | Experts) for module in model.modules())
    assert counts["selective"]["aten::silu"] - counts["none"]["aten::silu"] == layers > 0


def test_a_simulated_rank_repeats_no_expert_and_no_exchange() -> None:
    """The 16B model on 8 devices of 80 GB, with 2 x 4,096 tokens in each of 4 micro-batches, fits in 72 GiB."""
    model = load_config(ModelConfig, ROOT / "configs" / "model" / "deepseekmoe-16b.yaml")
    parallel = ParallelConfig(engine="deepspeed", expert_parallel_size=8, zero_stage=1)
    settings = {"global_batch_size": 64, "micro_batch_size": 2, "precision": "bfloat16"}
    plain, selective = (
        simulate(model, train_config(how, **settings), parallel, 4096, world_size=8) for how in ("none", "selective")
    )
    assert selective.of(["recompute"], ["experts", "shared", "dense"]).flops() == 0
    assert 0 < selective.of(["recompute"]).flops() < 0.06 * plain.of(["forward", "backward"]).flops()
    for found in ("collectives", "syncs"):
        times = [sum(one.times for one in getattr(trace, found)) for trace in (plain, selective)]
        assert times[0] == times[1] > 0, found
    assert plain.memory.peak > 80 * 2**30
    assert selective.memory.peak < 72 * 2**30


def recomputing(how: str, kind: str) -> LanguageModel:
    """A model in an engine; in the kernels of a CPU, but that products of experts are single operations."""
    model = engine_of(tiny_model(0, **DENSE | KINDS[kind]), train_config(how)).model
    kernels.apply(model, kernels.choose(model.device)._replace(experts="fused"))
    return model


def train_config(how: str, **changes: Any) -> TrainConfig:
    values = {"steps": 2, "global_batch_size": 8, "precision": "float32", "activation_checkpointing": how}
    return TrainConfig.model_validate(values | changes)


class Operations(TorchDispatchMode):
    """Counts the operations that run, and watches the memory that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._allocated: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **kwargs or {})
        self.counts[func._schema.name] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in given:
                    self._allocated[storage] = tensor.untyped_storage().nbytes()
        return out

    def bytes_alive(self) -> int:
        return sum(size for storage, size in self._allocated.items() if not storage.expired())
