"""Golden losses: 100 steps of a tiny MoE on text that a seeded Markov chain writes.

`python -m tests.golden.make` writes tests/golden/tiny_moe.json anew. A commit that moves the losses says why, and by
how much.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.train import pretrain
from tests.processes import metrics, one_thread_here

HERE = Path(__file__).parent
GOLDEN = HERE / "tiny_moe.json"
EVERY = 10  # steps between two golden losses
DOCUMENTS = 400
WORDS = 160
SYLLABLES = "ba den gi ko lum mar ne ori pas que ri sol ta un vel wen".split()


def main() -> None:
    with TemporaryDirectory() as folder:
        losses = golden_losses(Path(folder))
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")


def golden_losses(folder: Path) -> dict[str, float]:
    """Train in `folder` on one thread; the loss of every tenth step, and the held-out loss at the end."""
    config = golden_config(folder)
    prepare(config.data)
    with one_thread_here():
        pretrain.run(config)
    lines = metrics(config.run_dir)
    losses = {f"step {line['step']}": line["loss"] for line in lines if line["step"] % EVERY == 0}
    return losses | {"held-out": lines[-1]["val_loss"]}


def golden_config(folder: Path) -> PretrainConfig:
    """The config of the golden run in this folder, beside its text."""
    overrides = [
        f"run_dir={folder / 'run'}",
        f"data.shards={folder / 'shards'}",
        f"data.tokenizer={HERE.parents[1] / 'tokenizer' / 'tiny'}",
        f"data.sources=[{{name: text, path: {write_text(folder / 'text.jsonl')}}}]",
    ]
    return load_config(PretrainConfig, HERE / "tiny_moe.yaml", overrides)


def write_text(path: Path) -> Path:
    """Write the documents as JSONL; returns the path."""
    lines = [json.dumps({"text": text}) + "\n" for text in synthetic_documents()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def synthetic_documents() -> Iterator[str]:
    """Text with something to learn: each word has six successors, some likelier than others."""
    draw = random.Random(0).random  # of its methods, only this one promises the same numbers in every Python
    pick = lambda count: int(draw() * count)  # noqa: E731
    words = ["".join(SYLLABLES[pick(len(SYLLABLES))] for _ in range(1 + pick(3))) for _ in range(200)]
    successors = [[pick(len(words)) for _ in range(6)] for _ in words]
    for _ in range(DOCUMENTS):
        word = pick(len(words))
        text = []
        for _ in range(1 + pick(2 * WORDS)):
            text.append(words[word] + (".\n" if draw() < 0.05 else " "))
            word = successors[word][int(6 * draw() ** 2)]
        yield "".join(text)


if __name__ == "__main__":
    main()
