"""A whole training step beside `transformers`: the 2B model, and a model of two layers of the 16B one.

Same shapes, same number of tokens, AdamW, bfloat16 products, random ids, real routing. Ours in the ways that a user may
choose. MFU is by both conventions (causal attention halved, and not) against 989 TFLOP/s.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from common import begin, median_seconds, our_engine, peak_gib, random_batch

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.model.size import flops_per_token

HOUSE = Path(__file__).parents[3]
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16, without sparsity

part = begin()


def main() -> None:
    cases = [("anchor-20m", {"num_hidden_layers": 2}, 2, 64)]
    if not part.tiny:
        cases = [("deepseekmoe-2b", {}, 8, 2048), ("deepseekmoe-16b", {"num_hidden_layers": 2}, 4, 4096)]
    for name, changes, rows, length in cases:
        config = load_config(ModelConfig, HOUSE / f"configs/model/{name}.yaml").model_copy(update=changes)
        ways: dict[str, Callable[[], Callable[[], object]]] = {
            "moe-lm": lambda c=config, r=rows, n=length: ours(c, r, n),
            "moe-lm, selective": lambda c=config, r=rows, n=length: ours(c, r, n, activation_checkpointing="selective"),
            "transformers": lambda c=config, r=rows, n=length: theirs(c, r, n),
        }
        if not part.tiny:
            ways["moe-lm compiled"] = lambda c=config, r=rows, n=length: ours(c, r, n, compile=True)
        budget = part.seconds / len(cases) / len(ways) / 2
        found: dict[str, object] = {}
        for way, build in ways.items():
            try:
                found[way] = measured(build(), config, rows, length, budget)
            except (RuntimeError, ImportError, ValueError) as error:
                found[way] = {"failed": str(error).splitlines()[0]}
            part.note(**{f"{name}, {rows} x {length}": found})
            gc.collect()
            if part.device.type == "cuda":
                torch.cuda.empty_cache()


def measured(
    step: Callable[[], object], config: ModelConfig, rows: int, length: int, budget: float
) -> dict[str, float | None]:
    peak_gib(part.device)
    seconds = median_seconds(step, part.device, budget)
    speed = rows * length / seconds
    mfu = {f"mfu, {name}": round(speed * flops_per_token(config, length, half) / PEAK, 4) for name, half in CONVENTIONS}
    return {"tokens_per_second": round(speed), "seconds": round(seconds, 4), "peak_gib": peak_gib(part.device), **mfu}


CONVENTIONS = (("causal halved", True), ("not halved", False))


def ours(config: ModelConfig, rows: int, length: int, **settings: object) -> Callable[[], object]:
    engine = our_engine(config, part.device, rows, **settings)
    batch = random_batch(config, rows, length)
    return lambda: engine.train_step(100, [batch])


def theirs(config: ModelConfig, rows: int, length: int) -> Callable[[], object]:
    """`transformers`' DeepSeek-like model with grouped products and SDPA, as fast as it goes without changing it."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    theirs = Glm4MoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.kv_heads, head_dim=config.head_size,
        intermediate_size=config.intermediate_size, moe_intermediate_size=config.expert_size,
        n_routed_experts=config.n_routed_experts, num_experts_per_tok=config.num_experts_per_tok,
        n_shared_experts=config.n_shared_experts, first_k_dense_replace=config.first_k_dense_replace,
        use_qk_norm=config.use_qk_norm, attention_bias=False, partial_rotary_factor=1.0, pad_token_id=0,
        max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    with part.device:
        model = Glm4MoeForCausalLM._from_config(theirs, experts_implementation="grouped_mm", attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(config.vocab_size, (rows, length), device=part.device)

    def step() -> None:
        with torch.autocast(part.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


main()
