"""Measures what models recall of streams of labelled frames, from the length they were trained at to far beyond it.

    python benchmarks/long_context.py --json docs/benchmarks/long-context.json \
        --models stage_2=runs/tiny-long/frames/version_0/model stage_3=runs/tiny-long/context/version_0/model

Every model reads the same test streams, which no training has shown a scan of. Each stream is read once; each of its
labelled frames is then asked for on its own, from the state after the stream, so that no answer can be found by leaving
out those that were given. An answer is right when its first token is. Several models of one name (of several seeds) are
taken together: intervals are 95 %, by drawing streams and, where there are several, models with replacement.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import hybridvl
from hybridvl.bench.machine import describe
from hybridvl.data.probes.frame_recall import FrameRecall
from hybridvl.data.task import Sample
from hybridvl.inference.processor import Processor
from hybridvl.models.vlm import VisionLanguageModel

_BATCH_TOKENS = 16_384
_DRAWS = 10_000


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="model folders, by name")
    parser.add_argument("--frames", nargs="+", type=int, default=[4, 16, 64, 128, 256, 512], help="lengths of streams")
    parser.add_argument("--items", type=int, default=4, help="labelled frames of a stream")
    parser.add_argument("--streams", type=int, default=250, help="streams of every length")
    parser.add_argument("--seed", type=int, default=0, help="of the streams")
    parser.add_argument("--json", type=Path, help="where to write the results")
    chosen = parser.parse_args(arguments)
    models = [(name, folder) for name, _, folder in (text.partition("=") for text in chosen.models)]
    loaded = [hybridvl.load(folder) for _, folder in models]
    processor = Processor.load(models[0][1])
    records: list[dict[str, Any]] = []
    for frames in chosen.frames:
        started = time.perf_counter()
        right, kinds = measure(loaded, processor, frames, chosen.items, chosen.streams, chosen.seed)
        for name in dict.fromkeys(name for name, _ in models):
            rows = np.stack([right[number] for number, (other, _) in enumerate(models) if other == name])
            records.append({"model": name, "frames": frames, **summary(rows, kinds)})
            low, high = records[-1]["interval"]
            print(f"{name:12} {frames:5} frames  {records[-1]['accuracy']:.3f}  ({low:.3f} to {high:.3f})", flush=True)
        print(f"{'':12} {frames:5} frames  {time.perf_counter() - started:.0f} s", flush=True)
    if chosen.json is not None:
        settings = {name: getattr(chosen, name) for name in ("frames", "items", "streams", "seed")}
        report = {**describe("cpu"), "settings": settings, "models": models, "measurements": records}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(
    models: Sequence[VisionLanguageModel], processor: Processor, frames: int, items: int, streams: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.str_]]:
    """Which answers are right (models, streams, questions), and the kinds of the questions (streams, questions)."""
    source = FrameRecall(frames=frames, items=items, eval_turns=items, test_streams=streams).source("test", seed)
    size = max(1, _BATCH_TOKENS // (4 * frames + 32))
    right, kinds = [], []
    for first in range(0, streams, size):
        samples = [source.sample(number, 0) for number in range(first, min(first + size, streams))]
        inputs, tails, answers = _inputs(processor, samples)
        right.append(np.stack([_right(model, inputs, tails, answers) for model in models]))
        kinds += [sample["kinds"] for sample in samples]
    return np.concatenate(right, axis=1), np.array(kinds)


def summary(right: NDArray[np.bool_], kinds: NDArray[np.str_]) -> dict[str, Any]:
    """Accuracy of models (models, streams, questions) in all, with its interval, of each model, and by kind."""
    rng = np.random.default_rng(0)
    by_stream = right.mean(axis=2)  # (models, streams)
    count, streams = by_stream.shape
    drawn = [
        by_stream[rng.integers(count, size=count)][:, rng.integers(streams, size=streams)].mean() for _ in range(_DRAWS)
    ]
    by_kind = {str(kind): right[:, kinds == kind] for kind in sorted(set(kinds.flat), key=_lag)}
    return {
        "accuracy": float(right.mean()),
        "interval": [float(bound) for bound in np.quantile(drawn, (0.025, 0.975))],
        "of_each": [float(accuracy) for accuracy in right.mean(axis=(1, 2))],
        "questions": int(kinds.size),
        "by_kind": {name: {"accuracy": float(own.mean()), "questions": own.shape[1]} for name, own in by_kind.items()},
    }


def _lag(kind: str) -> int:
    return int(kind.rpartition("_")[2])


def _inputs(processor: Processor, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """The streams as a model takes them, without a question; of every question its tokens (B, A); answers (B, Q)."""
    chat = processor.chat
    turns = [sample["messages"][::2] for sample in samples]
    asked = [[[*own[0]["content"][:-1], question["content"][-1]] for question in own] for own in turns]
    conversations = [[[{"role": "user", "content": content}] for content in own] for own in asked]
    inputs = processor.batch([own[0] for own in conversations])  # of the same length, all of them
    shown = len(inputs["image_grid_thw"]) // len(samples)
    sizes = [
        int(tokens) for tokens in inputs["image_grid_thw"][:shown].prod(-1) // processor.images.config.merge_size**2
    ]
    questions = [
        torch.tensor([chat.encode(own[number], sizes, generation_prompt=True).input_ids for own in conversations])
        for number in range(len(turns[0]))
    ]
    end = int((questions[0][0] == chat.image_token_id).nonzero().max()) + 2  # after the last frame's closing token
    answers = [[chat.tokenizer.encode(turn["content"])[0] for turn in sample["messages"][1::2]] for sample in samples]
    inputs |= {"input_ids": inputs["input_ids"][:, :end], "attention_mask": inputs["attention_mask"][:, :end]}
    return inputs, [tokens[:, end:] for tokens in questions], torch.tensor(answers)


@torch.inference_mode()
def _right(
    model: VisionLanguageModel, inputs: dict[str, Tensor], tails: Sequence[Tensor], answers: Tensor
) -> NDArray[np.bool_]:
    """(B, Q) whether the likeliest first token of each reply is the answer's."""
    state = model.init_state(len(answers))
    model(**inputs, state=state)
    replies = [model(tail, state=state.clone()).logits[:, -1].argmax(-1) for tail in tails]
    return (torch.stack(replies, dim=1) == answers).numpy()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
