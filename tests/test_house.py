"""The rules of the house: floors without exemptions, no circles, what each room may import, sizes, loose ends."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_lm"
LONGEST_FILE = 400  # lines
LOOSE_END = re.compile(r"\b(TO-?DO|FIX-?ME|X{3})\b|raise\s+NotImplemented")  # spelled so that it does not find itself
MODEL_IMPORTS = ("torch", "moe_lm.config", "moe_lm.model")
PARALLEL_ROOMS = ("parallel", "engine")  # only these import torch.distributed
CHECKPOINT_IMPORTS = ("torch.distributed.checkpoint", "torch.distributed.tensor")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def imported_names(path: Path) -> frozenset[str]:
    """Full dotted names, wherever in the file and under TYPE_CHECKING too.

    `from torch import distributed` gives `torch.distributed`, and so does its use as an attribute.
    """
    return frozenset(_imported_names(ast.parse(path.read_text(encoding="utf-8"))))


def _imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch."):
                yield name


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imported_modules(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports."""
    modules = {module_of(file) for file in sources("moe_lm")}
    names = imported_names(path)
    found = {name if name in modules else name.rpartition(".")[0] for name in names if within(name, "moe_lm")}
    return frozenset(found & modules - {module_of(path)})


def contracts() -> list[dict[str, object]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = settings["tool"]["importlinter"]["contracts"]
    assert isinstance(found, list)
    return found


@functools.cache
def floors() -> dict[str, int]:
    """The floor of every room, 0 at the top, as the contract of layers in pyproject.toml says."""
    layers = contracts()[0]["layers"]
    assert isinstance(layers, list)
    return {room.strip(" ()"): floor for floor, layer in enumerate(layers) for room in re.split("[|:]", layer)}


def test_the_contract_has_no_exemption() -> None:
    assert not any(key.startswith(("ignore_imports", "unmatched_ignore")) for found in contracts() for key in found)


@pytest.mark.parametrize("path", sources("moe_lm"), ids=module_of)
def test_no_import_runs_upwards(path: Path) -> None:
    if path.parent == PACKAGE and path.stem == "__init__":
        assert not imported_modules(path)
        return
    here = floors()[module_of(path).split(".")[1]]
    above = {name for name in imported_modules(path) if "." in name and floors()[name.split(".")[1]] < here}
    assert not above


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = {module_of(path): imported_modules(path) for path in sources("moe_lm")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", sources("moe_lm/model"), ids=module_of)
def test_model_imports_torch_and_the_config_alone(path: Path) -> None:
    names = {name for name in imported_names(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert not {name for name in names if not any(within(name, allowed) for allowed in MODEL_IMPORTS)}


@pytest.mark.parametrize("path", sources("moe_lm"), ids=module_of)
def test_nothing_of_the_walk_imports_a_tool(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    assert room in ("tools", "cli") or not any(within(name, "moe_lm.tools") for name in imported_names(path))


@pytest.mark.parametrize("path", sources("moe_lm"), ids=module_of)
def test_torch_distributed_stays_in_parallel_and_engine(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    found = {name for name in imported_names(path) if within(name, "torch.distributed")}
    if room == "checkpoint":
        found = {name for name in found if not any(within(name, allowed) for allowed in CHECKPOINT_IMPORTS)}
    assert room in PARALLEL_ROOMS or not found


@pytest.mark.parametrize("path", sources("moe_lm/train"), ids=module_of)
def test_in_training_the_trackers_alone_use_accelerate(path: Path) -> None:
    assert path.stem == "trackers" or not any(within(name, "accelerate") for name in imported_names(path))


@pytest.mark.parametrize("path", [path for path in sources("moe_lm") if path.name == "__init__.py"], ids=module_of)
def test_every_folder_says_what_it_is_and_in_which_order_it_is_read(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert said
    files = {file.stem for file in path.parent.glob("*.py")} - {"__init__", "__main__"}
    folders = {file.parent.name for file in path.parent.glob("*/__init__.py")}
    assert {name for name in files | folders if not re.search(rf"\b{name}\b", said)} == set()


@pytest.mark.parametrize(
    "path", sources("moe_lm", "tests", "eval", "docs"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_file_is_one_noun_and_finished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    assert LOOSE_END.search(text) is None
