"""Runs on token files that another program wrote: trained, gone on with and evaluated like any other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShards
from moe_lm.evaluate.perplexity import evaluate
from moe_lm.train import pretrain
from tests.data import writers
from tests.processes import one_thread_here
from tests.runs import assert_same_run, copy_as_of


@pytest.mark.parametrize("name", [pytest.param("web.bin", marks=pytest.mark.slow), "web.ds"])
def test_a_run_goes_on_to_the_bit_and_is_evaluated(name: str, tiny_pretrain: Path, tmp_path: Path) -> None:
    ours = load_config(PretrainConfig, tiny_pretrain)
    shards = TokenShards.open(ours.data.shards / "text", "train")
    documents = [ids[1:].tolist() for ids in shards.documents()]  # without bos
    write = writers.megatron if name == "web.bin" else writers.datatrove
    path = write(tmp_path / name, documents)

    def trained(run: str) -> None:
        overrides = [
            f"run_dir={tmp_path / run}", f"data.shards={tmp_path / 'shards'}", "train.steps=6", "checkpoint.every=3",
            "checkpoint.keep=9", f"data.sources=[{{name: web, tokens: {{path: {path}}}}}]",
        ]  # fmt: skip
        config = load_config(PretrainConfig, tiny_pretrain, overrides)
        prepare(config.data)
        with one_thread_here():
            pretrain.run(config)

    trained("whole")
    copy_as_of(3, tmp_path / "whole", tmp_path / "parted")
    trained("parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    score = evaluate(tmp_path / "whole")
    held_out = TokenShards.open(tmp_path / "shards" / "web", "validation")
    assert score.tokens == held_out.num_tokens - held_out.num_documents
    assert score.text_bytes is not None
    assert score.bits_per_byte == pytest.approx(score.nll * score.tokens / math.log(2) / score.text_bytes)
