"""Two ranks of `moe-lm prepare`, as a launcher starts them: they end together, and one of them says why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def prepare_on_two(tmp_path: Path, *shards: Path) -> list[tuple[int, str]]:
    """The exit codes and what two ranks say, each with a folder for shards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))[0]
    ranks = []
    for rank, folder in enumerate(shards):
        overrides = [
            f"data.tokenizer={ROOT / 'tokenizer' / 'tiny'}", "data.workers=1", f"data.shards={folder}",
            f"data.sources=[{{name: corpus, path: {tmp_path / 'text'}}}]",
        ]  # fmt: skip
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "moe_lm", "prepare", config, *overrides],
                env=os.environ | {key: str(value) for key, value in environment.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


@pytest.mark.slow
def test_ranks_end_together_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text(f"The text of {name}.\n" * 300)
    mine, other = tmp_path / "mine", tmp_path / "other"
    (code, said), (code_1, said_1) = prepare_on_two(tmp_path, mine, other)
    assert (code, code_1, said_1) == (2, 2, "")
    assert "rank 1 on" in said
    assert said.rstrip().endswith("data.shards must be a folder that all hosts share")
    (code, said), (code_1, said_1) = prepare_on_two(tmp_path, mine, mine)
    assert (code, code_1, said_1) == (0, 0, "")
    assert "corpus: 3 documents" in said
    (tmp_path / "text" / "a.txt").write_text("other")
    (code, said), (code_1, said_1) = prepare_on_two(tmp_path, mine, mine)
    assert (code, code_1, said_1) == (2, 2, "")
    assert "prepared from something else: files was" in said
