"""`hybridvl convert`: a checkpoint turned into a model of another layer pattern, with an account of every weight."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hybridvl.checkpoints import open_checkpoint
from hybridvl.checkpoints.files import read_text, usable_path
from hybridvl.checkpoints.formats import FORMATS
from hybridvl.checkpoints.saving import config_values
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.mixer_flags import take_mixer_flags
from hybridvl.cli.output import table_console, writable, write_json
from hybridvl.conversion import Report, prepare
from hybridvl.conversion.output import check_folder, check_report, write_folder
from hybridvl.conversion.tables import detail_tables, layer_table, summary
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.inherit import INHERIT

_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
_WRITTEN = [name for name, format in FORMATS.items() if format.write_config is not None]
_LAYER = re.compile(r"[0-9]{1,4}")


def main(argv: Sequence[str]) -> int:
    """Convert, print the report and write the folder; returns 0. Mistakes are ConfigErrors."""
    rest, flags = take_mixer_flags(argv)
    parser = _parser()
    options = parser.parse_args(rest)
    if options.out is None and not options.dry_run:
        parser.error("--out is required, unless with --dry-run")
    mixers = _mixers_file(options.mixers)
    for name, given in flags.items():
        mixers[name] = {**_mapping(mixers.get(name, {}), f"{options.mixers}: {name}"), **given}
    layers = None if options.layers is None else _layer_numbers(options.layers)
    checkpoint = open_checkpoint(options.source)
    folders = [checkpoint.folder]
    if options.out is not None:
        check_folder(Path(options.out), checkpoint.folder, options.force)
        folders.append(Path(options.out))
    if options.json not in (None, "-"):
        check_report(usable_path(options.json), folders)
        writable(options.json)
    conversion = prepare(checkpoint, options.pattern, options.inherit, mixers, layers)
    config_values(FORMATS[options.format], conversion.config)  # before any work: can the format express it?
    if options.json != "-":
        _print(conversion.report, options.details)
    if not options.dry_run:
        dtype = None if options.dtype is None else _DTYPES[options.dtype]
        model = conversion.model(options.seed, dtype, options.pass_convs)
        copied = write_folder(model, Path(options.out), checkpoint.folder, options.format, options.force)
        if options.json != "-":
            besides = f", with {', '.join(copied)}" if copied else ""
            print(f"written to {options.out}{besides}")
    if options.json is not None:
        write_json(conversion.report.to_dict(), options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl convert",
        description="Turn a checkpoint into a model of another layer pattern. Vision tower, embeddings, MLPs, norms "
        "and head are copied, and so is every mixer that stays or only gains or loses a window; other mixers are new, "
        "or inherit the projections of the attention that they replace.",
        epilog="example: hybridvl convert Qwen/Qwen2.5-VL-3B-Instruct --pattern '(swa gdn*3)*9' --out student",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or hub id of a model that hybridvl reads")
    parser.add_argument("--pattern", required=True, help="layer pattern of the new model")
    parser.add_argument("--out", metavar="DIR", help="folder to write")
    parser.add_argument(
        "--inherit", choices=INHERIT, default="qkvo", help="what new mixers take from attention (default qkvo)"
    )
    parser.add_argument(
        "--mixers", metavar="FILE", help="YAML: options of mixers by name, as in a recipe's model.net.mixers"
    )
    parser.add_argument(
        "--mixer.NAME.OPTION",
        metavar="VALUE",
        help="one option of one mixer, such as --mixer.swa.window 4096; by default sizes follow the source's attention",
    )
    parser.add_argument(
        "--layers",
        metavar="N,N-N,...",
        help="the source's layer that each layer of the pattern follows; default: the one of the same number",
    )
    parser.add_argument(
        "--pass-convs", action="store_true", help="new short convolutions hand on the current token; default: random"
    )
    parser.add_argument("--seed", type=int, default=0, help="of new weights (default 0)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the new model; default: the source's")
    parser.add_argument("--format", choices=_WRITTEN, default="hybridvl", help="of the folder (default hybridvl)")
    parser.add_argument("--force", action="store_true", help="replace the model of a folder that is not empty")
    parser.add_argument("--dry-run", action="store_true", help="print the report, write nothing")
    parser.add_argument("--details", action="store_true", help="tensor by tensor, for every kind of new layer")
    parser.add_argument("--json", metavar="FILE", help="write the report; '-' prints it instead of tables")
    return parser


def _mixers_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(read_text(Path(path)))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; expected YAML, options of mixers by name") from error
    return {str(name): options for name, options in _mapping(values, path).items()}


def _mapping(values: object, place: str) -> dict[Any, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: {values!r}; expected a mapping of names to options")
    return values


def _layer_numbers(text: str) -> list[int]:
    """ "0,2-4" -> [0, 2, 3, 4]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (_LAYER.fullmatch(first) and (_LAYER.fullmatch(last) or not dash) and int(first) <= int(last or first)):
            raise ConfigError(f"--layers: {part!r}; expected numbers and ranges of layers, such as 0-3,8,9")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _print(report: Report, details: bool) -> None:
    console = table_console()
    console.print(layer_table(report))
    for table in detail_tables(report) if details else []:
        console.print(table)
    for line in summary(report):
        console.print(line, highlight=False, markup=False)
