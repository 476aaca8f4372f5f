"""The page on public checkpoints (docs/finetuning.md): its commands and recipes load, its figures are right."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from moe_lm.cli.main import app
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig
from moe_lm.parallel.topology import Topology
from moe_lm.tools.interop.hf_config import read_config
from moe_lm.train import cost
from tests.processes import ROOT
from tests.tools.interop.published import PUBLISHED

FOLDER = ROOT / "configs" / "finetune"
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
MODELS = {
    "olmoe-1b-7b": "OLMoE-1B-7B-0924",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "moonlight-16b-a3b": "Moonlight-16B-A3B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
}
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.endswith(" |")]
LAYOUTS = [row for row in ROWS if row[0] in MODELS]
LINES = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith(("hf ", "vllm ", "python "))
]


def model_of(recipe: str) -> ModelConfig:
    name = MODELS[recipe]
    return read_config(PUBLISHED[name][1], name).config


def test_every_recipe_has_a_line_for_adapters_and_one_for_all_weights() -> None:
    for recipe in MODELS:
        shares = {row[1].split()[-1] for row in LAYOUTS if row[0] == recipe}
        assert "100%" in shares
        assert len(shares) > 1


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: f"{row[0]} on {row[2]}, {row[1]}")
def test_layout_of_the_table(row: list[str]) -> None:
    recipe, trained, gpus, settings, gib = row
    model, topology = model_of(recipe), Topology(world_size=int(gpus))
    config = load_config(FinetuneConfig, FOLDER / f"{recipe}.yaml", settings.strip("`").split())
    found = cost.cost(config, model, config.lora, topology)
    assert trained == f"{found.trained / 1e6:,.0f}M, {100 * found.trained / found.parameters:.2g}%".replace(
        "1e+02", "100"
    )
    assert gib == f"{found.memory.total / 2**30:.1f}"
    (line,) = (line for line in cost.describe(config, model, topology) if line.startswith("trained "))
    assert f" {found.trained:,} of {found.parameters:,} parameters" in line


@pytest.mark.parametrize("line", LINES)
def test_command_of_the_page(line: str) -> None:
    """Its verb and options exist, and its recipe loads with the settings behind it."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z]+=", word)]
    if words[0] == "moe-lm":
        verb, *words = words[1:]
        options = [word for word in words if word.startswith("--")]
        group: Any = typer.main.get_command(app)
        _, command, _ = group.resolve_command(typer.Context(group), [verb])
        assert set(options) <= {name for parameter in command.params for name in parameter.opts}
    else:
        script = next(word for word in words if word.startswith("launch/"))
        assert "VERB:-" in (ROOT / script).read_text(encoding="utf-8")
        assert line.startswith("VERB=finetune ")
    recipes = [word for word in words if word.endswith(".yaml")]
    for recipe in recipes:
        config = load_config(FinetuneConfig, ROOT / recipe, words[words.index(recipe) + 1 :] if "=" in line else ())
        assert f"--run-dir {config.start_from}" in PAGE
