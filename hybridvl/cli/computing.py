"""What computes a reply: flags of the weights' dtype, the device, CUDA graphs, compilation and threads."""

from __future__ import annotations

import argparse
import os

import torch

from hybridvl.bench.machine import usable_cores
from hybridvl.inference.graphs import StepGraphs
from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

_MOST_THREADS = 1024  # torch takes more, and then ends with a fault
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """How the model computes; see `runner_of` and `use_threads`."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="of the weights (default: as saved)")
    add("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add(
        "--graphs",
        choices=("auto", "off"),
        help="CUDA graphs on a GPU; 'auto' (default), when given, says if there are none",
    )
    add("--compile", action="store_true", help="torch.compile for the steps of frames and tokens")
    add("--threads", type=int, metavar="N", help="CPU threads")


def runner_of(options: argparse.Namespace, model: VisionLanguageModel) -> StepGraphs:
    """What runs the steps of the model."""
    return StepGraphs(model, graphs=options.graphs != "off", compiled=options.compile)


def runner_notes(options: argparse.Namespace, runner: StepGraphs) -> list[str]:
    """What did not come about of that, in lines; of graphs where they were asked for or the model is on a GPU."""
    expected = options.graphs == "auto" or (options.graphs is None and runner.model.lm_head_weight.is_cuda)
    found = [f"no CUDA graphs: {runner.reason}"] if expected and runner.reason else []
    return found if runner.uncompiled is None else [*found, f"not compiled: {runner.uncompiled}"]


def use_threads(options: argparse.Namespace, reading: bool = False) -> None:
    """Let torch have as many threads as the flag says, by default its own choice; reading: a thread that reads frames
    gets a core of its own where there are more than two. ConfigError for a number that is none of threads."""
    count, cores = options.threads, usable_cores()
    if count is not None and not 1 <= count <= _MOST_THREADS:
        raise ConfigError(f"--threads: {count}; expected 1 to {_MOST_THREADS}")
    if count is None and reading and torch.get_num_threads() >= cores > 2 and "OMP_NUM_THREADS" not in os.environ:
        count = cores - 1
    if count is not None:
        torch.set_num_threads(count)


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {reason}") from error
    if torch.device(name).type == "meta":
        raise argparse.ArgumentTypeError(
            "'meta' cannot be used: it keeps shapes without numbers, nothing to reply with"
        )
    return name
