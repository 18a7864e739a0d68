"""Times that `hybridvl plan --calibrate` predicts: measuring the machine once, keeping it, and showing what follows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybridvl.layers.errors import ConfigError
from hybridvl.plan.prediction import MODES, Calibration, load_calibration, same_machine
from hybridvl.plan.units import tokens, with_prefix

_DTYPES = ("float32", "bfloat16")


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """--calibrate and what belongs to it."""
    group = parser.add_argument_group("predicted times")
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="predict the time of training steps, prompts and tokens on this machine, measured once (about a minute); "
        "without patterns: measure again",
    )
    group.add_argument("--calibration", metavar="FILE", help="where the measurement is kept; default: the user's cache")
    group.add_argument("--batch", type=int, default=1, help="rows of a training step (default: 1)")
    group.add_argument("--tokens", type=int, default=1024, help="tokens of each of its rows (default: 1024)")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    group.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def machine_calibration(options: argparse.Namespace, anew: bool) -> Calibration:
    """The kept calibration of this machine; measured where there is none, it is of another machine, or `anew`.

    With --calibration a file that exists is taken as it is.
    """
    from hybridvl.bench.machine import describe, usable_device

    if options.dtype not in _DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: expected {' or '.join(_DTYPES)} with --calibrate")
    for name in ("batch", "tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1")
    device = usable_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    about = {**describe(device), "dtype": options.dtype}
    path = Path(options.calibration) if options.calibration else _cached(about)
    if path.is_dir():
        raise ConfigError(f"--calibration {path}: is a folder; expected the name of a file")
    if path.exists() and not anew:
        kept = load_calibration(path)
        if kept.about["dtype"] != options.dtype:
            raise ConfigError(f"--calibration {path}: of {kept.about['dtype']}; expected one of {options.dtype}")
        if options.calibration or same_machine(kept, about):
            return kept
    from hybridvl.bench.calibration import Calibrator

    with Console(stderr=True).status("measuring the machine") as status:
        made = Calibrator(getattr(torch, options.dtype), device, progress=status.update).run()
    made.save(path)
    return made


def prediction_table(calibration: Calibration, named: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """A column for every pattern: seconds of a training step, of prompts and of tokens after them."""
    first = named[0][1]
    error = ", ".join(f"{mode} {calibration.errors[mode]:.0%}" for mode in MODES if mode in calibration.errors)
    about = calibration.about
    caption = f"{about['device']}, {about['threads']} threads, {about['dtype']}; held-out models: {error}"
    table = Table(title="predicted times", title_style="bold", box=box.ROUNDED, caption=escape(caption))
    table.add_column("")
    for pattern, _ in named:
        table.add_column(escape(pattern), justify="right", overflow="fold")
    step = [found["train_step"] for _, found in named]
    size = first["train_rows"] * first["train_tokens"]
    name = f"training step, {first['train_rows']} x {tokens(first['train_tokens'])}"
    table.add_row(name, *(f"{_seconds(s)}, {size / s:,.0f} tokens/s" for s in step), end_section=True)
    for kind, text in (("prefill", "prompt of"), ("decode", "a token after")):
        for context in first[kind]:
            cells = (_seconds(found[kind][context]) for _, found in named)
            table.add_row(f"{text} {tokens(int(context))}", *cells, end_section=context == list(first[kind])[-1])
    return table


def _cached(about: dict[str, Any]) -> Path:
    """A file of the user's cache folder for each device, dtype and number of threads."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = str(about["device"]).replace(":", "")
    return root / "hybridvl" / f"calibration-{device}-{about['dtype']}-{about['threads']}.json"


def _seconds(value: float) -> str:
    return (
        with_prefix(value, "s")
        if value >= 1
        else with_prefix(value * 1e3, "ms")
        if value >= 1e-3
        else (with_prefix(value * 1e6, "us"))
    )
