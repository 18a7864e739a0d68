"""Streams frames for a million tokens, and measures whether memory and the time of a frame stay what they were.

    OMP_NUM_THREADS=1 python benchmarks/endless.py --out docs/benchmarks/endless

Each model streams alone, in a process of its own: a hybrid with windows, and beside it full attention of the same width
and depth, which is stopped at fewer tokens, as every frame takes it longer. A frame counts from its patches to the
model's state: vision tower and layers, decoding a video not. Weights are random. Written are NAME.json and NAME.png.
Said are: the range of resident memory over the last nine tenths of the stream, relative to its mean; the slope of the
time of a frame over those, in percent of its mean over the whole stream, with its 95 % interval (t, over medians of
stretches of equal length); and whether the state has the bytes that the configuration promises.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

from hybridvl.bench.machine import describe
from hybridvl.bench.memory import settled_bytes
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference import Processor
from hybridvl.inference.streaming import FrameStep, StreamingSession
from hybridvl.models import ModelConfig, VisionConfig, VisionLanguageModel
from hybridvl.pictures import default_style, figure, png

_STRETCHES = 100  # of a stream; a point of the curves each
_FRAMES = 16  # different ones, shown again and again


def main(arguments: Sequence[str]) -> int:
    """Stream, print what came of it, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="(swa gdn*3)*2", help="of the hybrid")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="that the hybrid streams")
    parser.add_argument("--peer", default="full*8", help="pattern of the baseline")
    parser.add_argument("--peer-tokens", type=int, default=65_536, help="that the baseline streams")
    parser.add_argument("--window", type=int, default=512, help="tokens that windows see")
    parser.add_argument("--width", type=int, default=128, help="of both models, a multiple of 64")
    parser.add_argument("--side", type=int, default=8, help="visual tokens per side of a frame")
    parser.add_argument("--out", type=Path, required=True, help="files to write, without their ending")
    parser.add_argument("--alone", action="store_true", help="stream the hybrid alone, and print what is found")
    chosen = parser.parse_args(arguments)
    if chosen.alone:
        print(json.dumps(stream(chosen.pattern, chosen.tokens, chosen.window, chosen.width, chosen.side)))
        return 0
    report: dict[str, Any] = {
        **describe("cpu"),
        "settings": {k: str(v) for k, v in vars(chosen).items() if k not in ("out", "alone")},
    }
    sides = ((chosen.pattern, chosen.tokens), (chosen.peer, chosen.peer_tokens))
    report["streams"] = []
    for pattern, tokens in sides:
        sizes = {"window": chosen.window, "width": chosen.width, "side": chosen.side, "tokens": tokens}
        flags = [f"--{name}={value}" for name, value in {**sizes, "pattern": pattern, "out": "-"}.items()]
        alone = subprocess.run([sys.executable, __file__, "--alone", *flags], check=True, stdout=subprocess.PIPE)
        found = json.loads(alone.stdout)
        report["streams"].append(found)
        print(told(found), flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    chosen.out.with_suffix(".png").write_bytes(draw(report["streams"]))
    return 0


def stream(pattern: str, tokens: int, window: int, width: int, side: int) -> dict[str, Any]:
    """Stream so many tokens through a model of random weights; the curves and what they say."""
    session = session_of(pattern, window, width)
    rng = torch.Generator().manual_seed(0)
    size = side * session.processor.images.config.merge_size
    patch = session.model.visual.config.patch_dim if session.model.visual is not None else 0
    frames = [torch.randn(size * size, patch, generator=rng) for _ in range(_FRAMES)]
    count = -(-tokens // side**2)
    each = max(1, count // _STRETCHES)
    points: dict[str, list[float]] = {"tokens": [], "seconds": [], "resident": [], "state": []}
    taken: list[float] = []
    for number in range(count):
        step = FrameStep(frames[number % _FRAMES], (1, size, size), number / 2)
        begin = time.perf_counter()
        session.push_step(step)
        taken.append(time.perf_counter() - begin)
        if len(taken) == each:
            points["tokens"].append(session.timeline.tokens)
            points["seconds"].append(float(np.median(taken)))
            points["resident"].append(_held())
            points["state"].append(session.state_bytes)
            taken.clear()
    promised = sum(
        mixer.state_bytes(session.timeline.tokens, torch.float32, width) for mixer in session.model.mixer_configs
    )
    kept = {
        "pattern": session.model.pattern,
        "frame_tokens": side**2,
        "promised_state": promised + 16,
        "points": points,
    }
    return {**kept, **verdict(points)}


def _held() -> int:
    held = settled_bytes()
    if held is None:
        raise SystemExit("endless.py: this system does not tell how much memory a process holds")
    return held


def session_of(pattern: str, window: int, width: int) -> StreamingSession:
    """A stream through a model of random weights."""
    attention = {"heads": 4, "kv_heads": 2, "head_dim": width // 4}
    config = ModelConfig(
        pattern=pattern,
        mixers={"swa": {**attention, "window": window}, "full": attention, "gdn": {"heads": 4, "head_dim": width // 4}},
        width=width,
        mlp_width=2 * width,
        vocab_size=512,
        vision=VisionConfig(depth=2, width=64, heads=2, mlp_width=128, full_attention_blocks=(1,)),
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=3,
    )
    torch.manual_seed(0)
    processor = Processor(ChatFormat(load_tokenizer()), ImageProcessor(ImageConfig()))
    return StreamingSession(VisionLanguageModel(config).eval(), processor)


def verdict(points: dict[str, list[float]]) -> dict[str, Any]:
    """What the curves say of the last nine tenths of a stream; times in seconds, memory in bytes."""
    late = slice(len(points["tokens"]) // 10, None)
    tokens, seconds, resident = (np.array(points[name][late]) for name in ("tokens", "seconds", "resident"))
    fit = stats.linregress(tokens / tokens[-1], seconds)
    half = float(stats.t.ppf(0.975, len(tokens) - 2) * fit.stderr)
    scale = 100 / float(seconds.mean())
    return {
        "frame_seconds": float(seconds.mean()),
        "slope_percent": float(fit.slope) * scale,
        "slope_interval": [(float(fit.slope) - half) * scale, (float(fit.slope) + half) * scale],
        "resident_range_percent": 100 * float(np.ptp(resident) / resident.mean()),
    }


def told(found: dict[str, Any]) -> str:
    """A stream in one line."""
    low, high = found["slope_interval"]
    state = found["points"]["state"]
    return (
        f"{found['pattern']}: {found['points']['tokens'][-1]:,} tokens, {1000 * found['frame_seconds']:.2f} ms a frame "
        f"of {found['frame_tokens']}, slope {found['slope_percent']:+.1f} % ({low:+.1f} to {high:+.1f}), "
        f"resident memory within {found['resident_range_percent']:.2f} %, state {state[0]:,} to {state[-1]:,} bytes "
        f"(promised {found['promised_state']:,})"
    )


@default_style()
def draw(streams: Sequence[dict[str, Any]]) -> bytes:
    """Time of a frame and memory against the tokens of the stream, as a PNG file."""
    made = figure(9, 4)
    left, right = made.subplots(1, 2)
    for found, colour in zip(streams, ("#2563eb", "#dc2626"), strict=True):
        points = found["points"]
        left.plot(points["tokens"], [1000 * value for value in points["seconds"]], colour, label=found["pattern"])
        right.plot(points["tokens"], [value / 1e6 for value in points["state"]], colour, label=found["pattern"])
    for axes, name in ((left, "time of a frame (ms)"), (right, "state (MB)")):
        _label(axes, name)
    return png(made)


def _label(axes: Axes, name: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Plain numbers: powers of ten would need fonts for formulas.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens streamed")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
