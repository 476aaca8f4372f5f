"""Questions and answers out of the docstrings of Python's standard library: what the quickstart fine-tunes on."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import NamedTuple

from moe_lm.config.data import SourceConfig
from moe_lm.text.sources import Report, read_documents

MIN_ANSWER, MAX_ANSWER = 20, 400  # characters
IMPLEMENTATIONS = {"posixpath": "os.path", "_pydecimal": "decimal", "_pydatetime": "datetime", "_pyio": "io"}


class Pair(NamedTuple):
    """A question on a function or class, and its docstring's first paragraph."""

    document_id: str  # of the module it comes from
    question: str
    answer: str

    @property
    def conversation(self) -> dict[str, list[dict[str, str]]]:
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ]
        }


def docstring_pairs() -> Iterator[Pair]:
    """Every documented public function, method and class of the library, in the order of its modules."""
    for document in read_documents(SourceConfig(name="stdlib", stdlib=True), Report()):
        if document.id.endswith(".py"):
            try:
                module = ast.parse(document.text)
            except SyntaxError:  # a template or a module for another Python
                continue
            for name, answer in _documented(module, module_name(document.id)):
                yield Pair(document.id, f"What does `{name}` do?", answer)


def module_name(document_id: str) -> str:
    """`json/decoder.py` -> `json.decoder`, under the name that users import it by."""
    name = document_id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return IMPLEMENTATIONS.get(name, name)


def first_paragraph(docstring: str) -> str:
    """The first paragraph on one line."""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def _documented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            answer = first_paragraph(ast.get_docstring(child) or "")
            if MIN_ANSWER <= len(answer) <= MAX_ANSWER:
                yield name, answer
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, name)
