"""Feeds of one or several streams run through a model's layers, each row of the state its own stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hybridvl.inference.streaming.steps import FrameStep
from hybridvl.inference.streaming.timeline import Feed
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import PREFILL_CHUNK, StepRunner
from hybridvl.models.vlm import VisionLanguageModel


@torch.no_grad()
def encode_steps(runner: StepRunner, steps: Sequence[FrameStep]) -> list[Tensor]:
    """Features (tokens, D) of each step, by one call of the vision tower."""
    device, merge = runner.model.lm_head_weight.device, merge_size(runner.model)
    rows = (steps[0].rows if len(steps) == 1 else torch.cat([step.rows for step in steps])).to(device)
    grids = torch.tensor([step.grid for step in steps])
    return list(runner.encode(rows, grids).split([step.grid[1] * step.grid[2] // merge**2 for step in steps]))


@torch.no_grad()
def run_feeds(
    runner: StepRunner, state: ModelState, feeds: Sequence[Feed], features: Sequence[Tensor | None]
) -> Tensor:
    """Take one feed into every row of a state, in place; features: what the visual tokens of each stand for.

    Returns the hidden states (B, T, D), after the final norm, of the last T tokens, at most PREFILL_CHUNK.
    """
    embeds, positions, mask = assembled(runner.model, feeds, features)
    for begin in range(0, embeds.shape[1], PREFILL_CHUNK):
        piece = slice(begin, begin + PREFILL_CHUNK)
        shown = None if mask is None else mask[:, piece]
        hidden = runner.run(embeds[:, piece], positions[:, :, piece], shown, state)
    return hidden


@torch.no_grad()
def assembled(
    model: VisionLanguageModel, feeds: Sequence[Feed], features: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings (B, T, D), positions (3, B, T) and, where lengths differ, a mask (B, T) of real tokens (they come
    first), of the feeds of B streams."""
    device = model.lm_head_weight.device
    rows = []
    for feed, shown in zip(feeds, features, strict=True):
        texts = model.decoder.embed_tokens(torch.tensor([*feed.before, *feed.after], dtype=torch.int64, device=device))
        before, after = texts.split([len(feed.before), len(feed.after)])
        rows.append(torch.cat([before, after] if shown is None else [before, shown.to(texts.dtype), after]))
    lengths = [feed.length for feed in feeds]
    embeds = pad_sequence(rows, batch_first=True)
    positions = pad_sequence([feed.positions.T for feed in feeds], batch_first=True).permute(2, 0, 1).to(device)
    if min(lengths) == max(lengths):
        return embeds, positions, None
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return embeds, positions, mask.to(device)


def merge_size(model: VisionLanguageModel) -> int:
    """Patches per side that become one visual token."""
    return 1 if model.config.vision is None else model.config.vision.spatial_merge_size


def wait_for_device(model: VisionLanguageModel) -> None:
    """Let the device end what it was given, so that times are those of the work."""
    if model.lm_head_weight.is_cuda:
        # Not the whole device, which may not be waited for while another thread records a graph.
        torch.cuda.current_stream(model.lm_head_weight.device).synchronize()
