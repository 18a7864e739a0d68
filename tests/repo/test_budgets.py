"""Size budgets and habits of the sources: lines, public names, docstrings, and no swallowed keyword arguments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sources import Source, package_sources, suite_sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_NAMES = 8

PACKAGE = package_sources()
EVERYTHING = PACKAGE + suite_sources()
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: Source) -> list[FunctionNode]:
    return [node for node in ast.walk(source.tree) if isinstance(node, FunctionNode)]


def function_lines(node: FunctionNode) -> int:
    """Lines from `def` to the end, docstring and decorators not counted."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def public_names(tree: ast.Module) -> list[str]:
    """`__all__` where there is one, else the public functions and classes defined at the top."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return [node.name for node in tree.body if isinstance(node, FunctionNode | ast.ClassDef) and node.name[0] != "_"]


def collects_keywords(node: ast.AST) -> bool:
    return isinstance(node, FunctionNode | ast.Lambda) and node.args.kwarg is not None


@pytest.mark.parametrize("source", EVERYTHING, ids=str)
def test_file_and_function_lengths(source: Source) -> None:
    assert len(source.text.splitlines()) <= MAX_FILE_LINES
    long = {node.name: n for node in functions(source) if (n := function_lines(node)) > MAX_FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("source", EVERYTHING, ids=str)
def test_module_docstring(source: Source) -> None:
    docstring = ast.get_docstring(source.tree)
    assert docstring, "a module begins with a sentence that says what it is for"


@pytest.mark.parametrize("source", PACKAGE, ids=str)
def test_public_names(source: Source) -> None:
    assert len(public_names(source.tree)) <= MAX_PUBLIC_NAMES


@pytest.mark.parametrize("source", PACKAGE, ids=str)
def test_no_function_swallows_keywords(source: Source) -> None:
    assert not [f"line {node.lineno}" for node in ast.walk(source.tree) if collects_keywords(node)]


def test_the_checks_see_planted_faults(tmp_path: Path) -> None:
    body = "\n".join(f"    x = {i}" for i in range(MAX_FUNCTION_LINES))
    planted = tmp_path / "planted.py"
    planted.write_text(f'def f(a, **rest):\n    """One\n    two."""\n{body}\n' + "class C: ...\ndef _hidden(): ...\n")
    source = Source(planted, "planted")
    assert function_lines(functions(source)[0]) == MAX_FUNCTION_LINES + 1
    assert public_names(source.tree) == ["f", "C"]
    assert public_names(ast.parse("__all__ = ['a', 'b']\ndef f(): ...")) == ["a", "b"]
    assert [node.name for node in functions(source) if collects_keywords(node)] == ["f"]
