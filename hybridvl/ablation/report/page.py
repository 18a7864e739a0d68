"""The report as one HTML page that needs nothing else: pictures inside it, tables that can be sorted and searched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from hybridvl.ablation.report import tables
from hybridvl.ablation.report.analysis import Analysis
from hybridvl.ablation.report.figures import Picture
from hybridvl.ablation.report.metrics import is_cost
from hybridvl.ablation.report.page_style import SCRIPT, STYLE
from hybridvl.ablation.report.runs import DONE
from hybridvl.ablation.report.verdicts import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from hybridvl.ablation.report.wording import UNKNOWN, number, with_interval

_CHIPS = (DONE, "pruned", "failed", "killed", "unfinished", SUPPORTED, NOT_SUPPORTED, UNDECIDED)
_LONG = 44  # characters; longer texts are cut by the page's style and shown whole under the mouse
_SCALE = 0.62  # of the pictures, which have more pixels than most screens
_FACTS = ("steps", "tokens", "seconds")


def page(analysis: Analysis, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    sections = []
    if analysis.claims:
        claims = f"<p>{escape(tables.CLAIM_SENTENCE)}</p>{_claims(analysis)}"
        sections.append((f"Claims ({len(analysis.claims)})", claims))
    sections += [(metric, _metric(analysis, metric, pictures)) for metric in analysis.metrics]
    costs = f"<p>{escape(tables.cost_sentence(analysis))}</p>"
    costs += _table(tables.COST_HEAD, tables.cost_rows(analysis))
    costs += "".join(_table(*table) for table in tables.length_tables(analysis)) + _figures(pictures, "")
    sections.append(("Costs", costs))
    if analysis.left_out:
        rows = [(run.name, _seed(run.seed), why) for run, why in analysis.left_out]
        sections.append((f"Left out ({len(rows)})", _table(("run", "seed", "why no mean is taken over it"), rows)))
    sections.append((f"All runs ({len(analysis.runs):,})", _runs(analysis)))
    sections.append((f"All metrics ({len(analysis.logged)})", _metrics(analysis)))
    for name, lines in (("Notes", analysis.notes), ("Warnings", analysis.warnings)):
        if lines:
            sections.append((name, "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"))
    links = "".join(f'<a href="#s{place}">{escape(name)}</a>' for place, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{place}"><h2>{escape(name)}</h2>{content}</section>'
        for place, (name, content) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tables.headline(analysis))}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(tables.headline(analysis).partition(':')[0])}</h1><p>{_chips(analysis)}</p>"
        f"<p>{escape(tables.method(analysis))}</p><nav>{links}</nav></header><main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _claims(analysis: Analysis) -> str:
    """Claims with their parts below them, which stay there: the table is not sorted."""
    table = _table(tables.CLAIM_HEAD, tables.claim_rows(analysis), texts=("claimed", "over"))
    return table.replace('class="table sorted"', 'class="table claims"', 1)


def _metric(analysis: Analysis, metric: str, pictures: Sequence[Picture]) -> str:
    better = "<p>Lower is better.</p>" if is_cost(metric) else ""
    return better + _table(*tables.metric_table(analysis, metric)) + _figures(pictures, metric)


def _figures(pictures: Sequence[Picture], metric: str) -> str:
    return "".join(
        f'<figure><img alt="{escape(picture.shows)}" width="{_shown_width(picture.data)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.data).decode()}"></figure>'
        for picture in pictures
        if picture.metric == metric
    )


def _chips(analysis: Analysis) -> str:
    return " ".join(
        f'<span class="chip {escape(status)}">{count:,} {escape(status)}</span>'
        for status, count in analysis.statuses.items()
    )


def _runs(analysis: Analysis) -> str:
    """Every run with all its metrics."""
    head = ("run", "cell", "seed", "status", "reason", *_FACTS, *analysis.logged)
    rows = []
    for cell in analysis.cells:
        for run in cell.runs:
            facts = [_count(run.facts.get(name)) for name in _FACTS]
            metrics = [number(run.metrics.get(name)) for name in analysis.logged]
            rows.append((run.name, cell.name, _seed(run.seed), run.status, run.reason, *facts, *metrics))
    return _table(head, rows, searched=True)


def _metrics(analysis: Analysis) -> str:
    """Every metric of every cell, with intervals."""
    rows = []
    for index, cell in enumerate(analysis.cells):
        results = [analysis.results[name][index] for name in analysis.logged]
        rows.append((cell.name, *(with_interval(result.interval) if result.values else UNKNOWN for result in results)))
    return _table(("cell", *analysis.logged), rows, searched=True)


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], searched: bool = False, texts: Sequence[str] = ()
) -> str:
    """A table; columns with numbers stand to the right, but for the first one and those that are named as texts."""
    numeric = [
        bool(place) and name not in texts and any(_is_number(row[place]) for row in rows)
        for place, name in enumerate(head)
    ]
    columns = "".join(f"<th{_kind(right)}>{escape(name)}</th>" for name, right in zip(head, numeric, strict=True))
    lines = "".join(f"<tr{_strong(row)}>{''.join(map(_entry, row, numeric))}</tr>" for row in rows)
    search = '<input type="search" placeholder="show rows that contain ..." aria-label="search">' if searched else ""
    return (
        f'<div class="table sorted">{search}<div class="scroll"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></div>"
    )


def _entry(text: str, right: bool) -> str:
    """A table cell; numbers stand to the right, statuses have their colour."""
    if text in _CHIPS:
        return f'<td><span class="chip {text.replace(" ", "-")}">{text}</span></td>'
    long = f' title="{escape(text)}"' if len(text) > _LONG and not right else ""
    return f"<td{_kind(right)}{long}>{escape(text)}</td>"


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or (text[:1] in ("+", "-") and text[1:2].isdigit())


def _strong(row: Sequence[str]) -> str:
    """Rows that say nothing but their name and verdict are headings of those after them."""
    return ' class="strong"' if row[1:-1] and not any(row[1:-1]) else ""


def _kind(right: bool) -> str:
    return ' class="n"' if right else ""


def _shown_width(png: bytes) -> int:
    """Pixels on the page, so that letters of all pictures are of one size."""
    return round(int.from_bytes(png[16:20], "big") * _SCALE)


def _seed(seed: int | None) -> str:
    return UNKNOWN if seed is None else str(seed)


def _count(value: object) -> str:
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else UNKNOWN
