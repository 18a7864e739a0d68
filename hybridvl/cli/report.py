"""`hybridvl report`: what many runs came to, with intervals over seeds, as text, tables and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from hybridvl.ablation.claims import Claim, read_claims
from hybridvl.ablation.report.analysis import Analysis, analyse
from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cells import Settings
from hybridvl.ablation.report.runs import collect
from hybridvl.ablation.report.tables import CLAIM_HEAD, claim_rows, headline, metric_table
from hybridvl.ablation.report.wording import counted
from hybridvl.ablation.report.writing import CACHE, write_report
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.output import out_folder, table_console
from hybridvl.layers.errors import ConfigError, within
from hybridvl.pipeline.mappings import read_mapping

_SHOWN = 40  # rows of a table in the terminal; the files have all


def main(argv: Sequence[str]) -> int:
    """Write a report and print its tables; returns 0. Mistakes are ConfigErrors."""
    options = _parser().parse_args(argv)
    baseline = _labels("--baseline", options.baseline, "ratio=1/4")
    tune = _labels("--tune", options.tune, "lr=val/loss")
    settings = Settings(baseline, options.interval, _level(options.level), tune)
    for flag, tokens in [("--context", options.context), *(("--latency", tokens) for tokens in options.latency or ())]:
        if tokens is not None and tokens < 1:
            raise ConfigError(f"{flag}: {tokens}; expected at least 1 token")
    folder = _folder(options.out, options.runs)
    cache = Cache(folder / CACHE)
    collected = collect(options.runs, cache)
    claims = [] if options.claims is None else _claims(Path(options.claims))
    analysis = analyse(collected, settings, options.metrics or (), options.context, options.latency or (), claims)
    written = write_report(analysis, folder)
    cache.save()
    _show(analysis)
    for warning in analysis.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"read         {counted(cache.read, 'file')} anew")
    for path in written:
        print(f"written      {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl report",
        description="Compare runs: means over seeds with intervals, paired differences to a baseline with a test, "
        "costs, and every run that failed. Runs are grouped by the labels of their study, or, when they were started "
        "by hand, by the settings in which their recipes differ. Writes into one folder: report.html (one page with "
        "everything), report.md, report.csv (one row a run), cells.csv (one row a cell and metric), report.json and "
        "PNGs. A second report into the same folder reads new and changed runs alone.",
        epilog="example: hybridvl report runs/ratio --metrics test/exact --baseline ratio=1/4",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders with runs in them")
    parser.add_argument("--out", metavar="DIR", help="default: report in the folder of the runs, or here for several")
    parser.add_argument("--metrics", nargs="+", metavar="TAG", help="default: the study's, or test/exact")
    parser.add_argument(
        "--baseline",
        nargs="+",
        metavar="LABEL=VALUE",
        help="compare each cell with the one that has these labels and otherwise its own; default: the study's",
    )
    parser.add_argument(
        "--tune",
        nargs="+",
        metavar="LABEL=TAG",
        help="of cells that differ in this label alone report the one that is best by this metric, such as lr=val/loss",
    )
    parser.add_argument(
        "--interval",
        choices=("t", "bootstrap"),
        default="t",
        help="of means and differences: Student's t with the paired t test (default), or percentiles of resamples with "
        "the sign-flip test",
    )
    parser.add_argument("--level", type=float, default=95, metavar="PERCENT", help="of the intervals; default: 95")
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="for FLOPs and state bytes; default: the runs' data.max_tokens"
    )
    parser.add_argument(
        "--latency",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="time a decode step of every model after so many tokens, here, on the CPU in float32",
    )
    parser.add_argument(
        "--claims", metavar="FILE", help="YAML with a list of claims to be judged, beside those of the study"
    )
    return parser


def _claims(path: Path) -> list[Claim]:
    content = read_mapping(path)
    with within(str(path)):
        return read_claims(content.get("claims"))


def _labels(flag: str, given: Sequence[str] | None, example: str) -> dict[str, str]:
    found = {}
    for entry in given or ():
        key, equals, value = entry.partition("=")
        if not (key and equals):
            raise ConfigError(f"{flag}: {entry!r}; expected LABEL=VALUE, such as {example}")
        found[key] = value
    return found


def _level(percent: float) -> float:
    if not 0 < percent < 100:
        raise ConfigError(f"--level: {percent:g}; expected a number above 0 and below 100, such as 95")
    return percent / 100


def _folder(out: str | None, runs: Sequence[str]) -> Path:
    if out is not None:
        return out_folder(out)
    return Path(runs[0] if len(runs) == 1 else ".") / "report"


def _show(analysis: Analysis) -> None:
    console = table_console()
    console.print(escape(headline(analysis)))
    for metric in analysis.metrics:
        table = Table(title=escape(metric), title_justify="left")
        head, rows = metric_table(analysis, metric)
        for column in head:
            table.add_column(column, overflow="fold")
        for row in rows[:_SHOWN]:
            table.add_row(*map(escape, row))
        console.print(table)
        if len(rows) > _SHOWN:
            console.print(f"and {len(rows) - _SHOWN} more cells; report.md has all")
    if analysis.claims:
        table = Table(title="claims", title_justify="left")
        for column in CLAIM_HEAD:
            table.add_column(column, overflow="fold")
        for said in claim_rows(analysis):
            table.add_row(*map(escape, said), style=None if said[1] else "bold")
        console.print(table)
    for run, reason in analysis.left_out[:_SHOWN]:
        console.print(escape(f"left out     {run.name}: {reason}"))
    if len(analysis.left_out) > _SHOWN:
        console.print(f"and {len(analysis.left_out) - _SHOWN} more runs; report.md has all")
    for note in analysis.notes:
        console.print(escape(f"note         {note}"))
