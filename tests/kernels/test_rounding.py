"""Weights are rounded once a step, and every number is the one that autocast, which rounds in every pass, comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import BatchSource
from moe_lm.engine.engine import Engine, StepResult
from moe_lm.kernels import rounding
from moe_lm.model.moe import all_logical
from moe_lm.model.transformer import LanguageModel
from tests.tiny import LATENT, engine_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 8
SIZES = [4, 4]
MODELS: dict[str, dict[str, Any]] = {
    "experts": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "latent attention": LATENT,
    "biases": {"attention_bias": True, "mlp_bias": True, "lm_head_bias": True, "n_routed_experts": 0},
    "gated shared experts": {"n_shared_experts": 1, "shared_expert_gate": True},
}


class Roundings(TorchDispatchMode):
    """Counts how often each of these tensors is cast to another data type."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for source, target in self.casts(func.overloadpacket.__name__, args, out):
            if source.dtype != target.dtype and source.data_ptr() in self.names:
                self.counts[self.names[source.data_ptr()]] += 1
        return out

    def casts(self, operation: str, args: Any, out: Any) -> list[tuple[Tensor, Tensor]]:
        """The pairs of source and target of an operation that copies."""
        if operation == "_to_copy":
            return [(args[0], out)]
        if operation == "copy_":
            return [(args[1], args[0])]
        return list(zip(args[1], args[0], strict=True)) if operation == "_foreach_copy_" else []


def build_engine(model: LanguageModel, **changes: Any) -> Engine:
    values = {"steps": 10, "global_batch_size": ROWS, "precision": "bfloat16", "schedule": {"warmup_steps": 2}}
    return engine_of(model, TrainConfig(**values | {"optimizer": {"lr": 0.01}} | changes))


def train(engine: Engine, source: BatchSource, steps: Sequence[int] = range(3)) -> list[StepResult]:
    return [engine.train_step(n, [source.batch(n, range(4)), source.batch(n, range(4, ROWS))]) for n in steps]


def snapshot(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.state().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        *((shape, {}) for shape in MODELS),
        ("experts", {"activation_checkpointing": True}),
        ("tied embeddings", {"optimizer": {"name": "muon"}}),
    ],
)
def test_steps_and_evaluations_are_those_of_autocast_to_the_bit(
    ragged: BatchSource, monkeypatch: pytest.MonkeyPatch, shape: str, changes: dict[str, Any]
) -> None:
    rounded, autocast = (build_engine(tiny_model(3, **MODELS[shape]), **changes) for _ in range(2))
    batches = [ragged.batch(5, range(ROWS))]
    found, evaluation = train(rounded, ragged), rounded.evaluate(batches)
    monkeypatch.setattr(rounding, "_Rounded", Autocast)
    for result, expected in zip(found, train(autocast, ragged), strict=True):
        assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    assert_equal(snapshot(rounded), snapshot(autocast))
    assert evaluation == autocast.evaluate(batches)


class Autocast:
    """A weight is rounded whenever it is read."""

    @staticmethod
    def apply(weight: Tensor, copy: Tensor) -> Tensor:
        return weight.to(copy.dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_rounded_once_a_step_and_by_no_evaluation(ragged: BatchSource, checkpointing: bool) -> None:
    engine = build_engine(tiny_model(3, tie_word_embeddings=True), activation_checkpointing=checkpointing)
    weights = {name: p for name, p in engine.model.named_parameters() if p.ndim >= 2 and "gate.weight" not in name}
    with Roundings(weights) as roundings:
        train(engine, ragged, steps=[0])
    assert roundings.counts == dict.fromkeys(weights, 1)
    with Roundings(weights) as roundings:
        engine.evaluate([ragged.batch(5, range(ROWS))])
    assert not roundings.counts


class Casts(TorchDispatchMode):
    """The tensors of several dimensions that are cast, kept so that no other takes their place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ == "_to_copy" and out.dtype != args[0].dtype and out.numel() > 1000:
            self.sources.append(args[0])
        return out


@pytest.mark.parametrize("shape", ["experts", "latent attention"])
def test_a_forward_pass_casts_no_activation_twice(ragged: BatchSource, shape: str) -> None:
    """Queries, keys and values are products of one rounded tensor; so are gate and up."""
    engine = build_engine(tiny_model(3, **MODELS[shape]))
    with Casts() as casts:
        engine.loss(ragged.batch(0, range(ROWS)), None)
    counts = Counter((source.data_ptr(), source.dtype) for source in casts.sources)
    assert counts
    assert max(counts.values()) == 1


def test_a_compiled_block_rounds_no_weight(ragged: BatchSource) -> None:
    engine = build_engine(tiny_model(3, num_hidden_layers=1, first_k_dense_replace=0, n_shared_experts=1))
    rounded: list[tuple[str, torch.dtype]] = []

    def look(compiled: torch.fx.GraphModule, _: Sequence[Tensor]) -> Any:
        """Note where the rounded values of the forward pass come from."""
        for node in compiled.graph.nodes:
            if node.op == "call_function" and "_to_copy" in str(node.target):
                rounded.append((node.args[0].op, node.kwargs["dtype"]))
        return make_boxed_func(compiled.forward)

    (block,) = engine.model.model.layers
    block.compile(backend=aot_autograd(fw_compiler=look, bw_compiler=lambda graph, _: make_boxed_func(graph.forward)))
    counters.clear()
    engine.train_step(0, [ragged.batch(0, range(ROWS))])
    assert not counters["graph_break"]
    assert ("call_function", torch.bfloat16) in rounded  # an activation
    assert "placeholder" not in [kind for kind, _ in rounded]  # an input of the graph, such as a weight


def test_a_step_that_is_skipped_and_one_in_float32_round_nothing(ragged: BatchSource) -> None:
    for precision, limit in (("float32", 1e9), ("bfloat16", 0.0)):
        engine = build_engine(tiny_model(3), precision=precision)
        with Roundings(dict(engine.model.named_parameters())) as roundings:
            engine.train_step(0, [ragged.batch(0, range(ROWS))], loss_limit=limit)
        assert not roundings.counts


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_a_loaded_state_goes_on_to_the_bit(ragged: BatchSource, optimizer: str) -> None:
    first, second = (build_engine(tiny_model(seed), optimizer={"name": optimizer}) for seed in (3, 4))
    train(first, ragged, steps=range(2))
    second.load_state(snapshot(first))
    batches = [ragged.batch(5, range(ROWS))]
    assert first.evaluate(batches) == second.evaluate(batches)
    assert [r.loss for r in train(first, ragged, [2])] == [r.loss for r in train(second, ragged, [2])]
    assert_equal(snapshot(second), snapshot(first))


def test_checkpoints_hold_the_float32_weights_and_no_copy(ragged: BatchSource) -> None:
    engine = build_engine(tiny_model(3))
    train(engine, ragged, steps=[0])
    state, parameters = engine.state(), all_logical(engine.model.named_parameters())
    names = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    assert names == parameters.keys() | {name for name, _ in engine.model.named_buffers()}
    assert all(state[f"model.{name}"].data_ptr() == p.data_ptr() for name, p in parameters.items())
    dtypes = {(p.dtype, p.grad_dtype) for p in engine.model.parameters()}
    assert dtypes == {(torch.float32, torch.float32)}
