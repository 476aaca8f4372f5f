"""From typing `moe-lm sample` to its first token, on a model shaped like the quickstart's: seconds, of whole processes.

`OMP_NUM_THREADS=2 python eval/bench/first_token.py [--rounds N] [--out FILE]`. The first process may build the C++ of
decoding and fill the page cache; it is told apart from the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from moe_lm.checkpoint import write
from moe_lm.config.reading import dump_config, load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.model.size import count_parameters
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer

HOUSE = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = load_config(PretrainConfig, HOUSE / "configs/pretrain/quickstart.yaml").model
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = LanguageModel(shape), Tokenizer.load(HOUSE / "tokenizer/tiny")
        model.initialise(0)
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        files = {"config.yaml": "", "model.yaml": dump_config(shape), "trainer.json": "{}", "tokenizer": tokenizer.save}
        write.save(Path(folder) / "checkpoints", 1, state, files)
        seconds = [first_token(folder) for _ in range(arguments.rounds + 1)]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, "
        f"load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "parameters": count_parameters(shape).total,
        "first_process_s": round(seconds[0], 2),
        "seconds": [round(value, 2) for value in seconds[1:]],
        "median_s": round(statistics.median(seconds[1:]), 2),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def first_token(run: str) -> float:
    """Until the first character of the text can be read from a new process."""
    command = [sys.executable, "-m", "moe_lm", "sample", run, "--prompt", "import os", "--max-new-tokens", "8"]
    begun = time.perf_counter()
    process = subprocess.Popen([*command, "--greedy"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=HOUSE)
    assert process.stdout is not None
    character = process.stdout.read(1)
    seconds = time.perf_counter() - begun
    process.communicate()
    assert character, "no text came"
    return seconds


if __name__ == "__main__":
    main()
