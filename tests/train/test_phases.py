"""Phases of a run: resumed to the bit, said in the log, and free to be changed before they begin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.model.size import flops_per_token
from moe_lm.parallel.topology import Topology
from moe_lm.train import preflight, pretrain
from moe_lm.train.phases import flops_of_step
from tests.processes import events
from tests.runs import assert_same_run
from tests.train.test_pretrain import SHORT

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]
PHASES = "data.phases=[{share: 0.6}, {share: 0.4, weights: {two: 1}, sequence_length: 128}]"


@pytest.fixture(scope="module")
def two_sources(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A config with two sources, prepared, and with phases: steps 1 to 7 and 8 to 12."""
    from moe_lm.data.prepare import prepare

    path = load_config(PretrainConfig, tiny_pretrain).data.sources[0].path
    folder = tmp_path_factory.mktemp("phases")
    sources = f"data.sources=[{{name: one, path: {path}}}, {{name: two, path: {path}, weight: 3}}]"
    command = (tiny_pretrain, sources, f"data.shards={folder}", PHASES, "checkpoint.every=6", *SHORT)
    prepare(load_config(PretrainConfig, tiny_pretrain, command[1:3]).data)
    return command


def test_a_run_in_phases_resumes_to_the_bit_and_says_when_they_begin(
    two_sources: tuple[Any, ...], tmp_path: Path, moe_lm: MoeLm
) -> None:
    """A phase that has not begun may still be changed, and one that has may not."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert moe_lm("pretrain", *two_sources, f"run_dir={whole}").code == 0
    begun = [(event["step"], event["sequence_length"], event["rows"]) for event in events(whole, "phase")]
    assert begun == [(1, 64, 8), (8, 128, 4)]
    assert events(whole, "phase")[1]["weights"] == {"one": 0, "two": 1}
    log = (whole / "train.log").read_text()
    assert "phase 1 of 2 begins: 8 rows of 64 tokens, one 25%, two 75%\n" in log
    assert "phase 2 of 2 begins: 4 rows of 128 tokens, two 100%\n" in log
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000012")
    assert moe_lm("pretrain", *two_sources, f"run_dir={parted}").code == 0
    assert_same_run(whole, parted)
    assert len(events(parted, "phase")) == 2
    shutil.rmtree(parted / "checkpoints" / "step-00000012")
    later = PHASES.replace("0.6", "0.75").replace("0.4", "0.25")
    for phases, code, words in (
        (PHASES.replace("128", "256"), 2, "data.phases: "),  # of which the windows of the first phase are parts
        (later, 0, "going on after step 6 of 12"),
        (PHASES, 2, "with these phases, the steps that are done would have read other rows"),
    ):
        done = moe_lm("pretrain", *two_sources, f"run_dir={parted}", phases)
        assert (done.code, words in done.out + done.err) == (code, True), done
    assert [event["step"] for event in events(parted, "phase")] == [1, 10]


def test_a_dry_run_shows_the_phases(two_sources: tuple[Any, ...], tmp_path: Path, moe_lm: MoeLm) -> None:
    """Their steps, tokens, and epochs of each source; what is in memory is the longest rows'."""
    done = moe_lm("pretrain", *two_sources, f"run_dir={tmp_path}", "--dry-run")
    first, second = (line for line in done.out.splitlines() if line.startswith("phase "))
    assert first.startswith(
        "phase 1         steps 1 to 7, 3,584 tokens, 8 rows of 64 tokens, one 25%, two 75%; epochs: one "
    )
    assert second.startswith(
        "phase 2         steps 8 to 12, 2,560 tokens, 4 rows of 128 tokens, two 100%; epochs: two "
    )
    config = load_config(PretrainConfig, two_sources[0], two_sources[1:])
    [shards, _] = pretrain.open_shards(config, "train", pretrain.load_tokenizer(config))
    assert second.endswith(f" {20 / ((shards.num_tokens - 1) // 128):.2f}")
    halves = [flops_per_token(config.model, length, causal_half=True) for length in (64, 128)]
    assert f", {512 * (7 * halves[0] + 5 * halves[1]):.3g} FLOPs" in done.out
    longest = config.in_longest_phase
    assert (longest.row_length, longest.train.global_batch_size, longest.train.micro_batch_size) == (128, 4, 2)
    with pytest.raises(UsageError, match=r"phase 2 of data\.phases has 4 rows a step, .* by the 8 processes"):
        preflight.check_layout(
            config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": None})}),
            Topology(world_size=8),
        )


def test_the_flops_of_a_step_are_those_of_its_rows(two_sources: tuple[Any, ...]) -> None:
    config = load_config(PretrainConfig, two_sources[0], two_sources[1:])
    flops = flops_of_step(config, config.model)
    halves = [flops_per_token(config.model, length, causal_half=True) for length in (64, 128)]
    assert [flops(step) for step in (0, 6, 7, 11, 99)] == [*halves[:1] * 2, *halves[1:] * 3]
