"""Records of measurements (`Measurement.to_dict`) as a table for a terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from hybridvl.bench.included import included
from hybridvl.bench.stats import growth
from hybridvl.plan.units import with_prefix

Record = Mapping[str, Any]

_COLUMNS = (
    *("work", "peer", "ours", "its time", "ratio (interval)", "goal", "of matmul, bandwidth"),
    *("frames/s, ours / peer", "state, ours / peer", "memory, ours / peer"),
)
_LATER = _COLUMNS[7:9]  # shown where some work has them
_UNITS = {"decode": " a token", "stream": " a frame"}
_NONE = "-"
_FEWEST = 3  # lengths for which growth is told


def results_table(records: Sequence[Record]) -> Table:
    """A row for every side: time, ratio to ours, rates and shares of the limits, memory, difference; columns that would
    be empty are left out."""
    rows = [_cells(record, side) for record in records for side in record["sides"]]
    shown = [name for name in rows[0] if any(cells[name] for cells in rows)]
    units = {_unit(record) for record in records}
    unit = units.pop() if len(units) == 1 else ""
    table = Table(box=box.ROUNDED)
    table.add_column("work", overflow="fold", max_width=44)
    table.add_column("side", overflow="fold")
    for name in shown:
        table.add_column(f"ms{unit}{name.removeprefix('ms')}" if name.startswith("ms") else name, justify="right")
    for record in records:
        for index, side in enumerate(record["sides"]):
            title = escape(record["title"]) if index == 0 else _coloured_goal(record, side["name"])
            last = index == len(record["sides"]) - 1
            cells = _cells(record, side)
            table.add_row(title, escape(side["name"]), *(cells[name] for name in shown), end_section=last)
    return table


def markdown(records: Sequence[Record]) -> str:
    """A Markdown table, a row for every pair of ours and another side, and what is included; shares of the limits are
    ours."""
    rows = []
    for record in records:
        ours, *others = record["sides"]
        shares = [ours.get(f"{kind}_share_of_limit") for kind in ("flops", "bytes")]
        share = ", ".join(_NONE if value is None else f"{value:.0%}" for value in shares) if any(shares) else ""
        for other in others or [None]:
            pair = [ours] if other is None else [ours, other]
            times = [f"{_ms(side['median'])} ms{_unit(record)}" for side in pair]
            cells = [record["title"], _NONE, times[0], _NONE, _NONE, _NONE, share]
            if other is not None:
                cells[1], cells[3] = other["name"], times[1]
                cells[4] = _ratio_text(record["ratios"][other["name"]])
                cells[5] = _goal_text(record, other["name"]) or _NONE
            for text in (_frames, _state, _memory):
                found = [text(side) for side in pair]
                cells.append(" / ".join(found) if any(found) else "")
            rows.append(cells)
    shown = [i for i, name in enumerate(_COLUMNS) if name not in _LATER or any(cells[i] for cells in rows)]
    lines = [f"| {' | '.join(_COLUMNS[i] for i in shown)} |", "|" + "---|" * len(shown)]
    lines += [f"| {' | '.join(cells[i] or _NONE for i in shown)} |" for cells in rows]
    table = "\n".join(lines)
    notes = "\n".join(f"- {text}" for text in included(records).values())
    return f"{table}\n\nWhat the figures include:\n\n{notes}\n"


def to_csv(records: Sequence[Record]) -> str:
    """One line for every side of every measurement; times in seconds, memory in bytes."""
    rows = []
    for record in records:
        for side in record["sides"]:
            ratios = record["ratios"].get(side["name"], {})
            rows.append(
                {
                    **{key: record[key] for key in ("case", "dtype", "direction", "device")},
                    "sizes": " ".join(f"{key}{value}" for key, value in record["sizes"].items()),
                    **{key: value for key, value in side.items() if key != "seconds"},
                    **{f"ratio_{key}": value for key, value in ratios.items()},
                    "difference": _difference(record, side),
                }
            )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(records: Sequence[Record], machine: Mapping[str, Any], growth: Sequence[Record] = ()) -> str:
    """Machine, versions, date, what is included, every measurement with the seconds of every round, and how cost
    grows."""
    about = {"machine": machine, "includes": included(records)}
    return json.dumps({**about, "results": list(records), "growth": list(growth)}, indent=1) + "\n"


def growth_table(rows: Sequence[Record]) -> Table:
    """A row for every side of a work that was measured at several lengths: how its time and its scratch memory grow."""
    table = Table(title="growth with length", box=box.ROUNDED)
    for name in ("work", "side", "time", "largest deviation", "exponent", "scratch memory"):
        table.add_column(name)
    for row in rows:
        line = f"{1e3 * row['fixed']:.3g} ms + {1e6 * row['per_unit']:.3g} us a token"
        scratch = " to ".join(with_prefix(size, "B") for size in row["scratch_bytes"])
        fit = f"{row['deviation']:.1%}", f"{row['exponent']:.3f}"
        table.add_row(escape(row["work"]), escape(row["side"]), line, *fit, scratch)
    return table


def errors_table(records: Sequence[Record]) -> Table:
    """A row for every result of works with a float64 reference: the relative error of each side."""
    names = list(dict.fromkeys(side for record in records for side in record["errors"]))
    table = Table(title="errors against float64", box=box.ROUNDED)
    for name in ("work", "result", *names):
        table.add_column(escape(name))
    for record in (record for record in records if record["errors"]):
        for index, result in enumerate(next(iter(record["errors"].values()))):
            cells = [f"{record['errors'][name][result]:.2e}" if name in record["errors"] else "" for name in names]
            table.add_row(escape(record["title"]) if index == 0 else "", result, *cells)
        table.add_section()
    return table


def growths(records: Sequence[Record]) -> list[dict[str, Any]]:
    """How the time of every side grows where so many lengths were measured, and its scratch memory at their ends."""
    rows = []
    for group in by_length(records):
        first = group[0]
        for name in dict.fromkeys(side["name"] for record in group for side in record["sides"]):
            sides = [(r["sizes"]["T"], side) for r in group for side in r["sides"] if side["name"] == name]
            sides = [(length, side) for length, side in sides if length > 0]  # an exponent knows no length of 0
            if len(sides) < _FEWEST:
                continue
            sides.sort(key=lambda point: point[0])
            fit = growth([length for length, _ in sides], [side["median"] for _, side in sides])
            held = [side["scratch_bytes"] for _, side in sides if side["scratch_bytes"] is not None]
            work = f"{first['case']}, {first['dtype']}, {first['direction']}"
            rows.append({"work": work, "side": name, **vars(fit), "scratch_bytes": [held[0], held[-1]] if held else []})
    return rows


def by_length(records: Iterable[Record]) -> list[list[Record]]:
    """Records that differ in their length alone, where there are several."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        others = {key: value for key, value in record["sizes"].items() if key != "T"}
        key = json.dumps([record.get("row"), record["case"], others, record["dtype"], record["direction"]])
        groups.setdefault(key, []).append(record)
    return [group for group in groups.values() if len({record["sizes"].get("T") for record in group}) > 1]


def _ratio_text(ratio: Mapping[str, float]) -> str:
    """ "2.40 (2.31 to 2.52)", with the interval's coverage where it is below 95 %."""
    level = "" if ratio["level"] >= 0.95 else f", {ratio['level']:.0%}"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}{level})"


def _goal_text(record: Record, side: str) -> str:
    """ "≥ 3.5, met" for the side that the goal is about, else nothing."""
    if record["goal"] is None or side != record["goal_peer"]:
        return ""
    return f"≥ {record['goal']:g}, {'met' if record['goal_met'] else 'missed'}"


def _cells(record: Record, side: Mapping[str, Any]) -> dict[str, str]:
    """By the heads of their columns."""
    ratio, difference = record["ratios"].get(side["name"]), _difference(record, side)
    return {
        "ms\n(quartiles)": f"{_ms(side['median'])}\n({_ms(side['quartile_low'])} to {_ms(side['quartile_high'])})",
        "side / ours\n(interval)": "" if ratio is None else _ratio_text(ratio).replace(" (", "\n(", 1),
        "FLOP/s": _rate(side, "flops", "FLOP/s"),
        "bytes/s": _rate(side, "bytes", "B/s"),
        "frames/s": _frames(side),
        "tokens/s": _number(side.get("tokens_per_second")),
        "state": _state(side),
        "peak\nmemory": _memory(side),
        "difference": "" if difference is None else f"{difference:.1e}",
    }


def _unit(record: Record) -> str:
    """What a time is of, where it is that of a token or a frame."""
    return _UNITS.get(record["direction"], "")


def _coloured_goal(record: Record, side: str) -> str:
    text = _goal_text(record, side)
    return f"[{'green' if record['goal_met'] else 'red'}]goal {text}[/]" if text else ""


def _difference(record: Record, side: Mapping[str, Any]) -> float | None:
    return max(record["differences"].get(side["name"], {}).values(), default=None)


def _rate(side: Mapping[str, Any], kind: str, unit: str) -> str:
    rate, share = side.get(f"{kind}_per_second"), side.get(f"{kind}_share_of_limit")
    if rate is None:
        return ""
    return with_prefix(rate, unit) + ("" if share is None else f"\n{share:.0%}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _frames(side: Mapping[str, Any]) -> str:
    return _number(side.get("frames_per_second"))


def _state(side: Mapping[str, Any]) -> str:
    held = side.get("state_bytes")  # records of suites from before have none
    return "" if held is None else with_prefix(held, "B")


def _memory(side: Mapping[str, Any]) -> str:
    return _NONE if side["peak_bytes"] is None else with_prefix(side["peak_bytes"], "B")


def _ms(seconds: float) -> str:
    found = 1e3 * seconds
    return f"{found:.4g}" if found < 1e4 else f"{found:,.0f}"
