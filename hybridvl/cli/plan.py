"""`hybridvl plan`: parameters, FLOPs per token and state bytes of layer patterns, side by side, before any training."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hybridvl.checkpoints import read_config
from hybridvl.checkpoints.files import usable_path
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.calibration import add_calibration_arguments, machine_calibration, prediction_table
from hybridvl.cli.output import table_console, writable, write_json
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.plan.costs import CONTEXTS, Plan, plan_model
from hybridvl.plan.prediction import predictions
from hybridvl.plan.tables import comparison_table, layer_table

_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
_FULL_WIDTH = 120  # columns that the whole table of a plan's layers needs


def main(argv: Sequence[str]) -> int:
    """Print the plan of every pattern; returns 0. Mistakes are ConfigErrors."""
    options = _parser().parse_args(argv)
    config, path = _model_config(options.config)
    plans = [
        plan_model(dataclasses.replace(config, pattern=pattern), options.context, _DTYPES[options.dtype], path)
        for pattern in options.patterns or [config.pattern]
    ]
    records = [plan.to_dict() for plan in plans]
    tables = []
    if options.calibrate:
        calibration = machine_calibration(options, anew=not (options.patterns or options.config))
        contexts = tuple(plans[0].contexts)
        for plan, record in zip(plans, records, strict=True):
            model = dataclasses.replace(config, pattern=plan.pattern)
            record["predicted_seconds"] = predictions(calibration, model, contexts, options.batch, options.tokens)
            record["prediction_error"] = calibration.errors
        named = [(record["pattern"], record["predicted_seconds"]) for record in records]
        tables.append(prediction_table(calibration, named))
    if options.json != "-":
        _print(plans, options.layers, tables)
    if options.json is not None:
        write_json(records, options.json)
    if options.png is not None:
        from hybridvl.plan.drawing import draw  # matplotlib takes a second to import

        draw(plans, writable(options.png))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl plan",
        description="What layer patterns cost, before anything is built: parameters, FLOPs per token, bytes of state. "
        "Without --config the model around the pattern has the sizes of InfiniteVL-4B.",
        epilog="example: hybridvl plan '(swa gdn*3)*9' 'full*36' --context 8192 --png patterns.png",
    )
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="layer patterns; default: the recipe's")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a recipe or a run's config.yaml, whose model.net is planned, or the folder of a model",
    )
    parser.add_argument(
        "--context", nargs="+", type=int, default=list(CONTEXTS), metavar="TOKENS", help="default: 1024 8192 65536"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the model, for the state's bytes")
    parser.add_argument("--layers", action="store_true", help="list every layer instead of every kind of layer")
    parser.add_argument("--json", metavar="FILE", help="write all numbers; '-' prints them instead of tables")
    parser.add_argument("--png", metavar="FILE", help="draw the patterns with their totals")
    add_calibration_arguments(parser)
    return parser


def _model_config(path: str | None) -> tuple[ModelConfig, str]:
    """The model around the patterns, and where its mixers are configured, for messages."""
    if path is None:
        return ModelConfig(vision=VisionConfig()), "mixers"
    if usable_path(path).is_dir():
        return read_config(path), f"{path}: mixers"
    return ModelConfig.from_dict(_model_section(Path(path)), place=f"{path}: model.net"), f"{path}: model.net.mixers"


def _model_section(path: Path) -> dict[str, Any]:
    """model.net of a recipe, its interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        recipe = OmegaConf.load(path)
        section = OmegaConf.select(recipe, "model.net")
        values = None if section is None else OmegaConf.to_container(section, resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {error}; expected a recipe in YAML") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: no model.net; expected the sizes of a model there, as in recipes/digits.yaml")
    return {str(key): value for key, value in values.items()}


def _print(plans: Sequence[Plan], every_layer: bool, more: Sequence[Table]) -> None:
    console = table_console()
    for plan in plans:
        console.print(layer_table(plan, every_layer, compact=console.width < _FULL_WIDTH))
    console.print(comparison_table(plans))
    for table in more:
        console.print(table)
