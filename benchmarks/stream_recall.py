"""Asks models about frames of real video files that passed many windows ago, through the whole command line.

    OMP_NUM_THREADS=1 python benchmarks/stream_recall.py --json docs/benchmarks/stream-recall.json \
        --models runs/tiny-long/context/version_0/model

Every video is a file of scanned digits that no training has shown, encoded with h264. Some frames near its beginning
have labels, which `hybridvl stream` says as texts before them; at the end it is asked for each. The questions come at
least --windows windows of the model after the frames. Several models (of several seeds) are told one by one and
together; intervals are 95 %, by drawing videos and, where there are several, models with replacement.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from hybridvl.bench.machine import describe
from hybridvl.checkpoints import read_config
from hybridvl.cli import main as hybridvl
from hybridvl.data.digits import scan_splits, scans
from hybridvl.data.scans import render_page

_CELL, _SCALE, _RATE = 8, 8, 2  # pixels of a scan's side, how often each is shown, frames a second
_LABELS = "BKQX"
_FRAME_TOKENS = 3  # of a frame as an image: its beginning, itself, its end
_LATEST = 8  # labels are among so many frames at the beginning
_DRAWS = 10_000


def main(arguments: Sequence[str]) -> int:
    """Make videos, ask, print and write what was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="DIR", help="model folders")
    parser.add_argument("--windows", type=int, default=50, help="windows between a frame and its question")
    parser.add_argument("--videos", type=int, default=25, help="videos, with four questions each")
    parser.add_argument("--seed", type=int, default=0, help="of the videos")
    parser.add_argument("--json", type=Path, help="where to write the results")
    chosen = parser.parse_args(arguments)
    window = max(mixer["window"] for mixer in read_config(Path(chosen.models[0])).mixers.values() if "window" in mixer)
    frames = _LATEST + -(-chosen.windows * window // _FRAME_TOKENS)
    right, last = [], {}
    with tempfile.TemporaryDirectory() as folder:
        videos = [made(Path(folder), frames, chosen.seed, number) for number in range(chosen.videos)]
        for model in chosen.models:
            rows = []
            for video, labels, digits in videos:
                found, last = asked(model, video, labels)
                rows.append([reply == str(digit) for reply, digit in zip(found, digits, strict=True)])
            right.append(rows)
            print(f"{model}: {np.mean(rows):.3f} of {np.size(rows)}", flush=True)
    summary = interval(np.array(right))
    print(f"all: {summary['accuracy']:.3f} ({summary['interval'][0]:.3f} to {summary['interval'][1]:.3f})")
    if chosen.json is not None:
        settings = {"windows": chosen.windows, "window": window, "frames": frames, "seed": chosen.seed}
        each = [float(np.mean(rows)) for rows in right]
        report = {**describe("cpu"), "settings": settings, **summary, "models": each, "last_stream": last}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def made(folder: Path, frames: int, seed: int, number: int) -> tuple[Path, dict[str, int], list[int]]:
    """An encoded video, at which frame each label is, and the digits of these frames in the order of the labels."""
    rng = np.random.default_rng((seed, number))
    shown = rng.choice(scan_splits()["test"], frames)
    places = np.sort(rng.choice(_LATEST, len(_LABELS), replace=False))
    strip = render_page(scans()[0], shown[:, None], _CELL, 0.0, rng)
    path = folder / f"{number}.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"crf": "10"})
        stream.width = stream.height = _CELL * _SCALE
        stream.pix_fmt = "yuv420p"
        for frame in np.split(strip, frames):
            large = np.kron(frame, np.ones((_SCALE, _SCALE), np.uint8))
            pixels = np.repeat(large[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    labels = dict(zip(rng.permutation(list(_LABELS)).tolist(), places.tolist(), strict=True))
    return path, labels, [int(scans()[1][shown[place]]) for place in labels.values()]


def asked(model: str, video: Path, labels: dict[str, int]) -> tuple[list[str], dict[str, Any]]:
    """The replies of `hybridvl stream` to a question for each label, and how the stream went."""
    log = video.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    command = ["stream", str(video), "--checkpoint", model, "--layout", "images", "--fps", "0", "--quiet"]
    command += ["--max-pixels", str(_CELL**2), "--max-new-tokens", "4", "--log", str(log)]
    for label, place in labels.items():
        # Half a frame earlier: after the one before, and before the one that it names.
        moment = f"{(place - 0.5) / _RATE:g}s" if place else "start"
        command += ["--say", f"{moment}:{label}"]
        command += ["--ask", f"end:Which digit was frame {label}?"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = hybridvl(command)
    if status:
        raise SystemExit(f"hybridvl stream ended with {status}")
    *replies, end = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return [reply["reply"] for reply in replies], end


def interval(right: NDArray[np.bool_]) -> dict[str, Any]:
    """Mean and 95 % interval of answers (models, videos, questions)."""
    models, videos, _ = right.shape
    rng = np.random.default_rng(0)
    by_video = right.mean(axis=2)
    rows = rng.integers(models, size=(_DRAWS, models))
    columns = rng.integers(videos, size=(_DRAWS, videos))
    drawn = [by_video[np.ix_(a, b)].mean() for a, b in zip(rows, columns, strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"accuracy": float(right.mean()), "interval": [float(low), float(high)], "questions": int(right.size)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
