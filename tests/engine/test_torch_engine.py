"""The engine's step: against a plain loop, however it is cut into micro-batches, and when a gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.checkpoint import read, write
from moe_lm.common.errors import UsageError
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import IGNORE, Batch, BatchSource
from moe_lm.engine.engine import LOAD, Engine, Evaluation, StepResult
from moe_lm.model.attention import PackedAttention
from moe_lm.model.moe import all_logical
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import StepCounts, num_targets
from moe_lm.optim.muon import orthogonalise
from tests.tiny import engine_of, positions_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PAD = 2
ROWS = 8
BALANCES = {
    "bias and sequence loss": {},
    "every loss": {"bias_update_rate": 0.01, "sequence_loss": 0.3, "batch_loss": 0.5, "z_loss": 0.1},
}


def build_model(**changes: Any) -> LanguageModel:
    return tiny_model(3, **{"num_experts_per_tok": 2, **changes})


def build_engine(model: LanguageModel | None = None, world_size: int = 1, **changes: Any) -> Engine:
    values = {
        "steps": 10, "global_batch_size": ROWS, "precision": "float32", "schedule": {"warmup_steps": 2},
        "optimizer": {"lr": 0.01},
    }  # fmt: skip
    return engine_of(model or build_model(), TrainConfig(**values | changes), world_size)


def train(engine: Engine, source: BatchSource, sizes: Sequence[int] = (ROWS,), steps: int = 3) -> list[StepResult]:
    """Steps of which each is cut into micro-batches of these sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [engine.train_step(step, [source.batch(step, part) for part in rows]) for step in range(steps)]


def snapshot(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.state().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# Accumulation


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [5, 3]])
def test_accumulation_changes_nothing(ragged: BatchSource, sizes: list[int], balance: str, optimizer: str) -> None:
    """1 x 8 = 8 x 1: rows have unequal numbers of targets, one has none, and most end in padding."""
    # An epsilon above rounding: Adam's default turns a gradient of 1e-9, which is rounding, into a step of full size.
    options: dict[str, Any] = {"balance": BALANCES[balance], "optimizer": {"name": optimizer, "lr": 0.01, "eps": 1e-4}}
    whole, cut = build_engine(**options), build_engine(**options)
    for expected, found in zip(train(whole, ragged), train(cut, ragged, sizes), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.balance_loss == pytest.approx(expected.balance_loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert (found.tokens, found.targets) == (expected.tokens, expected.targets)
        assert torch.equal(found.load, expected.load)
    expected_state, state = snapshot(whole), snapshot(cut)
    for name, tensor in expected_state.items():
        tolerance = 0 if name.endswith("correction_bias") else 2e-6
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("balance", BALANCES)
def test_accumulated_gradients_are_those_of_one_pass(ragged: BatchSource, balance: str) -> None:
    """After the first step AdamW's first moment is a tenth of the clipped gradient."""
    states = []
    for sizes in ([ROWS], [1] * ROWS):
        engine = build_engine(balance=BALANCES[balance])
        train(engine, ragged, sizes, steps=1)
        states.append(snapshot(engine))
    for name, tensor in states[0].items():
        if name.startswith("exp_avg."):
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-8)


# A plain loop


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_are_those_of_a_plain_loop(ragged: BatchSource, clip_norm: float | None) -> None:
    """Documents alone through the model, `F.cross_entropy` averaged over all targets, clipping and AdamW by torch."""
    changes: dict[str, Any] = {
        "clip_norm": clip_norm,
        "balance": {"bias_update_rate": 0.01, "sequence_loss": 0},
        "optimizer": {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.2},
    }
    engine, model = build_engine(**changes), build_model()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    for step, result in enumerate(train(engine, ragged, [4, 4])):
        loss, load = reference_loss(model, ragged, step)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
        for group in adamw.param_groups:
            group["lr"] = 0.01 * (1 / 3, 2 / 3, 1.0)[step]
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, clip_norm / norm) if clip_norm else 1.0
        adamw.step()
        adamw.zero_grad()
        for layer, counts in zip(model.moe_layers, load, strict=True):
            layer.gate.e_score_correction_bias -= 0.01 * (counts - counts.double().mean()).sign()
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert result.learning_rate == pytest.approx(adamw.param_groups[0]["lr"])
        assert torch.equal(result.load, load)
        assert 2 * result.tokens == int(load[0].sum())
        assert not result.skipped
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], tensor, rtol=0, atol=2e-6)


def reference_loss(model: LanguageModel, source: BatchSource, step: int) -> tuple[Tensor, Tensor]:
    batch = source.batch(step, range(ROWS))
    logits, targets, load = [], [], torch.zeros(2, 8, dtype=torch.int64)
    for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), strict=False):
        ids = batch.input_ids.flatten()[None, start:end]
        attend = PackedAttention(torch.tensor([0, end - start], dtype=torch.int32), end - start)
        output = model(ids, torch.arange(end - start)[None], attend)
        logits.append(output.logits[0])
        targets.append(batch.targets.flatten()[start:end].long())
        for layer, routing in enumerate(output.routings):
            load[layer] += routing.experts[ids[0] != PAD].flatten().bincount(minlength=8)
    return F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORE), load


def test_bias_moves_by_the_global_counts_of_the_step(ragged: BatchSource) -> None:
    engine = build_engine(balance={"bias_update_rate": 0.25})
    (result,) = train(engine, ragged, [2, 2, 4], steps=1)
    even = result.load.sum(1, keepdim=True) / 8
    expected = 0.25 * (even - result.load).sign()
    found = torch.stack([layer.gate.e_score_correction_bias for layer in engine.model.moe_layers])
    assert torch.equal(found, expected)
    assert result.bias_range == [0.5, 0.5]
    assert set(expected.flatten().tolist()) >= {-0.25, 0.25}


@pytest.mark.parametrize("sizes", [[ROWS], [5, 3]])
def test_the_batch_loss_takes_the_load_of_the_step_before_in_one_pass(ragged: BatchSource, sizes: list[int]) -> None:
    engine = build_engine(balance={"bias_update_rate": 0, "sequence_loss": 0, "batch_loss": 0.5})
    passes: list[None] = []
    engine.model.model.register_forward_hook(lambda *_: passes.append(None))
    (first,) = train(engine, ragged, sizes, steps=1)
    assert len(passes) == len(sizes)
    assert first.balance_loss == pytest.approx(2 * 0.5, rel=1e-6)  # of an even load, in two layers
    batch = ragged.batch(1, range(ROWS))
    tokens = int((batch.input_ids != PAD).sum())
    expected = engine.loss(batch, StepCounts(1, 1, tokens, ROWS, first.load)).balance.item()
    second = engine.train_step(1, [batch])
    assert second.balance_loss == pytest.approx(expected, rel=1e-6)
    assert torch.equal(engine.state()[LOAD], second.load)


def test_a_run_that_goes_on_has_the_load_of_the_step_before(ragged: BatchSource) -> None:
    first, second = (build_engine(balance=BALANCES["every loss"]) for _ in range(2))
    train(first, ragged, steps=2)
    second.load_state(snapshot(first))
    results = [engine.train_step(2, [ragged.batch(2, range(ROWS))]) for engine in (first, second)]
    assert results[0].balance_loss == results[1].balance_loss
    assert_equal(snapshot(second), snapshot(first))


# What is not finite (FAULTS rows 18 and 22)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["a gradient", "the hidden states"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_a_step_that_is_not_finite_is_skipped(ragged: BatchSource, value: float, place: str, optimizer: str) -> None:
    engine = build_engine(optimizer={"name": optimizer}, balance=BALANCES["every loss"])
    train(engine, ragged, steps=2)
    before = snapshot(engine)
    norm = engine.model.model.norm
    if place == "a gradient":
        hook = norm.weight.register_hook(lambda gradient: gradient * value)
    else:
        hook = norm.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor(3), value))
    spoilt = engine.train_step(2, [ragged.batch(2, range(4)), ragged.batch(2, range(4, ROWS))])
    hook.remove()
    assert spoilt.skipped
    assert not (math.isfinite(spoilt.loss) and math.isfinite(spoilt.grad_norm))
    assert_equal(snapshot(engine), before)
    twin = build_engine(optimizer={"name": optimizer}, balance=BALANCES["every loss"])
    twin.load_state(before)
    after, expected = (e.train_step(3, [ragged.batch(3, range(ROWS))]) for e in (engine, twin))
    assert not after.skipped
    assert (after.loss, after.grad_norm) == (expected.loss, expected.grad_norm)
    assert_equal(snapshot(engine), snapshot(twin))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_every_token_to_one_expert_trains_on(ragged: BatchSource, optimizer: str) -> None:
    engine = build_engine(build_model(num_experts_per_tok=1), optimizer={"name": optimizer, "lr": 0.01})
    for layer in engine.model.moe_layers:
        layer.gate.e_score_correction_bias[3] = 100.0
    results = train(engine, ragged, [4, 4])
    for result in results:
        assert result.load[:, 3].gt(0).all()
        assert result.load.sum() == result.load[:, 3].sum()
        assert not result.skipped
    assert all(tensor.isfinite().all() for tensor in snapshot(engine).values())
    moments = engine.state()["exp_avg.model.layers.1.mlp.gate.weight"]
    assert moments.any()  # the sequence loss moves the router
    assert engine.model.moe_layers[0].gate.e_score_correction_bias[3] == pytest.approx(100 - 3e-3)


def test_a_step_without_any_target_changes_no_more_than_decay_does(ragged: BatchSource) -> None:
    engine = build_engine(balance={"bias_update_rate": 0, "sequence_loss": 0}, optimizer={"weight_decay": 0})
    batch, before = ragged.batch(0, range(ROWS)), snapshot(engine)
    batch.targets.fill_(IGNORE)
    result = engine.train_step(0, [batch])
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    weights = {name: tensor for name, tensor in snapshot(engine).items() if name.startswith("model.")}
    assert_equal(weights, {name: before[name] for name in weights})


# Evaluation


def test_evaluation_adds_up_nll_and_targets_and_touches_nothing(ragged: BatchSource) -> None:
    engine = build_engine()
    train(engine, ragged, steps=1)
    before = snapshot(engine)
    batches = [ragged.batch(step, range(size)) for step, size in ((5, 3), (6, 8), (7, 1))]
    sums, targets = engine.evaluate(batches)
    assert targets == sum(map(num_targets, batches))
    with torch.no_grad():
        whole = [F.cross_entropy(all_logits(engine.model, batch), batch.targets.flatten().long(),
                                 ignore_index=IGNORE, reduction="sum") for batch in batches]  # fmt: skip
    assert sums == {"loss": pytest.approx(float(sum(whole)), rel=1e-6)}
    assert engine.evaluate([]) == Evaluation({}, 0)
    assert_equal(snapshot(engine), before)


def all_logits(model: LanguageModel, batch: Batch) -> Tensor:
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
    return model(batch.input_ids, positions_of(batch), attend).logits.flatten(0, 1)


# State


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"n_routed_experts": 0}])
def test_a_loaded_state_goes_on_to_the_bit(ragged: BatchSource, changes: dict[str, Any], optimizer: str) -> None:
    first, second = (build_engine(build_model(**changes), optimizer={"name": optimizer}) for _ in range(2))
    train(first, ragged, steps=2)
    second.load_state(snapshot(first))
    assert_equal(snapshot(second), snapshot(first))
    results = [engine.train_step(2, [ragged.batch(2, range(ROWS))]) for engine in (first, second)]
    assert results[0].loss == results[1].loss
    assert_equal(snapshot(second), snapshot(first))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_hold_gate_and_up_apart(tmp_path: Path, optimizer: str) -> None:
    """As they did when these were two parameters: such a checkpoint fills the two halves of their stack."""
    engine = build_engine(optimizer={"name": optimizer})
    moments = ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else ("momentum_buffer",)
    kept = {
        f"{kind}.model.layers.{layer}.mlp.experts.{name}": torch.randn(8, 32, 16)
        for kind in ("model", *moments) for layer in (1, 2) for name in ("gate_proj", "up_proj")
    }  # fmt: skip
    saved = snapshot(engine) | kept
    assert saved.keys() == engine.state().keys()
    folder = write.save(tmp_path, 1, saved, {})
    state = engine.state()
    read.load(folder, state)
    engine.load_state(state)
    for layer in (1, 2):
        experts = f"model.layers.{layer}.mlp.experts"
        stack = engine.model.get_parameter(f"{experts}.gate_up_proj")
        states = next(o.state[stack] for o in engine.optimizers if stack in o.state)  # type: ignore[attr-defined]
        for kind, tensor in (("model", stack), *((moment, states[moment]) for moment in moments)):
            assert tensor[..., :16].equal(kept[f"{kind}.{experts}.gate_proj"])
            assert tensor[..., 16:].equal(kept[f"{kind}.{experts}.up_proj"])


def test_state_is_named_by_parameter_and_holds_the_random_state() -> None:
    engine = build_engine(optimizer={"name": "muon"})
    state = engine.state()
    parameters = all_logical(engine.model.named_parameters())
    for name, parameter in parameters.items():
        moments = [key for key in state if key.endswith(f".{name}") and key != f"model.{name}"]
        hidden = f"momentum_buffer.{name}" in state
        expected = {"momentum_buffer"} if hidden else {"step", "exp_avg", "exp_avg_sq"}
        assert {key.split(".")[0] for key in moments} == expected
        assert state[f"model.{name}"].data_ptr() == parameter.data_ptr()
    biases = [key for key in state if key.endswith("e_score_correction_bias")]
    assert biases == [f"model.model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    torch.manual_seed(5)
    saved = snapshot(engine)
    drawn = torch.rand(3)
    engine.load_state(saved)
    assert torch.equal(torch.rand(3), drawn)


def test_the_figures_of_a_step_keep_their_values_and_data_types_on_the_way_to_the_host() -> None:
    """Counts far beyond what float32 holds, and float32 values, in one copy."""
    given = {
        "load": torch.tensor([[2**53, 2**53 - 1], [0, 7]]),
        "loss": torch.tensor(0.1),
        "none": torch.zeros(0, 0, dtype=torch.int64),
    }
    found = build_engine()._sums_on_host(given)
    assert_equal(found, given)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in given.items()}


# Precision and memory


def test_bfloat16_keeps_weights_and_moments_in_float32_and_stays_near(ragged: BatchSource) -> None:
    exact, near = build_engine(), build_engine(precision="bfloat16")
    for expected, found in zip(train(exact, ragged), train(near, ragged), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=0.01)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.1)
    assert near.dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in near.state().items() if name != "random.cpu"} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_orthogonalises_in_the_precision_of_the_run(ragged: BatchSource, precision: str) -> None:
    optimizer = {"name": "muon", "lr": 0.01, "muon_lr": 0.5, "weight_decay": 0.0}
    engine = build_engine(precision=precision, optimizer=optimizer, schedule={"name": "constant", "warmup_steps": 0})
    name = "model.layers.0.self_attn.q_proj.weight"
    before = snapshot(engine)[f"model.{name}"]
    train(engine, ragged, steps=1)
    momentum = snapshot(engine)[f"momentum_buffer.{name}"]
    gradient = momentum / 0.05
    moved = before - snapshot(engine)[f"model.{name}"]
    away = {
        dtype: float((moved - 0.5 * orthogonalise((0.05 * gradient + 0.95 * momentum)[None].to(dtype))[0]).norm())
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert min(away, key=lambda dtype: away[dtype]) == getattr(torch, precision)
    assert away[getattr(torch, precision)] < 1e-2 * moved.norm()


def test_precisions_do_not_leak_from_one_engine_into_the_next(ragged: BatchSource) -> None:
    expected = train(build_engine(), ragged, steps=1)[0].loss
    train(build_engine(precision="bfloat16"), ragged, steps=1)
    assert train(build_engine(), ragged, steps=1)[0].loss == expected


@pytest.mark.slow
def test_compiled_blocks_change_no_more_than_rounding(ragged: BatchSource) -> None:
    plain, compiled = build_engine(), build_engine(compile=True)
    for expected, found in zip(train(plain, ragged, [4, 4]), train(compiled, ragged, [4, 4]), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert compiled.state().keys() == plain.state().keys()


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.global_batch_size=8 is not divisible by the 3 processes"):
        build_engine(world_size=3)
