"""Mutations: small changes of the program that would hurt a user, each of which a test must kill.

A file in `rooms/` lists the mutations of one room as `MUTATIONS`. `run.py` tries them in a copy of the project;
`test_table.py` holds the table to the code in every CI.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = Path(__file__).with_name("rooms")


@dataclass(frozen=True)
class Mutation:
    """A change of the program: `text`, which stands once in `file` of the package, becomes `replacement`.

    `killers` are pytest's arguments, below `tests/` and apart by spaces: the tests of which one at least must fail.
    They are as few as will do, since each mutation runs them all. `slow` tests count where no other kills it.
    """

    name: str
    file: str
    text: str
    replacement: str
    killers: str
    slow: bool = False

    @property
    def tests(self) -> list[str]:
        return [f"tests/{killer}" for killer in self.killers.split()]

    def mutated(self, root: Path = ROOT) -> str:
        """The file's content with the change. Raises ValueError for a `text` that does not stand there once."""
        content = (root / "moe_lm" / self.file).read_text(encoding="utf-8")
        if (count := content.count(self.text)) != 1:
            raise ValueError(f"{self.name}: its text stands {count} times in moe_lm/{self.file}, expected once")
        return content.replace(self.text, self.replacement)


@functools.cache
def all_mutations() -> dict[str, Mutation]:
    """Every mutation by its name, room after room."""
    found: dict[str, Mutation] = {}
    for path in sorted(ROOMS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"tests.mutations.rooms.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for mutation in module.MUTATIONS:
            assert mutation.name not in found, f"two mutations are called {mutation.name}"
            found[mutation.name] = mutation
    return found
