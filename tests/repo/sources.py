"""The project's own Python files as syntax trees, for the tests that hold its structure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """One file: where it lies, and the dotted name it is imported by (tests: the name of the file)."""

    path: Path
    module: str

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


def package_sources() -> list[Source]:
    """All files of the package, each once: layers/ under its import name, the link skipped."""
    found = []
    for top, prefix in (("hybridvl", ("hybridvl",)), ("layers", ("hybridvl", "layers"))):
        for path in sorted((ROOT / top).rglob("*.py")):
            inner = path.relative_to(ROOT / top)
            if top == "hybridvl" and inner.parts[0] == "layers":
                continue
            parts = (
                (*prefix, *inner.parent.parts)
                if path.name == "__init__.py"
                else (*prefix, *inner.with_suffix("").parts)
            )
            found.append(Source(path, ".".join(parts)))
    return found


def suite_sources() -> list[Source]:
    """All test files."""
    return [Source(path, path.stem) for path in sorted((ROOT / "tests").rglob("*.py"))]


def imported_modules(source: Source, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, at any depth, but for those only a type checker sees.

    `from a import b` counts as a.b where that is one of the known modules, else as a.
    """
    for node in _runtime_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = source.module.split(".")
    parts = parts[: len(parts) - node.level + source.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for branch in node.orelse:
                yield branch
                yield from _runtime_nodes(branch)
            continue
        yield node
        yield from _runtime_nodes(node)
