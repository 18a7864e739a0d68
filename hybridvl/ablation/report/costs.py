"""What the models of runs cost, from their configurations: FLOPs per token and bytes of state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridvl.ablation.report.cells import Cell
from hybridvl.ablation.report.runs import Run
from hybridvl.checkpoints import read_config
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.plan import Plan, plan_model

_CONTEXT = 1024  # tokens, where runs do not say how long their samples may be


@dataclass(frozen=True)
class Costs:
    """Costs of a cell's model; None where they are not known.

    Attributes:
        parameters: of the model.
        flops: forward FLOPs per token of one pass over `context` tokens, decoder and head.
        decode_flops: of one more token after `context` tokens.
        state_bytes: of one row after `context` tokens, in bfloat16.
        decode_seconds: measured time of one more token, the mean over runs.
        context: tokens.
    """

    parameters: int | None
    flops: float | None
    decode_flops: float | None
    state_bytes: int | None
    decode_seconds: float | None
    context: int


def cell_costs(cells: Sequence[Cell], context: int | None = None) -> list[Costs]:
    """The costs of every cell, by its first run whose model is known; each distinct model is planned once.

    context: tokens; None takes the longest sample that any run allows.
    """
    runs = [run for cell in cells for run in cell.runs]
    context = context or max((_max_tokens(run) for run in runs), default=0) or _CONTEXT
    plans: dict[str, Plan | None] = {}
    found = []
    for cell in cells:
        plan = next((plan for run in cell.runs if (plan := _plan(run, context, plans)) is not None), None)
        counted = (run.facts.get("parameters") for run in (*cell.used.values(), *cell.runs))
        parameters = next((count for count in counted if isinstance(count, int)), None)
        if parameters is None and plan is not None:
            parameters = plan.total_params
        measured = [
            run.metrics[name]
            for run in cell.used.values()
            for name in run.metrics
            if name.split("/")[-1] == "decode_seconds"
        ]
        found.append(
            Costs(
                parameters,
                None if plan is None else plan.prefill_flops(context),
                None if plan is None else plan.decode_flops(context),
                None if plan is None else plan.state_bytes(context),
                sum(measured) / len(measured) if measured else None,
                context,
            )
        )
    return found


def model_config(run: Run) -> ModelConfig | None:
    """The model of a run: of its recipe, or of the model that it exported; None if neither says it."""
    section = run.config.get("model")
    net = section.get("net") if isinstance(section, Mapping) else None
    try:
        if isinstance(net, Mapping):
            return ModelConfig.from_dict(dict(net), place=f"{run.folder}: model.net")
        if (run.folder / "model" / "config.json").is_file():
            return read_config(run.folder / "model")
    except ConfigError:  # of another version, or a foreign one: its costs are not known
        return None
    return None


def _plan(run: Run, context: int, plans: dict[str, Plan | None]) -> Plan | None:
    section = run.config.get("model")
    # A pipeline's student is described by its exported model alone.
    net: Any = section.get("net") if isinstance(section, Mapping) else None
    key = json.dumps(net, sort_keys=True) if net else str(run.folder)
    if key not in plans:
        config = model_config(run)
        try:
            plans[key] = None if config is None else plan_model(config, (context,))
        except ConfigError:
            plans[key] = None
    return plans[key]


def _max_tokens(run: Run) -> int:
    data = run.config.get("data")
    tokens = data.get("max_tokens") if isinstance(data, Mapping) else None
    return tokens if isinstance(tokens, int) else 0
