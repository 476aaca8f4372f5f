"""The table of mutations fits the code: each text stands once in its file, and the tests that kill it are there."""

from __future__ import annotations

import ast

import pytest

from tests.mutations.frame import ROOT, all_mutations

MUTATIONS = all_mutations()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_text_stands_once_in_its_file_and_the_change_is_python(name: str) -> None:
    mutation = MUTATIONS[name]
    changed = mutation.mutated()
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse((ROOT / "moe_lm" / mutation.file).read_text("utf-8")))


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tests_that_kill_it_are_there(name: str) -> None:
    assert MUTATIONS[name].tests
    for killer in MUTATIONS[name].tests:
        file, _, test = killer.partition("::")
        source = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
        assert not test or test.partition("[")[0] in tests, killer
