"""The pages that are generated from the code say what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["pages"]()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name], "it is stale; run python docs/generate.py"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_setting_and_option_is_described(name: str) -> None:
    assert "|  |\n" not in PAGES[name]
    assert "| None |\n" not in PAGES[name]
