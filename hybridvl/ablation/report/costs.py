"""What the models of cells cost: FLOPs and bytes by their configurations, and times that are measured."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from hybridvl.ablation.recipes import recipe_dtype
from hybridvl.ablation.report.cells import CellRuns
from hybridvl.ablation.report.runs import RunFolder
from hybridvl.bench.filling import filled_state
from hybridvl.bench.sides import Results, Side
from hybridvl.bench.timing import interleave, timer
from hybridvl.checkpoints import read_config
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.plan.costs import CONTEXTS, Plan, plan_model

_CONTEXT = 1024  # tokens, where runs do not say how long their samples may be
_DECODE = "decode_seconds"  # a metric of this name, of any stage, is a measured time of a decode step
_BLOCKS = 5
_ROUNDS = (5, 40)  # in a block, at least and at most
_SECONDS = 30.0  # that timing may take where rounds are long


@dataclass(frozen=True)
class CellCosts:
    """What a cell's model costs; None and {} where they are not known.

    Attributes:
        parameters: of the model.
        flops: forward FLOPs per token of one pass over `context` tokens, decoder and head.
        decode_flops: of one more token after `context` tokens.
        state_bytes: of one row after `context` tokens, in the dtype of the recipe's trainer.precision.
        context: tokens.
        decode_seconds: time of one more token: what the runs logged, or else what was measured after the most tokens.
        growth: bytes of state by tokens.
        latency: measured seconds of one more token by tokens.
        latency_blocks: the same in each of the blocks of rounds that were measured.
    """

    parameters: int | None
    flops: float | None
    decode_flops: float | None
    state_bytes: int | None
    context: int
    decode_seconds: float | None = None
    growth: Mapping[int, int] = field(default_factory=dict)
    latency: Mapping[int, float] = field(default_factory=dict)
    latency_blocks: Mapping[int, Sequence[float]] = field(default_factory=dict)


def costs_of_cells(
    cells: Sequence[CellRuns], context: int | None = None, measured: Sequence[int] = (), counted: Sequence[int] = ()
) -> list[CellCosts]:
    """The costs of every cell, by its first run whose model is known; each distinct model is looked at once.

    Args:
        cells: all of them.
        context: tokens for which costs are counted; None takes the longest sample that any run allows.
        measured: tokens after which a decode step is timed, here and now; none: nothing is.
        counted: further tokens for which bytes of state are counted.
    """
    runs = [run for cell in cells for run in cell.runs]
    context = context or max((_max_tokens(run) for run in runs), default=0) or _CONTEXT
    known: dict[str, ModelConfig | None] = {}
    keys: list[tuple[str, torch.dtype] | None] = []
    for cell in cells:
        candidates = ((_known(run, known), run) for run in cell.runs)
        found = next(((key, run) for key, run in candidates if known[key] is not None), None)
        keys.append(None if found is None else (found[0], recipe_dtype(found[1].config)))
    used = {key for key, _ in filter(None, keys)}
    configs = {key: config for key, config in known.items() if config is not None and key in used}
    contexts = sorted({*CONTEXTS, context, *measured, *counted})
    plans = {pair: plan_model(configs[pair[0]], contexts, pair[1]) for pair in set(filter(None, keys))}
    times = decode_seconds(configs, measured) if measured else {}
    return [
        _costs(cell, context, contexts, None, {})
        if pair is None
        else _costs(cell, context, contexts, plans[pair], times.get(pair[0], {}))
        for cell, pair in zip(cells, keys, strict=True)
    ]


def decode_seconds(configs: Mapping[str, ModelConfig], contexts: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Seconds of a decode step of each model after so many tokens, on the CPU in float32.

    For each of some blocks the shortest of many rounds in which all models take turns: whatever else runs on the
    machine only adds. Times do not depend on weights or on what was read, so models are fresh and states are noise.
    """
    models = {key: VisionLanguageModel(dataclasses.replace(config, vision=None)) for key, config in configs.items()}
    lengths = sorted(set(contexts))
    places = {f"{key} {n}": (key, n) for key in models for n in lengths}
    sides = [Side(name, _decode(models[key].eval(), n)) for name, (key, n) in places.items()]
    gc.freeze()  # each round begins with a collection, which is to look at what the rounds have made alone
    try:
        start = time.perf_counter()
        interleave(sides, 1, warmup=1, measure=timer("cpu"))
        fewest, most = _ROUNDS
        count = int(_SECONDS / (_BLOCKS * (time.perf_counter() - start)))
        rounds = interleave(sides, _BLOCKS * max(fewest, min(most, count)), warmup=1, measure=timer("cpu"))
    finally:
        gc.unfreeze()
    found: dict[str, dict[int, list[float]]] = {key: {} for key in models}
    for name, (key, n) in places.items():
        found[key][n] = [min(rounds[name][block::_BLOCKS]) for block in range(_BLOCKS)]
    return found


def model_config(run: RunFolder) -> ModelConfig | None:
    """The model of a run: of its recipe, or of the model that it exported; None if neither says it."""
    net = run.section("model", "net")
    try:
        if net:
            config = ModelConfig.from_dict(dict(net), place=f"{run.folder}: model.net")
        elif (run.folder / "model" / "config.json").is_file():
            config = read_config(run.folder / "model")
        else:
            return None
        plan_model(config, (1,))
    except ConfigError:  # of another version, or a foreign one: its costs are not known
        return None
    return config


def _decode(model: VisionLanguageModel, context: int) -> Callable[[], Results]:
    token, state = torch.zeros(1, 1, dtype=torch.int64), filled_state(model, context)

    @torch.no_grad()
    def run() -> Results:
        return {"logits": model(token, state=state).logits}

    return run


def _costs(
    cell: CellRuns, context: int, contexts: Sequence[int], plan: Plan | None, times: Mapping[int, Sequence[float]]
) -> CellCosts:
    counted = (run.facts.get("parameters") for run in (*cell.used.values(), *cell.runs))
    parameters = next((count for count in counted if isinstance(count, int)), None)
    logged = [
        value for run in cell.used.values() for name, value in run.metrics.items() if name.split("/")[-1] == _DECODE
    ]
    latency = {tokens: min(blocks) for tokens, blocks in times.items()}
    seconds = fmean(logged) if logged else latency[max(latency)] if latency else None
    if plan is None:
        return CellCosts(parameters, None, None, None, context, seconds)
    return CellCosts(
        parameters=plan.total_params if parameters is None else parameters,
        flops=plan.prefill_flops(context),
        decode_flops=plan.decode_flops(context),
        state_bytes=plan.state_bytes(context),
        context=context,
        decode_seconds=seconds,
        growth={tokens: plan.state_bytes(tokens) for tokens in contexts},
        latency=latency,
        latency_blocks=times,
    )


def _known(run: RunFolder, known: dict[str, ModelConfig | None]) -> str:
    """What tells a run's model from others; its configuration is then known."""
    net = run.section("model", "net")
    # A student of a distillation is described by its exported model alone.
    key = json.dumps(net, sort_keys=True) if net else str(run.folder)
    if key not in known:
        known[key] = model_config(run)
    return key


def _max_tokens(run: RunFolder) -> int:
    tokens = run.section("data").get("max_tokens")
    return tokens if isinstance(tokens, int) else 0
