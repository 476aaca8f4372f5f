"""Does llama.cpp compute what an exported model computes here? Greedy tokens, log-probabilities and tokenization.

    pip install xllamacpp gguf
    git clone https://github.com/ggml-org/llama.cpp
    moe-lm export runs/quickstart/finetune OUT
    python eval/studies/llama_cpp.py runs/quickstart/finetune OUT llama.cpp --results eval/results/llama_cpp.json

llama.cpp's converter knows tokenizers by a hash and refuses any other ("BPE pre-tokenizer was not recognized"). Ours
cuts text as `gpt-4o` does there, so the converter is told that name here; for a model of your own, put the hash that it
prints and that name into its `get_vocab_base_pre`. xllamacpp is llama.cpp, built for CPUs.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.model.attention import PackedAttention

PRE_TOKENIZER = "gpt-4o"
NEW_TOKENS = 32
TEXTS = (
    "import os\n\ndef main(arguments):\n    return 12345 + x",
    "What does this function do?",
    "class Path(PurePath):\n",
    "It was a dark and stormy night; the rain fell in torrents,",
    "There was once a king who had",
    "太祖皇帝说：“",
    "这一年，",
    "I'll take it, she'd said; it's 3.14 and 42% of 1,000!",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("llama_cpp", type=Path, help="a checkout of llama.cpp, for its convert_hf_to_gguf.py")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    session = Session.load(arguments.run, device="cpu")
    ids = [[session.tokenizer.bos_id, *session.tokenizer.encode(text)] for text in TEXTS]
    with TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        convert(arguments.exported, gguf, arguments.llama_cpp)
        theirs = serve(gguf, [*ids, *TEXTS])
    stops = session.tokenizer.stop_ids
    ours = generate(session.model, ids, Settings(NEW_TOKENS), stops, session.tokenizer.vocab_size)
    written = [[there["id"] for there in answer if there["id"] not in stops] for answer in theirs]
    result = {
        "date": date.today().isoformat(),
        "llama.cpp": f"xllamacpp {version('xllamacpp')}",
        "prompts": len(TEXTS),
        "greedy_continuations_equal": sum(here == there for here, there in zip(ours, written, strict=False)),
        "tokens": sum(map(len, ours)),
        "different_tokens_written": len({token for text in ours for token in text}),
        "largest_difference_of_log_probs": difference(session, ids, theirs),
        "equal_when_llama_cpp_cuts_the_text": sum(
            here == there for here, there in zip(ours, written[len(ids) :], strict=True)
        ),
    }
    arguments.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def convert(exported: Path, gguf: Path, llama_cpp: Path) -> None:
    """Run llama.cpp's own converter, float32, with the name of the pre-tokenizer."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import conversion.base

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    arguments = sys.argv
    sys.argv = ["convert", str(exported), "--outfile", str(gguf), "--outtype", "f32"]
    try:
        runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")
    finally:
        sys.argv = arguments


def serve(gguf: Path, prompts: list[Any]) -> list[list[dict[str, Any]]]:
    """What llama.cpp's server writes after prompts of text or ids, greedily: tokens with the likeliest beside them."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(gguf), 512, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = (
        1  # more wait for each other on a busy machine
    )
    server = xllamacpp.Server(parameters)
    answers = []
    for prompt in prompts:
        asked = {
            "prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "top_k": 1, "n_probs": 5,
            "cache_prompt": False, "ignore_eos": False,
        }  # fmt: skip
        answers.append(server.handle_completions(asked)["choices"][0]["logprobs"]["content"])
    return answers


@torch.inference_mode()
def difference(session: Session, ids: list[list[int]], answers: list[list[dict[str, Any]]]) -> float:
    """Of the log-probabilities of the five likeliest first tokens, in nats."""
    largest = 0.0
    for tokens, answer in zip(ids, answers, strict=False):
        length = len(tokens)
        attend = PackedAttention(torch.tensor([0, length], dtype=torch.int32), length)
        hidden, _ = session.model.model(torch.tensor(tokens)[None], torch.arange(length)[None], attend)
        log_probs = session.model.lm_head(hidden[0, -1]).log_softmax(-1)
        for one in answer[0]["top_logprobs"]:
            largest = max(largest, abs(one["logprob"] - log_probs[one["id"]].item()))
    return largest


if __name__ == "__main__":
    main()
