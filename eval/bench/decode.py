"""Decoding a small MoE, side by side with transformers' `generate` on the exported model: tokens/s, in turns.

The same weights (`moe-lm export`), float32, the same prompts, greedy, as many new tokens for every row, prefill
included. `python eval/bench/decode.py [--rounds N] [--compiled] [--out FILE]` prints medians over the rounds and the
ratio to the best of transformers, at batch 1 and at batch 32 with prompts of unequal length. Ratios are those of
medians over the rounds' pairs, by the clock and by the CPU time of the process: a shared machine moves the first
and hardly the second.
transformers' third way with experts, batched_mm, copies the weights of every token's experts and is slower still.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from moe_lm.checkpoint import write
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import dump_config, load_config
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.exporting import export_run

HOUSE = Path(__file__).parents[2]
NEW_TOKENS = 48
# (rows, tokens of the shortest prompt, of the longest)
BATCHES = [(1, 32, 32), (32, 8, 64)]
EXPERTS = ("eager", "grouped_mm")
COMPILED = "transformers grouped_mm, static cache, compiled"
Texts = list[list[int]]
Contender = Callable[[Sequence[list[int]]], Texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", type=Path, default=HOUSE / "configs/model/anchor-20m.yaml")
    parser.add_argument(
        "--compiled", action="store_true", help="transformers with a static cache and torch.compile too"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = load_config(ModelConfig, arguments.shape).model_copy(update={"initializer_range": 0.1})
    with tempfile.TemporaryDirectory() as folder:
        contenders = build(shape, Path(folder), arguments.compiled)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": arguments.shape.name,
        "new_tokens_a_row": NEW_TOKENS,
        "batches": [compare(contenders, shape, batch, arguments.rounds) for batch in BATCHES],
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def build(shape: ModelConfig, folder: Path, compiled: bool) -> dict[str, Contender]:
    """Every way of decoding the one model, which is written as a run and exported.

    The one that is `compiled` is reported, and no part of what has to be beaten.
    """
    model, tokenizer = LanguageModel(shape), Tokenizer.load(HOUSE / "tokenizer/tiny")
    model.initialise(0)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    files = {"config.yaml": "", "model.yaml": dump_config(shape), "trainer.json": "{}", "tokenizer": tokenizer.save}
    write.save(folder / "run/checkpoints", 1, state, files)
    export_run(folder / "run", folder / "exported", proof_bytes=0)
    ours = Session.load(folder / "run", device="cpu").model
    contenders: dict[str, Contender] = {"moe-lm": lambda prompts: generate(ours, prompts, Settings(NEW_TOKENS))}
    for name in EXPERTS:
        theirs = AutoModelForCausalLM.from_pretrained(
            folder / "exported", experts_implementation=name, attn_implementation="sdpa"
        )
        contenders[f"transformers {name}"] = transformers_generate(theirs.eval())
    if compiled:
        contenders[COMPILED] = transformers_generate(theirs, **static_and_compiled())
    return contenders


def static_and_compiled() -> dict[str, object]:
    """Options of `generate`; without the underscored one it compiles on GPUs alone, and says nothing of it."""
    how = CompileConfig(mode="default")
    how._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": how}


def transformers_generate(model: PreTrainedModel, **options: object) -> Contender:
    def run(prompts: Sequence[list[int]]) -> Texts:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        lengths = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, do_sample=False, **lengths, **options)
        return out[:, longest:].tolist()

    return run


def compare(
    contenders: dict[str, Contender], shape: ModelConfig, batch: tuple[int, int, int], rounds: int
) -> dict[str, object]:
    """Tokens/s of every contender, in turns after one that is not counted; all have to write the same."""
    rows, shortest, longest = batch
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, rows).long().tolist()
    prompts = [torch.randint(shape.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_speeds: dict[str, list[float]] = {name: [] for name in contenders}
    texts: dict[str, Texts] = {}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            started, cpu = time.perf_counter(), time.process_time()
            texts[name] = run(prompts)
            if turn:
                speeds[name].append(rows * NEW_TOKENS / (time.perf_counter() - started))
                cpu_speeds[name].append(rows * NEW_TOKENS / (time.process_time() - cpu))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max((name for name in medians if name not in ("moe-lm", COMPILED)), key=medians.__getitem__)
    same = sum(ours == theirs for ours, theirs in zip(texts["moe-lm"], texts[best], strict=True))
    return {
        "rows": rows,
        "prompt_tokens": sum(lengths),
        "tokens_per_second": {
            name: {"median": round(medians[name]), "min": round(min(values)), "max": round(max(values))}
            for name, values in speeds.items()
        },
        "best_of_transformers": best,
        "ratio": ratio(speeds["moe-lm"], speeds[best]),
        "ratio_of_cpu_time": ratio(cpu_speeds["moe-lm"], cpu_speeds[best]),
        "rows_with_the_same_tokens": same,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 2)


if __name__ == "__main__":
    main()
