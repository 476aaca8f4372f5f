"""README and docs/: what they name exists, and README is as short as it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from moe_lm.config.reading import build_config
from moe_lm.config.run import PretrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = [path.name for folder in (ROOT, ROOT / "moe_lm") for path in folder.iterdir() if path.is_dir()]
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, ROOMS))})/[\w./-]*\w/?)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = {name for name in PATH.findall(text) if not ((ROOT / name).exists() or (ROOT / "moe_lm" / name).exists())}
    missing |= {link for link in LINK.findall(text) if not (page.parent / link).exists()}
    assert not missing


def test_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_the_config_of_the_readme_is_one() -> None:
    (text,) = [body for kind, body in BLOCK.findall(README) if kind == "yaml"]
    assert build_config(PretrainConfig, yaml.safe_load(text), "README.md").model.n_routed_experts == 8


def test_readme_shows_only_commands_that_ci_runs() -> None:
    said = [line for kind, body in BLOCK.findall(README) if not kind for line in body.splitlines()]
    commands = [line for line in said if line.startswith((".venv/bin/", "bash ", "curl "))]
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in commands:
        shown = command.split("#")[0].strip().replace("runs/quickstart/", '"$run/')
        words = [word for word in re.split(r'["\s]+', shown) if word]
        assert any(all(word in line for word in words) for line in run.splitlines()), command
