"""Reports of conversions as tables for a terminal: layer by layer, then what happened within each kind of layer."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.markup import escape
from rich.table import Table

from hybridvl.conversion.report import Counts, LayerReport, Report

_COUNTS = ("copied", "repeated", "new", "left")
_PARTS = {
    "vision": "vision tower",
    "embeddings": "embeddings",
    "head": "output head",
    "mlps": "MLPs",
    "norms": "norms",
}


def layer_table(report: Report) -> Table:
    """One row per layer's mixer, one per other part of the model, and the total."""
    title = f"{report.pattern_before} -> {report.pattern}"
    table = _table(title, "layer", "before", "after", "mixer is")
    moved = any(layer.layer != layer.source_layer for layer in report.layers)
    for layer in report.layers:
        number = f"{layer.layer} (from {layer.source_layer})" if moved else str(layer.layer)
        last = layer is report.layers[-1]
        names = (number, escape(layer.before), escape(layer.after), layer.how)
        table.add_row(*names, *_cells(layer.counts), end_section=last)
    for name, counts in report.parts.items():
        table.add_row("", _PARTS.get(name, name), "", "", *_cells(counts))
    table.add_section()
    table.add_row("", "in all", "", "", *_cells(report.total), style="bold")
    return table


def detail_tables(report: Report) -> list[Table]:
    """For every kind of layer whose mixer is not the source's: its tensors, and the source's that have no place."""
    kinds: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in report.layers:
        if layer.how in ("inherited", "new") or layer.left:
            # Layers that read alike may differ where one layer of the source is followed by several.
            kinds.setdefault((layer.before, layer.after, layer.tensors, tuple(layer.left.items())), []).append(layer)
    return [_detail_table(layers) for layers in kinds.values()]


def summary(report: Report) -> list[str]:
    """What has no place in the new model, a line for every kind of layer, and the totals."""
    kinds: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for layer in report.layers:
        if layer.left:
            kinds.setdefault(tuple(layer.left.items()), []).append(str(layer.source_layer))
    lines = [
        f"left of the source's layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: "
        + ", ".join(f"{name} ({count:,})" for name, count in left)
        for left, layers in kinds.items()
    ]
    total = report.total
    totals = (
        f"{total.params:,} parameters: {total.copied:,} copied, {total.repeated:,} repeated, {total.new:,} new; "
        f"{total.left:,} of the source's {total.copied + total.left:,} left"
    )
    return [*lines, totals]


def _detail_table(layers: list[LayerReport]) -> Table:
    layer = layers[0]
    numbers = ", ".join(str(same.layer) for same in layers)
    plural = "s" if len(layers) > 1 else ""
    table = _table(f"{layer.before} -> {layer.after}, each of layer{plural} {numbers}", "tensor", "from")
    for tensor in layer.tensors:
        parts = ", ".join(f"{part.axis} of {part.source}" for part in tensor.inherited)
        table.add_row(escape(tensor.name), escape(parts), *_cells(tensor.counts))
    for name, count in layer.left.items():
        table.add_row("", escape(name), *_cells(Counts(left=count)))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_style="bold", box=box.ROUNDED)
    for name in columns:
        table.add_column(name, overflow="fold")
    for name in _COUNTS:
        table.add_column(name, justify="right")
    return table


def _cells(counts: Counts) -> list[str]:
    return [f"{count:,}" if count else "-" for count in dataclasses.astuple(counts)]
