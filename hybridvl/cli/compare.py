"""`hybridvl compare`: the settings in which runs differ, and their metrics, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from hybridvl.ablation.report.comparison import Comparison, compare_runs
from hybridvl.ablation.report.labels import MISSING
from hybridvl.ablation.report.wording import number
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.output import table_console, write_json
from hybridvl.layers.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Print the tables; returns 0. Mistakes are ConfigErrors."""
    options = _parser().parse_args(argv)
    if len(options.runs) < 2:
        raise ConfigError(f"{options.runs[0]}: one run; expected at least two to compare")
    found = compare_runs(options.runs)
    if options.json != "-":
        _show(found)
    if options.json is not None:
        write_json(_plain(found), options.json)
    for name, run in zip(found.names, found.runs, strict=True):
        for problem in run.problems:
            print(f"warning: {name}: {problem}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl compare",
        description="Set runs side by side: the settings in which their resolved recipes differ, how they ended, and "
        "every metric; of two runs also the difference. For means over seeds see hybridvl report.",
        epilog="example: hybridvl compare runs/digits/version_0 runs/digits/version_1",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, as hybridvl fit leaves them")
    parser.add_argument("--json", metavar="FILE", help="write all values; '-' prints them instead of tables")
    return parser


def _show(found: Comparison) -> None:
    console = table_console()
    if found.settings:
        console.print(_table("settings that differ", found.names, found.settings))
    else:
        console.print("the recipes differ in nothing")
    console.print(_table("how they ended", found.names, found.outcomes))
    two = len(found.names) == 2
    rows = {}
    for name, values in found.metrics.items():
        rows[name] = [number(value) for value in values]
        if two:
            rows[name].append(_difference(values))
    console.print(_table("metrics", [*found.names, *(["difference"] if two else [])], rows, right=True))


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]], right: bool = False) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(escape(name), overflow="fold", justify="right" if right else "left")
    for name, texts in rows.items():
        table.add_row(escape(name), *map(escape, texts))
    return table


def _difference(values: Sequence[float | None]) -> str:
    first, second = values
    if first is None or second is None:
        return MISSING
    return f"{'+' if second > first else ''}{number(second - first)}"


def _plain(found: Comparison) -> dict[str, object]:
    return {
        "runs": [str(run.path) for run in found.runs],
        "settings": dict(found.settings),
        "outcomes": dict(found.outcomes),
        "metrics": dict(found.metrics),
    }
