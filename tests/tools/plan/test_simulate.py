"""A simulated rank: what it counts is what the model's arithmetic says, and mistakes are found by name."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import BalanceConfig, OptimizerConfig, TrainConfig
from moe_lm.engine.build import build_loss, build_model
from moe_lm.model import moe
from moe_lm.model.size import count_parameters, flops_per_token, on_meta
from moe_lm.objective import training_loss
from moe_lm.objective.training_loss import NextToken, Score, StepCounts
from moe_lm.parallel import expert_parallel
from moe_lm.parallel.topology import Topology
from moe_lm.tools.plan import simulate as simulation
from moe_lm.tools.plan.devices import find_device
from moe_lm.tools.plan.layers import reduced
from moe_lm.tools.plan.predict import mfu, step_time
from moe_lm.tools.plan.simulate import simulate
from moe_lm.tools.plan.trace import PASSES, Finding, Trace, Work
from moe_lm.train.cost import whole_memory
from tests.tiny import tiny

LENGTH = 32
DEEPSEEKMOE_16B = ModelConfig(**yaml.safe_load(Path("configs/model/deepseekmoe-16b.yaml").read_text(encoding="utf-8")))
ALONE = ParallelConfig()
EXPERT_PARALLEL = ParallelConfig(engine="deepspeed", expert_parallel_size=4, zero_stage=1)


def training(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 1, "global_batch_size": 2, "precision": "bfloat16", **changes})


@functools.cache
def on_one(**changes: Any) -> Trace:
    return simulate(tiny(num_hidden_layers=3), training(**changes), ALONE, LENGTH)


@functools.cache
def on_eight(**changes: Any) -> Trace:
    """Rank 5 of 8, whose experts are spread over 4."""
    train = training(global_batch_size=16, micro_batch_size=1, **changes)
    return simulate(tiny(num_hidden_layers=3), train, EXPERT_PARALLEL, LENGTH, world_size=8, rank=5)


@pytest.mark.parametrize("model", [tiny(), tiny(num_hidden_layers=6, use_qk_norm=False)], ids=["three", "six layers"])
def test_flops_are_those_of_the_formula(model: ModelConfig) -> None:
    trace = simulate(model, training(), ALONE, LENGTH)
    passes = trace.of(["forward", "backward"])
    scores = flops_per_token(model, LENGTH, causal_half=True) - 6 * count_parameters(model).multiplied
    assert passes.flops("dense", "grouped") == 6 * count_parameters(model).multiplied * trace.tokens
    assert trace.of(["forward"]).flops("attention") == scores * trace.tokens / 3
    # FlashAttention keeps no scores, so that its backward pass has five products where the forward pass has two.
    assert trace.of(["backward"]).flops("attention") == 2.5 * trace.of(["forward"]).flops("attention")


@functools.cache
def attention_of(kernel: str) -> Work:
    """In latent attention with DeepSeek's sizes, on a GPU."""
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = tiny(**sizes, num_key_value_heads=None, head_dim=None, use_qk_norm=False)
    parallel = ParallelConfig(attention_kernel=kernel)  # type: ignore[arg-type]
    return simulate(model, training(), parallel, LENGTH).of(["forward", "backward"])


def test_the_attention_kernel_is_the_one_of_the_config() -> None:
    auto, padded, uneven = (attention_of(kernel) for kernel in ("auto", "flash_attn_2", "flash_attn_3"))
    assert auto == padded, "the package is not needed"
    # Forward and backward 2 * (N + M) and 2 * (3N + 2M), N 192 and M 128, or padded to N.
    assert padded.flops("attention") / uneven.flops("attention") == pytest.approx(7 * 192 / (4 * 192 + 3 * 128))
    assert attention_of("plain").flops("attention") == padded.flops("attention")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_an_optimizer_is_what_a_dry_run_counts(optimizer: Literal["adamw", "muon"]) -> None:
    model, settings = tiny(num_hidden_layers=5), OptimizerConfig(name=optimizer, ema_decay=0.9)
    memory = simulate(model, training(optimizer=settings), ALONE, LENGTH).memory
    assert memory.optimizer == whole_memory(on_meta(model), settings).optimizer


def test_a_gpu_in_float32_is_still_a_gpu() -> None:
    """Its exchanges overlap, and its libraries take memory, though its attention is simulated as a CPU's."""
    train = training(global_batch_size=16, micro_batch_size=1, precision="float32")
    trace = simulate(tiny(num_hidden_layers=3), train, EXPERT_PARALLEL, LENGTH, world_size=8, rank=5)
    assert trace.of(["forward"]).flops("attention") > 0
    assert trace.memory.communication > 0
    assert any(item.hidden_by.launches for item in trace.collectives if item.part == "update")


def test_full_recomputation_repeats_the_layers_but_not_the_head() -> None:
    plain, again = on_one(), on_one(activation_checkpointing="full")
    layers = ["attention", "router", "experts", "shared", "dense"]
    assert plain.of(["recompute"]).flops() == 0
    forward = plain.of(["forward"], layers)  # type: ignore[arg-type]
    assert 0.8 * forward.flops() < again.of(["recompute"]).flops() < forward.flops()  # nothing needs a block's result
    assert again.of(["recompute"], ["head"]).launches == 0
    assert again.memory.activations < plain.memory.activations / 2


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_layers_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    model = tiny(num_hidden_layers=7, first_k_dense_replace=3)
    train = training(
        compile=recompute, activation_checkpointing="full" if recompute else "none", balance=BalanceConfig(z_loss=0.1)
    )
    short = simulate(model, train, ALONE, LENGTH)
    monkeypatch.setattr(simulation, "reduced", functools.partial(reduced, traced=7))
    whole = simulate(model, train, ALONE, LENGTH)
    parts = {part for _, part in whole.work} - {"balance"}  # of all layers at once, but for what has none
    assert short.of(parts=parts) == whole.of(parts=parts)
    assert short.of(parts=["balance"]).launches == whole.of(parts=["balance"]).launches
    assert short.of(parts=["balance"]).bytes == pytest.approx(whole.of(parts=["balance"]).bytes, rel=0.1)
    assert short.memory.peak == pytest.approx(whole.memory.peak, rel=1e-3)
    assert short.memory.peak_during == whole.memory.peak_during
    assert short.memory.activations == pytest.approx(whole.memory.activations, rel=1e-3)  # scalars


def test_without_expert_parallelism_the_host_waits_for_nothing() -> None:
    for trace in (on_one(), on_one(activation_checkpointing="full"), on_one(compile=True)):
        assert trace.syncs == ()
        assert [finding for finding in trace.findings if finding.kind == "hidden sync"] == []


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_ranks_that_share_experts_wait_once_a_layer_and_pass(recompute: str) -> None:
    trace = on_eight(activation_checkpointing=recompute)
    waits = {sync.during: sync.times for sync in trace.syncs}
    assert waits == ({"forward": 2, "recompute": 2} if recompute == "full" else {"forward": 2})
    assert all(sync.expected for sync in trace.syncs)
    assert {finding.kind for finding in trace.findings} <= {"all logits"}  # so few tokens are a single chunk


@pytest.mark.parametrize("imbalance", [1.0, 2.0])
def test_ranks_that_share_experts_exchange_tokens(imbalance: float) -> None:
    model = tiny(num_hidden_layers=4)
    train = training(global_batch_size=16, micro_batch_size=1)
    trace = simulate(model, train, EXPERT_PARALLEL, LENGTH, world_size=8, rank=5, imbalance=imbalance)
    # Of 32 tokens 21 have one of their three experts among a rank's two of eight, so that 84 rows go to four ranks.
    rows = {1.0: 4 * 21, 2.0: 4 * 32}[imbalance]
    tokens = [c for c in trace.collectives if c.bytes == rows * model.hidden_size * 2]
    assert {(c.kind, c.ranks) for c in tokens} == {("all_to_all", (4, 5, 6, 7))}
    assert sum(c.times for c in tokens) == 4 * 3 * trace.micro_batches  # there and back, forward and backward
    choices = LENGTH * model.num_experts_per_tok
    assert trace.of(["forward"], ["experts"]).flops() == int(choices * imbalance) * 6 * 32 * 16 * 3
    reductions = [c for c in trace.collectives if c.kind == "all_reduce"]
    assert {c.ranks for c in reductions} == {tuple(range(8)), (1, 5)}


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_ranks_that_share_rows_exchange_heads_and_keep_parts_of_the_activations(recompute: str) -> None:
    """Two all-to-alls a layer and pass, which recomputation repeats. A rank has half of 4 query and 2 key heads."""
    model, train = tiny(num_hidden_layers=4), training(activation_checkpointing=recompute)
    alone = simulate(model, train, ALONE, 256)
    shared = simulate(model, train, ParallelConfig(sequence_parallel_size=2), 256, world_size=4, rank=3)
    assert (shared.tokens, shared.micro_batches) == (alone.tokens // 4, 1)
    assert shared.memory.activations == pytest.approx(alone.memory.activations / 4, rel=0.05)
    positions, size = 256 // 2, model.head_size
    heads = {"there": 4 + 2 + 2, "back": 4}
    passes = 2 if recompute == "none" else 3
    for numbers in heads.values():
        found = [c for c in shared.collectives if c.bytes == positions * numbers * size * 2 and c.kind == "all_to_all"]
        assert sum(c.times for c in found) == 4 * passes
        assert {(c.ranks, c.part) for c in found} == {((2, 3), "attention")}
    assert shared.of(["forward"], ["attention"]).flops() == alone.of(["forward"], ["attention"]).flops() // 4
    assert shared.syncs == ()


def test_compilation_outside_of_the_simulated_rank_is_left_alone() -> None:
    found: list[object] = []

    class Probe(NextToken):
        def score(self, *given: Any) -> Score:
            found.extend((torch.compile, torch.nn.Module.compile))
            return super().score(*given)

    expected = [torch.compile, torch.nn.Module.compile]
    simulate(tiny(), training(compile=True), ALONE, LENGTH, objective=Probe())
    assert found == expected


def test_compiled_blocks_move_fewer_bytes_in_fewer_kernels() -> None:
    eager, compiled = on_one(), on_one(compile=True)
    assert compiled.step.flops() == eager.step.flops()
    assert compiled.step.bytes < 0.7 * eager.step.bytes
    assert compiled.step.launches < 0.7 * eager.step.launches


def test_stages_and_a_compiled_step_share_a_recording_without_a_trace_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record, known, recorded = simulation._record, {}, []  # type: ignore[var-annotated]
    monkeypatch.setattr(simulation, "_record", lambda *given: recorded.append(given) or record(*given))

    def trace(stage: int, compiled: bool, known: dict[str, Any] | None = None) -> Trace:
        parallel = EXPERT_PARALLEL.model_copy(update={"zero_stage": stage})
        train = training(global_batch_size=16, micro_batch_size=1, compile=compiled)
        return simulate(tiny(num_hidden_layers=2), train, parallel, LENGTH, world_size=8, known=known)

    first, eager = trace(1, True, known), trace(3, False, known)
    assert len(recorded) == 1
    assert eager == trace(3, False)
    assert first == trace(1, True, known)
    assert eager.of(["backward"]).launches > 1.4 * first.of(["backward"]).launches
    assert eager.memory.weights < first.memory.weights


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_peak_is_that_of_real_tensors(recompute: bool) -> None:
    """Torch's own tracker, around a real forward and backward pass on this CPU."""
    model = tiny(num_hidden_layers=5, hidden_size=64, vocab_size=96)
    train = training(precision="float32", global_batch_size=8, activation_checkpointing="full" if recompute else "none")
    built = build_model(model, ALONE, Topology())
    built.initialise(1)
    loss = build_loss(built, NextToken(), train, pad_id=-1, dtype=torch.float32)
    batch = simulation._batch(8, 64)
    batch.cu_seqlens.copy_(torch.arange(9) * 64)
    tracker = MemTracker()
    tracker.track_external(loss, *(value for value in vars(batch).values() if isinstance(value, Tensor)))
    with tracker:
        loss(batch, StepCounts(512, 512, 512, 8)).loss.backward()
    real = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    held = sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor))
    trace = simulate(model, train, ALONE, 64, device="cpu")
    assert trace.memory.peak - trace.memory.optimizer == pytest.approx(real - held, rel=0.02)


@functools.cache
def of_16b(micro_batches: int) -> Trace:
    """One of 8 ranks with the settings that docs/parallelism.md recommends; a micro-batch is 2 x 4,096 tokens."""
    train = training(
        global_batch_size=16 * micro_batches, micro_batch_size=2, activation_checkpointing="selective", compile=True,
        residual_dtype="bfloat16",
    )  # fmt: skip
    parallel = ParallelConfig(engine="deepspeed", expert_parallel_size=8, zero_stage=1)
    return simulate(DEEPSEEKMOE_16B, train, parallel, 4096, world_size=8)


@pytest.mark.parametrize(("micro_batches", "gib"), [(1, 60), (8, 72)])
def test_deepseekmoe_16b_fits_eight_devices_of_80_gb(micro_batches: int, gib: int) -> None:
    """Where steps accumulate, every rank keeps 12.3 GiB of gradients."""
    memory = of_16b(micro_batches).memory
    assert memory.peak < gib * 2**30
    assert memory.resident < 54 * 2**30


def test_a_micro_batch_of_16b_moves_and_launches_less_than_before() -> None:
    """Less than at commit 645018e, where it did without recomputation, for which it had no memory."""
    before = json.loads(Path("eval/results/simulated_before.json").read_text(encoding="utf-8"))["cases"]
    before = before["16B, EP 8 of 8, ZeRO 1, 2 x 4096, recompute none"]["a_micro_batch"]
    trace = of_16b(8)
    work = trace.of(set(PASSES) - {"update"})
    assert work.launches <= before["launches"] / 2
    assert work.bytes <= 0.4 * before["bytes_outside_products"]
    assert [(sync.during, sync.times, sync.expected) for sync in trace.syncs] == [("forward", 27, True)]
    assert trace.findings == ()


def test_predicted_mfu_of_16b_is_twice_that_of_before() -> None:
    """Where 645018e had to recompute everything. A third of the time is that of the experts' products."""
    h100 = find_device("h100")
    trace = of_16b(8)
    rate = trace.tokens * trace.micro_batches / step_time(trace, h100).seconds
    assert mfu(DEEPSEEKMOE_16B, 4096, False, rate, 1, h100.peak) > 2 * 0.168


def test_a_planted_item_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    route = moe.route

    def waits(logits: Tensor, *arguments: Any) -> moe.Routing:
        return route(logits * float(logits.detach().isfinite().all().item()), *arguments)

    monkeypatch.setattr(moe, "route", waits)
    found = [finding for finding in on_one.__wrapped__().findings if finding.kind == "hidden sync"]
    assert {(finding.part, finding.during) for finding in found} == {("router", "forward")}
    assert all("aten._local_scalar_dense" in finding.text for finding in found)
    assert all(finding.where.startswith("tests/tools/plan/test_simulate.py:") for finding in found)


def test_a_planted_item_beside_the_read_of_counts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = expert_parallel.AllToAllDispatcher
    planted = {"tell": dispatcher.exchange_counts}
    source = "def waits(self, counts):\n    counts.sum().item()\n    return tell(self, counts)\n"
    exec(compile(source, expert_parallel.__file__, "exec"), planted)
    monkeypatch.setattr(dispatcher, "exchange_counts", planted["waits"])
    (found,) = [finding for finding in on_eight.__wrapped__().findings if finding.kind == "hidden sync"]
    assert found.where == "moe_lm/parallel/expert_parallel.py:2"


def test_a_planted_gather_of_float32_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parallel, "compute_dtype", lambda x: torch.float32)
    found = [finding for finding in on_eight.__wrapped__().findings if finding.kind == "float32 rows"]
    assert ("dispatch", "forward") in {(finding.part, finding.during) for finding in found}
    assert "float32" in found[0].text


def test_a_planted_copy_of_float32_for_the_experts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float32 rows" not in {finding.kind for finding in on_one().findings}
    copy_rows = moe.copy_rows
    monkeypatch.setattr(moe, "copy_rows", lambda x, copies: copy_rows(x.float(), copies).to(x.dtype))
    found = [finding for finding in on_one.__wrapped__().findings if finding.kind == "float32 rows"]
    assert ("experts", "forward") in {(finding.part, finding.during) for finding in found}


def all_logits_of_many_tokens() -> list[Finding]:
    """With a vocabulary for which a batch takes several chunks."""
    trace = simulate(tiny(vocab_size=1 << 16), training(global_batch_size=64), ALONE, LENGTH)
    return [finding for finding in trace.findings if finding.kind == "all logits"]


def test_logits_of_all_positions_are_never_there() -> None:
    assert all_logits_of_many_tokens() == []


def test_planted_logits_of_all_positions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any) -> Tensor:
        logits = F.linear(hidden, weight, bias).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    monkeypatch.setattr(training_loss, "summed_nll", all_at_once)
    found = all_logits_of_many_tokens()
    assert {finding.part for finding in found} == {"head"}
    assert "[2048, 65536]" in found[0].text
    assert found[0].where.startswith("tests/tools/plan/test_simulate.py:")
