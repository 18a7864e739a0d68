"""Plans as tables for a terminal: the layers of each pattern, and the patterns side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from hybridvl.plan.costs import Plan
from hybridvl.plan.units import parameters, tokens, with_prefix

_PARTS = {
    "vision": "vision tower",
    "embeddings": "embeddings",
    "head": "output head",
    "mixers": "mixers",
    "mlps": "MLPs",
    "norms": "norms",
}


def layer_table(plan: Plan, every_layer: bool = False, compact: bool = False) -> Table:
    """One row per kind of layer, or per layer: parameters, decoding FLOPs per token, state bytes.

    compact: for less than about 120 columns: parameters to three digits, costs at the last context alone.
    """
    contexts = plan.contexts[-1:] if compact else plan.contexts
    table = Table(title=escape(plan.pattern), title_style="bold", box=box.ROUNDED)
    table.add_column("layer" if every_layer else "layers", justify="right")
    table.add_column("mixer", overflow="fold")
    for name in ("mixer", "MLP", "layer"):
        table.add_column(f"{name}\nparams", justify="right")
    for name in ("FLOPs\nper token", "state"):
        for context in contexts:
            table.add_column(f"{name}\nat {tokens(context)}", justify="right")

    def cells(index: int) -> list[str]:
        layer = plan.layers[index]
        return [
            escape(layer.text),
            *(
                parameters(count) if compact else f"{count:,}"
                for count in (layer.mixer_params, layer.mlp_params, layer.params)
            ),
            *(with_prefix(layer.decode_flops[context], "") for context in contexts),
            *(with_prefix(layer.state_bytes[context], "B") for context in contexts),
        ]

    if every_layer:
        for index in range(len(plan.layers)):
            table.add_row(str(index), *cells(index))
    else:
        for indices in plan.kinds().values():
            table.add_row(f"{len(indices)} x", *cells(indices[0]))
    return table


def comparison_table(plans: Sequence[Plan]) -> Table:
    """One column per pattern; from the second on, ratios to the first."""
    first = plans[0]
    table = Table(title="side by side" if len(plans) > 1 else "in all", title_style="bold", box=box.ROUNDED)
    table.add_column("")
    for plan in plans:
        table.add_column(escape(plan.pattern), justify="right", overflow="fold")
    table.add_row("layers", *(str(len(plan.layers)) for plan in plans))
    table.add_row("mixers", *(_census(plan) for plan in plans), end_section=True)
    for part, name in _PARTS.items():
        if any(plan.params[part] for plan in plans):
            table.add_row(f"params, {name}", *(f"{plan.params[part]:,}" for plan in plans))
    totals = [_compared(f"{plan.total_params:,}", plan.total_params, first.total_params) for plan in plans]
    table.add_row("params, total", *totals, style="bold", end_section=True)
    for name, flops in (("prefill", Plan.prefill_flops), ("decoding", Plan.decode_flops)):
        for context in first.contexts:
            cells = [
                _compared(with_prefix(flops(plan, context), ""), flops(plan, context), flops(first, context))
                for plan in plans
            ]
            last = context == first.contexts[-1]
            table.add_row(f"FLOPs/token, {name} at {tokens(context)}", *cells, end_section=last)
    for context in first.contexts:
        sizes = [plan.state_bytes(context) for plan in plans]
        cells = [_compared(f"{size:,} B, {with_prefix(size, 'B')}", size, sizes[0]) for size in sizes]
        table.add_row(f"state at {tokens(context)}", *cells)
    return table


def _census(plan: Plan) -> str:
    counts = Counter("+".join(layer.kinds) for layer in plan.layers)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _compared(text: str, value: float, first: float) -> str:
    return text if value == first else f"{text} [dim]({value / first:.2f}x)[/]"
