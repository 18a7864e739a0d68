"""`hybridvl bench`: our operators and models timed in turns with named peers, after their results were compared."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hybridvl.bench import report
from hybridvl.bench.cases import Request
from hybridvl.bench.catalogue import CASES, build, find_case
from hybridvl.bench.included import included
from hybridvl.bench.machine import Limits, describe, measure_limits, usable_device
from hybridvl.bench.model_cases import QWEN3_NEXT, QWEN25, ModelRequest, decode_works, prefill_works, train_work
from hybridvl.bench.runner import Settings, measure
from hybridvl.bench.shapes import parse_lengths, parse_shape
from hybridvl.bench.sides import UnequalWorkError, Work
from hybridvl.bench.sizes import model_config, vision_config
from hybridvl.bench.stream_cases import stream_works, with_vision
from hybridvl.bench.suite import suite_rows
from hybridvl.cli.arguments import Arguments
from hybridvl.cli.bench_arguments import parser
from hybridvl.cli.computing import use_threads
from hybridvl.cli.mixer_flags import take_mixer_flags
from hybridvl.cli.output import table_console, writable
from hybridvl.layers.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files; returns 1 when sides that must agree do not. Mistakes are
    ConfigErrors."""
    arguments, mixers = take_mixer_flags(["suite" if argument == "--suite" else argument for argument in argv])
    options = parser(Arguments).parse_args(arguments)
    if options.what == "ops" and options.list:
        for case in CASES.values():
            print(f"{case.name:20}{case.about}; {' '.join(f'{k}{v}' for k, v in case.sizes.items())}")
        return 0
    device = usable_device(options.device)
    use_threads(options)
    settings = Settings(_positive("--rounds", options.rounds or 7), options.warmup, not options.no_memory)
    run = _Run(settings, device, Console(stderr=True))
    if options.what == "suite":
        return _suite(options, run)
    for path in (options.json, options.csv, options.markdown, options.png):
        if path not in (None, "-"):
            writable(path)  # before the work, not after it
    works = {"ops": _ops, "train": _train, "prefill": _prefill, "decode": _decode, "stream": _stream}[options.what]
    try:
        records = [run.record(work) for work in works(options, mixers)]
    except UnequalWorkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _publish(options, records, run)
    return 0


class _Run:
    """Measures works, and the machine's limits once for every dtype."""

    def __init__(self, settings: Settings, device: str, console: Console) -> None:
        self.settings, self.device, self.console = settings, device, console
        self._limits: dict[str, Limits] = {}

    def record(self, work: Work, settings: Settings | None = None) -> dict[str, Any]:
        """The measurement as plain values."""
        with self.console.status(work.title) as status:
            if work.dtype not in self._limits:
                self._limits[work.dtype] = measure_limits(getattr(torch, work.dtype), self.device)
            found = measure(work, settings or self.settings, self._limits[work.dtype], status.update)
        return found.to_dict()


def _ops(options: argparse.Namespace, mixers: dict[str, Any]) -> Iterator[Work]:
    _no_mixers(mixers)
    case = find_case(options.case)
    base = parse_shape(" ".join(options.shape), case.sizes)
    shapes = [base]
    if options.lengths:
        if not case.length:
            raise ConfigError(f"--lengths: the case {case.name} has no length; its letters are {', '.join(case.sizes)}")
        shapes = [{**base, case.length: length} for length in parse_lengths(options.lengths, "--lengths")]
    peers = None if options.peer is None else tuple(peer for peer in options.peer if peer != "none")
    directions = {"forward": (False,), "backward": (True,), "both": (False, True)}[options.direction]
    if not case.differentiable:
        directions = (False,)
    dtype = getattr(torch, options.dtype)
    for backward in directions:
        for sizes in shapes:
            request = Request(sizes, dtype, options.device, backward, peers, options.backend, options.decay)
            yield build(case, request, options.errors)


def _train(options: argparse.Namespace, mixers: dict[str, Any]) -> Iterator[Work]:
    yield train_work(_model_request(options, mixers, QWEN3_NEXT))


def _prefill(options: argparse.Namespace, mixers: dict[str, Any]) -> Iterator[Work]:
    return prefill_works(_model_request(options, mixers, QWEN25), parse_lengths(options.contexts, "--contexts"))


def _decode(options: argparse.Namespace, mixers: dict[str, Any]) -> Iterator[Work]:
    return decode_works(_model_request(options, mixers, QWEN25), parse_lengths(options.contexts, "--contexts"))


def _stream(options: argparse.Namespace, mixers: dict[str, Any]) -> Iterator[Work]:
    request = _model_request(options, mixers, QWEN25)
    vision = vision_config(options.vision_depth, options.vision_width)
    request = dataclasses.replace(request, config=with_vision(request.config, vision))
    return stream_works(request, parse_lengths(options.contexts, "--contexts", least=0), options.side)


def _model_request(options: argparse.Namespace, mixers: dict[str, Any], named_peer: str) -> ModelRequest:
    config = model_config(options.pattern, options.width, options.mlp_width, options.vocab, mixers)
    for peer in options.peer:
        if peer in (QWEN3_NEXT, QWEN25) and peer != named_peer:
            raise ConfigError(f"--peer {peer}: not of this command; expected {named_peer}, none or a layer pattern")
    training = options.what == "train"
    sizes = {"batch": options.batch, "tokens": options.tokens} if training else {}
    if training and options.untied:
        config = dataclasses.replace(config, tie_embeddings=False)
    return ModelRequest(
        config=config,
        peers=tuple(peer for peer in options.peer if peer != "none"),
        dtype=getattr(torch, options.dtype),
        device=options.device,
        **{name: _positive(f"--{name}", value) for name, value in sizes.items()},
        loss_chunk=_positive("--chunk", options.chunk),
        prefill_chunk=options.chunk,
        peer_decays=training and options.decays == "qwen3-next",
    )


def _suite(options: argparse.Namespace, run: _Run) -> int:
    """Measure rows of a suite; rows that are in the folder's file already and not measured now stay as they are."""
    rows = suite_rows(options.name)
    if unknown := sorted(set(options.rows) - set(rows)):
        raise ConfigError(f"--rows {' '.join(unknown)}: unknown; expected some of {', '.join(rows)}")
    if options.list:
        print("\n".join(rows))
        return 0
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.name}.json"
    kept, console = _kept(path), table_console()
    failed = []
    for name in options.rows or rows:
        row = rows[name]
        settings = Settings(options.rounds or row.rounds, options.warmup, not options.no_memory)
        try:
            records = [{**run.record(work, settings), "row": name} for work in row.works()]
        except UnequalWorkError as error:
            failed.append(str(error))
            continue
        console.print(report.results_table(records))
        _print_included(console, records)
        machine = describe(run.device)
        kept[name] = [{**record, "machine": machine} for record in records]
        found = [record for name in rows for record in kept.get(name, [])]
        path.write_text(report.to_json(found, machine, report.growths(found)), encoding="utf-8")
        (folder / f"{options.name}.csv").write_text(report.to_csv(found), encoding="utf-8")
        (folder / f"{options.name}.md").write_text(_page(options.name, machine, found), encoding="utf-8")
        _draw_suite(options.name, found, folder)
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return 1 if failed else 0


def _page(name: str, machine: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    dates = sorted({record["machine"]["date"] for record in records})
    packages = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    about = (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {dates[0]} to {dates[-1]}; {packages}."
    )
    return f"# Suite {name}\n\n{about}\n\n{report.markdown(records)}"


def _kept(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["results"]
            for record in records:
                found.setdefault(record["row"], []).append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not the results of a suite; expected none or one to go on with") from error
    return found


def _draw_suite(name: str, records: Sequence[dict[str, Any]], folder: Path) -> None:
    from hybridvl.bench.plots import draw_lengths, draw_ratios

    compared = [record for record in records if record["ratios"]]
    if compared:
        draw_ratios(compared, f"suite {name}", folder / f"{name}.png")
    for group in report.by_length(records):
        draw_lengths(group, group[0]["case"], folder / f"{name}-{group[0]['row']}.png")


def _publish(options: argparse.Namespace, records: list[dict[str, Any]], run: _Run) -> None:
    console = table_console()
    fits = report.growths(records)
    machine = describe(run.device)
    if options.json != "-":
        console.print(report.results_table(records))
        _print_included(console, records)
        if any(record["errors"] for record in records):
            console.print(report.errors_table(records))
        if fits:
            console.print(report.growth_table(fits))
    texts: dict[str | None, Callable[[], str]] = {
        options.json: lambda: report.to_json(records, machine, fits),
        options.csv: lambda: report.to_csv(records),
        options.markdown: lambda: report.markdown(records),
    }
    for path, text in texts.items():
        if path == "-":
            print(text(), end="")
        elif path is not None:
            writable(path).write_text(text(), encoding="utf-8")
    if options.png is not None:
        from hybridvl.bench.plots import draw_lengths, draw_ratios  # matplotlib takes a second to import

        if groups := report.by_length(records):
            found = [record for group in groups for record in group]
            draw_lengths(found, f"hybridvl bench {records[0]['case']}", writable(options.png))
        else:
            draw_ratios(records, f"hybridvl bench {options.what}", writable(options.png))


def _print_included(console: Console, records: Sequence[dict[str, Any]]) -> None:
    for text in included(records).values():
        console.print(text, markup=False, highlight=False)


def _no_mixers(mixers: dict[str, Any]) -> None:
    if mixers:
        raise ConfigError(f"--mixer.{next(iter(mixers))}: not of bench ops; expected sizes in --shape")


def _positive(place: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{place} {value}: expected at least 1")
    return value
