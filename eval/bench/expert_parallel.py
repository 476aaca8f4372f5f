"""A training step over expert-parallel ranks, side by side with DeepSpeed's own MoE layer: tokens/s, in turns.

Both run in the same engine (DeepSpeed, ZeRO 1, AdamW, clipping), over the same two processes, with the same model
around them; the one has our experts, the other `deepspeed.moe.layer.MoE` with `drop_tokens=False` and the same
SwiGLU experts. Its balance loss is left out, ours is on: that favours the peer.
`python eval/bench/expert_parallel.py [--rounds N] [--out FILE]` prints both speeds of every round, their medians, and
the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from deepspeed.moe.layer import MoE as PeerMoE
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import OptimizerConfig, TrainConfig
from moe_lm.data.batches import pack
from moe_lm.engine.build import RankModel, build_engine, build_model
from moe_lm.model.layers import MLP
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import current_topology

HOUSE = Path(__file__).parents[2]
RANKS = 2
ROWS, LENGTH = 16, 256  # the global batch
STEPS_A_TURN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(start_ranks())
    shape = load_config(ModelConfig, HOUSE / "configs/model/anchor-20m.yaml")
    contenders = {
        "moe-lm": engine_step(shape, arguments.precision, lambda built: None),
        "deepspeed.moe": engine_step(shape, arguments.precision, put_peer_layers),
    }
    speeds = in_turns(contenders, arguments.rounds)
    if int(os.environ["RANK"]) == 0:
        result = report(speeds, arguments.precision)
        print(json.dumps(result, indent=2))
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def start_ranks() -> int:
    """The same program in RANKS processes, a share of the cores each; the worst exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    shared = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    processes = []
    for rank in range(RANKS):
        variables = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | variables))
    return max(process.wait() for process in processes)


def engine_step(shape: ModelConfig, precision: str, change: Callable[[RankModel], None]) -> Callable[[], object]:
    train = TrainConfig(
        steps=1000, global_batch_size=ROWS, precision=precision, optimizer=OptimizerConfig(lr=1e-4), clip_norm=1.0
    )
    parallel = ParallelConfig(engine="deepspeed", expert_parallel_size=RANKS, zero_stage=1)
    built = build_model(shape, parallel, current_topology())
    built.initialise(seed=0)
    change(built)
    engine = build_engine(built, NextToken(), train, parallel, pad_id=shape.vocab_size)
    rows = ROWS // RANKS
    tokens = np.random.default_rng(int(os.environ["RANK"])).integers(0, shape.vocab_size, (rows, LENGTH + 1))
    batch = pack(tokens[:, :-1], tokens[:, 1:].copy(), np.arange(0, rows * LENGTH + 1, LENGTH))
    return lambda: engine.train_step(0, [batch])


def put_peer_layers(built: RankModel) -> None:
    """DeepSpeed's layer with the same experts in place of each of ours; the shared expert stays."""
    config = built.model.config
    for block in built.model.model.layers:
        if hasattr(block.mlp, "gate"):
            block.mlp = PeerLayer(config, block.mlp.shared_experts)


class PeerLayer(nn.Module):
    def __init__(self, config: ModelConfig, shared: nn.Module) -> None:
        super().__init__()
        self.shared_experts = shared
        self.routed = PeerMoE(
            config.hidden_size,
            MLP(config, config.expert_size),
            num_experts=config.n_routed_experts,
            ep_size=RANKS,
            k=config.num_experts_per_tok,
            drop_tokens=False,
            use_rts=False,
        )
        for parameter in self.routed.parameters():
            nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, x_BSD: Tensor) -> Tensor:
        routed: Tensor = self.routed(x_BSD)[0]
        return routed + self.shared_experts(x_BSD)


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each in every round, after a turn that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                step()
            if turn:
                speeds[name].append(STEPS_A_TURN * ROWS * LENGTH / (time.perf_counter() - started))
    return speeds


def report(speeds: dict[str, list[float]], precision: str) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [ours / peer for ours, peer in zip(speeds["moe-lm"], speeds["deepspeed.moe"], strict=True)]
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {RANKS} processes of {torch.get_num_threads()} thread(s), gloo",
        "shape": "configs/model/anchor-20m.yaml",
        "precision": precision,
        "batch": [ROWS, LENGTH],
        "steps_a_turn": STEPS_A_TURN,
        "tokens_per_second": {name: round(median) for name, median in medians.items()},
        "ratio": round(medians["moe-lm"] / medians["deepspeed.moe"], 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "rounds": {name: [round(value) for value in values] for name, values in speeds.items()},
    }


if __name__ == "__main__":
    main()
