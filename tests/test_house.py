"""The rules of the house that an import contract cannot say: parts of torch, sizes of files, loose ends."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_lm"
LONGEST_FILE = 420  # lines
LOOSE_END = re.compile(r"\b(TO-?DO|FIX-?ME|X{3})\b|raise\s+NotImplemented")  # spelled so that it does not find itself
MODEL_IMPORTS = {"torch", "moe_lm.config", "moe_lm.model"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(path: Path) -> Iterator[str]:
    """Full dotted names: `from torch import distributed` gives `torch.distributed`, and so does its use."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch."):
                yield name


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("path", sources("moe_lm"), ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_distributed_stays_in_parallel(path: Path) -> None:
    found = [name for name in imported_names(path) if within(name, "torch.distributed")]
    if path.parent == PACKAGE / "checkpoint":
        allowed = ("torch.distributed.checkpoint", "torch.distributed.tensor")
        found = [name for name in found if not any(within(name, module) for module in allowed)]
    assert path.parent in (PACKAGE / "parallel", PACKAGE / "engine") or not found


@pytest.mark.parametrize("path", sources("moe_lm/model"), ids=lambda path: path.name)
def test_model_imports_only_torch(path: Path) -> None:
    modules = {name for name in imported_names(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert not {name for name in modules if not any(within(name, allowed) for allowed in MODEL_IMPORTS)}


@pytest.mark.parametrize("path", sources("moe_lm", "tests", "eval"), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_one_noun_and_finished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    assert LOOSE_END.search(text) is None
