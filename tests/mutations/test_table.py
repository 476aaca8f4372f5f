"""The table of mutations fits the code: each text stands once in its file, and the tests that kill it are there."""

from __future__ import annotations

import ast
import functools

import pytest

from tests.mutations.frame import ROOT, all_mutations

MUTATIONS = all_mutations()


@functools.cache
def names_in(file: str) -> set[str]:
    source = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in source.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("name", MUTATIONS)
def test_its_text_stands_once_in_its_file_and_its_tests_are_there(name: str) -> None:
    mutation = MUTATIONS[name]
    assert mutation.text != mutation.replacement
    ast.parse(mutation.mutated())
    assert mutation.tests
    for killer in mutation.tests:
        file, _, test = killer.partition("::")
        assert names_in(file) >= ({test.partition("[")[0]} if test else set()), killer
