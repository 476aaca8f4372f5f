"""The parity check on what fine-tuning minimises: masked targets, pairs with their reference, adapters, own tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import MoeLm, SaveRun
from tests.tiny import tiny_model

PREFER = "preference={beta: 0.1, label_smoothing: 0.1, sft_weight: 0.5}"
ADAPT = "lora={rank: 8, dropout: 0.1}"
FROZEN = [  # the router, the experts
    ("train.freeze_router=true",),
    ("lora={rank: 4, dropout: 0.2, targets: [attention]}", "train.freeze_router=false"),
]


@pytest.fixture
def config_file(save_run: SaveRun, tmp_path: Path) -> Path:
    """The config file of a fine-tuning that starts from a tiny model."""
    config = {
        "run_dir": str(tmp_path / "finetune"),
        "start_from": str(save_run(tiny_model(vocab_size=1024, max_position_embeddings=512))),
        "data": {"train": [str(tmp_path / "not-read.jsonl")]},
        "train": {"steps": 10, "global_batch_size": 8},
        "parallel": {"device": "cpu"},
    }
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def layouts(moe_lm: MoeLm, *arguments: object) -> tuple[int, dict[str, Any]]:
    done = moe_lm("verify", *arguments, "--json", "-")
    report = json.loads(done.out)
    return done.code, {layout["name"]: layout for layout in report["layouts"]} | {"report": report}


@pytest.mark.parametrize(
    "settings", [(ADAPT, PREFER), pytest.param(("train.scheduled_sampling={share: 0.5}",), marks=pytest.mark.slow)]
)
def test_every_layout_fine_tunes_as_one_process(config_file: Path, moe_lm: MoeLm, settings: tuple[str, ...]) -> None:
    names = ("2 x torch", "2 x DeepSpeed, EP 2, ZeRO 3 after ZeRO 2")
    only = [argument for name in names for argument in ("--only", name)]
    code, found = layouts(moe_lm, config_file, *settings, "--world-sizes", "2", *only)
    assert code == 0
    for name in names:
        assert found[name]["ok"]
        assert found[name]["counts_equal"]
    report = found["report"]
    assert (report["preference"] is not None) == (PREFER in settings)
    assert (report["lora"] is not None) == (ADAPT in settings)
    assert report["model"]["first_k_dense_replace"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), (PREFER,), (ADAPT,), (ADAPT, PREFER), *FROZEN])
def test_every_kind_of_layout_fine_tunes_as_one_process(
    config_file: Path, moe_lm: MoeLm, settings: tuple[str, ...]
) -> None:
    """With documents packed or not, and from one layout's checkpoint to another layout."""
    code, found = layouts(moe_lm, config_file, *settings, "--quick")
    assert code == 0
    assert found["documents in rows of their own"]["ok"]
    assert found["1 process after DeepSpeed"]["ok"]


@pytest.mark.slow
def test_pairs_that_count_by_the_rank_are_found(config_file: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
    """A loss that is divided by the pairs of a rank, not of all ranks."""
    (tmp_path / "own_pairs.py").write_text(
        "from moe_lm.engine.engine import Engine\n"
        "from dataclasses import replace\n"
        "count = Engine._count\n"
        "def own(self, micro_batches):\n"
        "    counts = count(self, micro_batches)\n"
        "    world = self.topology.world_size\n"
        "    return replace(counts, units=world * max(1, sum(batch.num_pairs for batch in micro_batches)))\n"
        "Engine._count = own\n"
    )
    options = ("--world-sizes", "2", "--only", "2 x torch", "--sabotage", tmp_path / "own_pairs.py")
    done = moe_lm("verify", config_file, PREFER, *options)
    assert done.code == 1
    assert "2 x torch is not like 'one process': step 0: loss: expected" in done.err


def test_a_start_that_is_not_there_is_refused(config_file: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
    done = moe_lm("verify", config_file, f"start_from={tmp_path / 'nowhere'}")
    assert done.code == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.err
