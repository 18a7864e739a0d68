"""What `gpu_check.py` measures of streams on recorded steps: their numbers first, then frames, tokens and replies, with
the goals that they have on an H200."""

from __future__ import annotations

import copy
import gc
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from gpu_models import Clock, ModelSizes, build
from torch import Tensor

from hybridvl.bench.filling import filled_state
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.sources import open_source
from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference import Processor
from hybridvl.inference.graphs import StepGraphs
from hybridvl.inference.streaming import StreamingSession
from hybridvl.inference.streaming.showing import Progress, Show, Showing
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import StepRunner
from hybridvl.models.vlm import VisionLanguageModel

FRAMES_A_SECOND, TOKEN_SECONDS, FLAT, RATIO = 100.0, 3e-3, 1.1, 8.0
"""Goals: frames a second from end to end, seconds a token, the slowest context over the fastest, how many times as long
a token of full attention takes."""
GRAPH = "CUDA graph"
_WRONG = 2e-2  # by norm, in bfloat16


@dataclass(frozen=True)
class StreamSizes:
    """What is measured of streams; the defaults are those of the goals.

    Attributes:
        contexts: tokens behind which a token is decoded.
        frames: shown from end to end, after a few that do not count.
        steps: frames and tokens that are compared where a window becomes full.
        peer: pattern of full attention of the same depth; peer_context: tokens behind which its token is decoded.
    """

    contexts: tuple[int, ...] = (0, 1024, 32768, 400_000)
    frames: int = 200
    steps: int = 8
    peer: str = "full*36"
    peer_context: int = 65536

    @classmethod
    def tiny(cls) -> StreamSizes:
        """For a CPU."""
        return cls((0, 16, 100), 6, 4, "full*4", 64)


@torch.no_grad()
def measure_streams(
    model: VisionLanguageModel, sizes: ModelSizes, streams: StreamSizes, device: str, clock: Clock
) -> dict[str, Any]:
    """Records of every figure and of the goals; `wrong` names what a replay computes otherwise, and then nothing is
    timed."""
    vision = model.config.vision
    assert vision is not None
    side = sizes.grid // vision.spatial_merge_size
    checks = wrap_checks(model, side * side, streams.steps)
    wrong = [f"{check['step']}: error {check['error']:.1e}" for check in checks if not check["error"] < _WRONG]
    if clock.is_cuda:  # steps that were not recorded agree with themselves
        wrong += [f"{check['step']}: {check['how']}" for check in checks if check["how"] != GRAPH]
    report: dict[str, Any] = {"checks": checks, "wrong": wrong, "records": [], "goals": []}
    if wrong:
        return report
    tokens = [token_record(model, context, clock) for context in streams.contexts]
    shown = [shown_record(model, sizes, streams.frames, graphs) for graphs in (True, False)]
    near = token_record(model, streams.peer_context, clock)
    weights = model.lm_head_weight.dtype
    peers = [peer_record(model, pattern, streams, device, weights, clock) for pattern in _peers(streams)]
    report["records"] = [*tokens, *shown, near, *peers]
    seconds = [record["median_s"] for record in tokens]
    report["goals"] = [
        _goal(f"frames/s from end to end, {side * side} tokens each", shown[0]["frames_per_s"], FRAMES_A_SECOND, True),
        _goal("seconds a token, the slowest context", max(seconds), TOKEN_SECONDS, False),
        _goal("the slowest context over the fastest", max(seconds) / min(seconds), FLAT, False),
        *(_goal(f"{peer['figure']}, {peer['how']}, over ours", peer["median_s"] / near["median_s"], RATIO, True)
          for peer in peers),
    ]  # fmt: skip
    return report


@torch.no_grad()
def wrap_checks(model: VisionLanguageModel, tokens: int, steps: int) -> list[dict[str, Any]]:
    """How far recorded steps are from steps by themselves, from before a window is full until after it has begun anew:
    by norm, the worst of outputs and of all tensors of the state, of keys and values the worst token; counters that
    differ are infinitely far."""
    window = max((getattr(mixer, "window", 0) for mixer in model.mixer_configs), default=0)
    found = []
    for name, size in (("frame", tokens), ("token", 1)):
        begin = max(window - size * steps // 2, 0)
        state = filled_state(model, begin)
        right, runner, plain = state.clone(), StepGraphs(model), StepRunner(model)
        errors = []
        for _ in range(steps):
            embeds = torch.randn(1, size, model.config.width, device=state.length.device)
            ids = torch.randint(0, 1000, (1,), device=state.length.device)
            outputs = [_taken(way, own, embeds, ids) for way, own in ((runner, state), (plain, right))]
            errors.append(max(_error(*outputs), *map(_error, state.tensors().values(), right.tensors().values())))
        found.append({"step": f"{name}s from {begin} to {begin + size * steps}, window {window}", "error": max(errors),
                      "how": _how(runner)})  # fmt: skip
    return found


def token_record(model: VisionLanguageModel, context: int, clock: Clock) -> dict[str, Any]:
    """One greedy token after another, one row, by recorded steps."""
    state, runner = filled_state(model, context), StepGraphs(model)
    token = torch.ones(1, dtype=torch.int64, device=state.length.device)

    def step() -> None:
        token.copy_(runner.decode(token, state).argmax(-1))

    found = clock(step, 10 if clock.is_cuda else 1)
    how = _how(runner)
    return {"figure": f"a token of {model.pattern} at {context}", **found, "how": how, "state_bytes": state.nbytes}


def peer_record(
    model: VisionLanguageModel,
    pattern: str,
    streams: StreamSizes,
    device: str,
    dtype: torch.dtype,
    clock: Clock,
) -> dict[str, Any]:
    """The same of a model of attention, of the same width and depth, behind the context of peers."""
    mixers = copy.deepcopy(dict(model.config.mixers))
    attention = {name: value for name, value in dict(mixers.get("swa", {})).items() if name != "window"}
    window = streams.peer_context + 4096  # a ring that nothing has left: full attention that a graph can hold
    mixers |= {"full": attention, "swa": {**attention, "window": window}}
    config = replace(model.config, pattern=pattern, mixers=mixers, vision=None)
    peer = build(config, device, dtype)
    found = token_record(peer, streams.peer_context, clock)
    del peer
    gc.collect()
    return found


def shown_record(model: VisionLanguageModel, sizes: ModelSizes, frames: int, graphs: bool) -> dict[str, Any]:
    """Frames of an encoded video, half as large again, from the file to the model's state, decoded, resized and cut by
    a thread meanwhile, as `hybridvl stream` does; then the tokens of a reply, with all that is done for each."""
    vision = model.config.vision
    assert vision is not None
    side = sizes.grid * vision.patch_size
    processor = Processor(ChatFormat(load_tokenizer()), ImageProcessor(ImageConfig()))
    runner = StepGraphs(model, graphs=graphs)
    session = StreamingSession(model, processor, limits=(side * side, side * side), runner=runner)
    progress = None
    with tempfile.TemporaryDirectory() as folder:
        for count in (5, frames):  # the first ones record
            source = open_source(_clip(Path(folder) / f"{count}.mp4", count, side * 3 // 4 * 2))
            for event in Show(session, source, (), Showing(queue=16)):
                progress = event
    assert isinstance(progress, Progress)
    list(session.ask("What happened?", 8))
    begin = time.perf_counter()
    pieces = list(session.ask("What happened?", 65))
    rates = pieces[-1].rates
    return {"figure": f"a frame of {sizes.grid**2 // vision.spatial_merge_size**2} tokens, end to end",
            "mean_s": progress.seconds / progress.frames, "frames_per_s": progress.rate, "stages": progress.stages,
            "reply_s": time.perf_counter() - begin, "reply_tokens_per_s": rates.decode_rate,
            "how": _how(runner), "state_bytes": session.state_bytes}  # fmt: skip


def _clip(path: Path, count: int, side: int) -> Path:
    """An encoded video of so many frames of a moving pattern, side x side pixels."""
    row, column = np.mgrid[:side, :side]
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        video.width, video.height, video.pix_fmt = side, side, "yuv420p"
        for number in range(count):
            pixels = np.stack([row + 3 * number, column - 5 * number, row + column], axis=2).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
    return path


def _peers(streams: StreamSizes) -> tuple[str, str]:
    """Full attention as it is, whose state moves, and the same work over slots that lie still, in a graph."""
    return streams.peer, streams.peer.replace("full", "swa")


def _how(runner: StepGraphs) -> str:
    return GRAPH if runner.reason is None else f"eager, {runner.reason}"


def _taken(runner: StepRunner, state: ModelState, embeds: Tensor, ids: Tensor) -> Tensor:
    if embeds.shape[1] == 1:
        return runner.decode(ids, state)
    places = (state.next_position[None, :, None] + torch.arange(embeds.shape[1], device=embeds.device)).expand(
        3, -1, -1
    )
    return runner.run(embeds.to(runner.model.lm_head_weight.dtype), places, None, state)


def _error(found: Tensor, right: Tensor) -> float:
    if not right.is_floating_point():
        return 0.0 if torch.equal(found, right) else math.inf
    found, right = (x.double().flatten(min(2, x.ndim - 1)) for x in (found, right))  # (B, slots, ...) of keys
    return float(((found - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)).max())


def _goal(name: str, value: float, goal: float, at_least: bool) -> dict[str, Any]:
    met = value >= goal if at_least else value <= goal
    return {"goal": name, "value": value, "wanted": f"{'at least' if at_least else 'at most'} {goal:g}", "met": met}
