"""Questions about Python's standard library, answered by its docstrings: the quickstart fine-tunes on them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import NamedTuple

from moe_lm.config.data import SourceConfig
from moe_lm.text.sources import Report, read_documents

MIN_ANSWER, MAX_ANSWER = 20, 400  # characters
IMPLEMENTATIONS = {"posixpath": "os.path", "_pydecimal": "decimal", "_pydatetime": "datetime", "_pyio": "io"}


class Question(NamedTuple):
    """A question about a function or class, and the first paragraph of its docstring."""

    document_id: str  # of the module
    text: str
    answer: str

    @property
    def conversation(self) -> dict[str, list[dict[str, str]]]:
        return {"messages": [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.answer}]}


def docstring_questions() -> Iterator[Question]:
    """Questions about every documented public function, method and class, in the order of the modules."""
    for document in read_documents(SourceConfig(name="stdlib", stdlib=True), Report()):
        if document.id.endswith(".py"):
            try:
                module = ast.parse(document.text)
            except SyntaxError:  # a template, or a module for another Python version
                continue
            for name, answer in _documented(module, module_name(document.id)):
                yield Question(document.id, f"What does `{name}` do?", answer)


def module_name(document_id: str) -> str:
    """The name that users import: `json/decoder.py` is `json.decoder`."""
    name = document_id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return IMPLEMENTATIONS.get(name, name)


def first_paragraph(docstring: str) -> str:
    """The first paragraph, on one line."""
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
