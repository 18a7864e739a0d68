"""Imports go one way: layers.ops <- layers <- pattern, models <- checkpoints <- data <- bench <- ablation <- cli."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from sources import ROOT, Source, imported_modules, package_sources

SOURCES = package_sources()
MODULES = {source.module for source in SOURCES}

# Level of each part: a part may import its own level's modules of the same part, and lower levels; parts of one level
# know nothing of each other unless ALLOWED_WITHIN_LEVEL says so. A new part of hybridvl must be placed here.
LEVELS = [
    {"layers.errors"},
    {"layers.ops"},
    {"layers"},
    {"pattern", "models", "testing"},
    {"checkpoints", "pictures", "resident"},
    {"data", "hf", "plan"},
    {"inference", "conversion"},
    {"training"},
    {"bench", "pipeline"},
    {"ablation"},
    {"cli"},
    {"__main__"},
]
ALLOWED_WITHIN_LEVEL = {("models", "pattern")}
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def part_of(module: str) -> str:
    """'hybridvl.layers.ops.ssd' -> 'layers.ops', 'hybridvl.models.vlm' -> 'models', 'hybridvl' -> ''."""
    parts = module.split(".")[1:]
    longest = ".".join(parts[:2])
    return longest if longest in LEVEL else "".join(parts[:1])


def wrong_direction(importer: str, imported: str) -> bool:
    here, there = part_of(importer), part_of(imported)
    if here == there or not here or not there or (here, there) in ALLOWED_WITHIN_LEVEL:
        return False
    return LEVEL[there] >= LEVEL[here]


def own_imports(source: Source) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imported_modules(source, MODULES) if name.split(".")[0] == "hybridvl"]


def test_every_part_has_a_level() -> None:
    assert {part_of(module) for module in MODULES} - {""} <= set(LEVEL)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_imports_go_one_way(source: Source) -> None:
    wrong = [
        f"{source}:{line} imports {name}" for line, name in own_imports(source) if wrong_direction(source.module, name)
    ]
    assert not wrong


@pytest.mark.parametrize("source", [s for s in SOURCES if s.module.startswith("hybridvl.layers")], ids=str)
def test_layers_import_torch_alone(source: Source) -> None:
    """Kernels (fla, triton, flash-attn) are optional: they may be imported inside functions of layers/ops only."""
    allowed = {"torch", "hybridvl", *sys.stdlib_module_names}
    lines = {line: name for line, name in imported_modules(source, MODULES) if name.split(".")[0] not in allowed}
    if source.module.startswith(f"{LAZY}."):  # chosen, and imported, only where its package is
        lines = {line: name for line, name in lines.items() if name.split(".")[0] not in KERNELS}
    elif source.module.startswith("hybridvl.layers.ops"):
        top_level = {node.lineno for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        lines = {line: name for line, name in lines.items() if line in top_level or name.split(".")[0] not in KERNELS}
    assert not lines


KERNELS = {"fla", "triton", "flash_attn", "causal_conv1d", "mamba_ssm"}
LAZY = "hybridvl.layers.ops.kernels"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_kernel_modules_are_imported_inside_functions_only(source: Source) -> None:
    if source.module.startswith(LAZY):
        return
    top_level = {node.lineno for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    assert not [name for line, name in own_imports(source) if name.startswith(LAZY) and line in top_level]


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a directed graph as the modules along it, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_no_module_imports_itself_through_others() -> None:
    graph = {source.module: {name for _, name in own_imports(source) if name in MODULES} for source in SOURCES}
    assert find_cycle(graph) == []


def test_the_checks_see_planted_faults(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from hybridvl.training import supervised\n    from ..cli import main\n")
    source = Source(planted, "hybridvl.layers.planted")
    assert [name for _, name in imported_modules(source, {"hybridvl.training.supervised"})] == [
        "hybridvl.training.supervised",
        "hybridvl.cli",
    ]
    assert wrong_direction("hybridvl.layers.ops.ssd", "hybridvl.layers.gdn")
    assert wrong_direction("hybridvl.data.module", "hybridvl.training.supervised")
    assert not wrong_direction("hybridvl.models.vlm", "hybridvl.pattern")
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_link_is_not_counted_twice() -> None:
    files = [source.path.resolve() for source in SOURCES]
    assert len(files) == len(set(files))
    assert ROOT / "layers" / "base.py" in files
