"""One training step of a small MoE, side by side with transformers' Glm4Moe: tokens/s, in turns, in one process.

Same shape, same token ids, same AdamW, clipping at 1.0, random weights, real routing; ours with the bias balance on.
`python eval/bench/cpu_step.py [--rounds N] [--out FILE]` prints medians over the rounds and the ratio to the best of
transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import OptimizerConfig, TrainConfig
from moe_lm.data.batches import Batch, pack
from moe_lm.engine.build import RankModel, build_engine
from moe_lm.kernels import kernels
from moe_lm.model.size import count_parameters, flops_per_token
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import Topology

HOUSE = Path(__file__).parents[2]
ROWS, LENGTH = 16, 256
STEPS_A_TURN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = load_config(ModelConfig, HOUSE / "configs/model/anchor-20m.yaml")
    contenders: dict[str, Callable[[], object]] = {
        "transformers float32": transformers_step(shape, torch.float32, compiled=False),
        "transformers bfloat16": transformers_step(shape, torch.bfloat16, compiled=False),
        "transformers bfloat16 compiled": transformers_step(shape, torch.bfloat16, compiled=True),
        "moe-lm float32": our_step(shape, "float32", compiled=False),
        "moe-lm bfloat16": our_step(shape, "bfloat16", compiled=False),
        "moe-lm bfloat16 compiled": our_step(shape, "bfloat16", compiled=True),
    }
    speeds = in_turns(contenders, arguments.rounds)
    result = report(shape, speeds)
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of every contender in every round, after a turn that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            started = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                step()
            seconds = time.perf_counter() - started
            if turn:
                speeds[name].append(STEPS_A_TURN * ROWS * LENGTH / seconds)
    return speeds


def report(shape: ModelConfig, speeds: dict[str, list[float]]) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = {
        house: max((name for name in medians if name.startswith(house)), key=medians.__getitem__)
        for house in ("transformers", "moe-lm")
    }
    pairs = zip(speeds[best["moe-lm"]], speeds[best["transformers"]], strict=True)
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": count_parameters(shape).total,
        "tokens_a_step": ROWS * LENGTH,
        "tokens_per_second": {
            name: {"median": round(medians[name]), "min": round(min(values)), "max": round(max(values))}
            for name, values in speeds.items()
        },
        "best": best,
        "ratio_of_the_best": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
        "gflops_per_second": round(flops_per_token(shape, LENGTH, causal_half=True) * medians[best["moe-lm"]] / 1e9, 1),
    }


def token_ids(shape: ModelConfig) -> torch.Tensor:
    """Random ids, `[ROWS, LENGTH + 1]`."""
    return torch.randint(shape.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def transformers_step(shape: ModelConfig, dtype: torch.dtype, compiled: bool) -> Callable[[], object]:
    config = Glm4MoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.intermediate_size,
        moe_intermediate_size=shape.expert_size,
        n_routed_experts=shape.n_routed_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        n_shared_experts=shape.n_shared_experts,
        first_k_dense_replace=shape.first_k_dense_replace,
        use_qk_norm=True,
        attention_bias=False,
        partial_rotary_factor=1.0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", attn_implementation="sdpa")
    model.train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = token_ids(shape)[:, :-1]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(shape: ModelConfig, precision: str, compiled: bool) -> Callable[[], object]:
    train = TrainConfig(
        steps=1000,
        global_batch_size=ROWS,
        precision=precision,
        compile=compiled,
        optimizer=OptimizerConfig(name="adamw"),
    )
    model = LanguageModel(shape)
    model.initialise(0)
    device = torch.device("cpu")
    kernels.apply(model, kernels.choose(device))
    built = RankModel(model, Topology(), device)
    engine = build_engine(built, NextToken(), train, ParallelConfig(device="cpu"), pad_id=-1)
    ids = token_ids(shape).numpy()
    batch: Batch = pack(ids[:, :-1].copy(), ids[:, 1:].copy(), np.arange(0, ROWS * LENGTH + 1, LENGTH))
    return lambda: engine.train_step(100, [batch])


if __name__ == "__main__":
    main()
