"""Rotary positions of text, images and videos (multimodal RoPE) and the cos/sin tables made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.layers.norms import at_least_float32
from hybridvl.layers.ops.checks import check_segments
from hybridvl.models.config import VIDEO_CONVENTIONS
from hybridvl.models.vision_plan import Grid, grid_tuples


@dataclass(frozen=True, kw_only=True)
class PositionRules:
    """How visual tokens are told from text and placed; see `ModelConfig` for the fields.

    `merge_size` is the number of patches per side that the vision tower joins into one token.
    """

    image_token_id: int
    video_token_id: int
    merge_size: int = 2
    tokens_per_second: float = 2.0
    video_convention: str = "v457"

    def __post_init__(self) -> None:
        if self.video_convention not in VIDEO_CONVENTIONS:
            raise ConfigError(f"video_convention: {self.video_convention!r}; expected one of {VIDEO_CONVENTIONS}")


@dataclass(frozen=True)
class VisualGrids:
    """Grids, in patches, of the images and videos that the tokens refer to, in order of appearance.

    images, videos: (n, 3) int64, (frames, rows, columns) of each. seconds: (videos,) seconds between the frames of a
    video's grid; None means one second.
    """

    images: Tensor | None = None
    videos: Tensor | None = None
    seconds: Tensor | Sequence[float] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is neither an image nor a video."""
        return self.images is None and self.videos is None


def rope_positions(
    rules: PositionRules,
    input_ids: Tensor,
    grids: VisualGrids,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Positions (3, B, T) int64 of the tokens input_ids (B, T) on the axes (t, h, w).

    attention_mask (B, T): nonzero at real tokens; only those are counted. cu_seqlens (N + 1,): the one row holds N
    segments, each with positions of its own. start: (B,) or (N,) first position of every row or segment; default 0.
    Slots of padding hold a filler (1 for "v457", 0 for "v523"). Raises ConfigError when the visual tokens do not match
    the grids. Scheme: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    check_layout(tuple(input_ids.shape), attention_mask, cu_seqlens, start)
    if grids.empty:
        positions = _text_positions(input_ids, attention_mask, cu_seqlens, start).expand(3, -1, -1)
        return positions if attention_mask is None else positions.masked_fill(attention_mask == 0, _filler(rules))
    ids = input_ids.cpu()
    positions = torch.full((3, *ids.shape), _filler(rules), dtype=torch.int64, device="cpu")
    flat, flat_ids = positions.flatten(1), ids.flatten()
    visuals = _Visuals(rules, grids)
    for row, slots in enumerate(_row_slots(ids, attention_mask, cu_seqlens)):
        first = 0 if start is None else int(start[row])
        flat[:, slots] = visuals.place(flat_ids[slots], first)
    visuals.finish()
    return positions.to(input_ids.device)


def check_layout(
    shape: tuple[int, ...], attention_mask: Tensor | None, cu_seqlens: Tensor | None, row_state: Tensor | None
) -> None:
    """Raise ConfigError unless the mask, or the packing of one row, and what a state holds per row fit (B, T)."""
    if len(shape) != 2:
        raise ConfigError(f"input_ids: shape {shape}; expected (B, T)")
    for name, given in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
        if given is not None and not isinstance(given, Tensor):
            raise ConfigError(f"{name}: {type(given).__name__}; expected a tensor")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ConfigError(
            f"attention_mask: shape {tuple(attention_mask.shape)}; expected {shape}, the new tokens alone"
        )
    if cu_seqlens is not None and (attention_mask is not None or shape[0] != 1):
        raise ConfigError("cu_seqlens: packed segments lie in one row (B = 1) and need no attention_mask")
    if not torch.compiler.is_compiling():  # a compiled graph cannot look at the boundaries
        check_segments("input_ids", cu_seqlens, *shape)
    rows = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if row_state is not None and len(row_state) != rows:
        raise ConfigError(f"state: {len(row_state)} rows; expected {rows}, one per row or packed segment of the input")


def row_lengths(input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B,) or (N,) int64: real tokens of every row or segment; only the shape and device of input_ids (B, T) count."""
    if cu_seqlens is not None:
        return cu_seqlens.diff()
    if attention_mask is not None:
        return attention_mask.ne(0).sum(1)
    rows, length = input_ids.shape[:2]
    return torch.full((rows,), length, dtype=torch.int64, device=input_ids.device)


def row_ends(position_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B,) or (N,) int64: one more than the largest position of every row or segment, 0 where it has no real token."""
    largest = position_ids.amax(0)  # (B, T)
    if cu_seqlens is not None:
        ends = largest.new_full((cu_seqlens.numel() - 1,), -1)
        return ends.scatter_reduce(0, _segment_of(cu_seqlens, largest.shape[1]), largest[0], "amax") + 1
    if not largest.shape[1]:
        return largest.new_zeros(largest.shape[0])
    if attention_mask is not None:
        largest = largest.masked_fill(attention_mask == 0, -1)
    return largest.amax(1) + 1


def rotary_sections(head_dim: int, sections: tuple[int, ...] | None) -> tuple[int, ...]:
    """How many of the head_dim / 2 frequencies turn with each axis (t, h, w), in order; None splits 1/4, 3/8, 3/8."""
    if sections is None:
        if head_dim % 16:
            raise ConfigError(f"head_dim: {head_dim}; expected a multiple of 16, or rope_sections that add up to half")
        sections = (head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16)
    if 2 * sum(sections) != head_dim:
        raise ConfigError(
            f"rope_sections: {list(sections)} add up to {sum(sections)}; expected head_dim / 2 for head_dim {head_dim}"
        )
    return tuple(sections)


def multimodal_rotary(
    position_ids: Tensor, sections: tuple[int, ...], theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, K), frequencies doubled for rotate-half, of positions (3, B, T).

    sections: as `rotary_sections` gives them. Angles are computed in float32 (float64 for a float64 dtype), the tables
    are returned in `dtype`.
    """
    exact = at_least_float32(dtype)
    half = sum(sections)
    exponents = torch.arange(0, 2 * half, 2, device=position_ids.device).to(exact) / (2 * half)
    frequencies = (1.0 / theta**exponents).split(sections)
    by_axis = position_ids.to(exact).unsqueeze(-1)  # (3, B, T, 1)
    angles = torch.cat([axis * part for axis, part in zip(by_axis, frequencies, strict=True)] * 2, dim=-1)  # (B, T, K)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Visuals:
    """Hands out the grids in order of appearance while rows of tokens are placed."""

    def __init__(self, rules: PositionRules, grids: VisualGrids) -> None:
        self.rules = rules
        self.tokens = {rules.image_token_id: "image", rules.video_token_id: "video"}
        images = () if grids.images is None else grid_tuples(grids.images, "image_grid_thw")
        videos = () if grids.videos is None else grid_tuples(grids.videos, "video_grid_thw")
        self.grids: dict[str, Iterator[Grid]] = {"image": iter(images), "video": iter(videos)}
        seconds = [1.0] * len(videos)
        if grids.seconds is not None and grids.videos is not None:
            seconds = torch.as_tensor(grids.seconds).flatten().tolist()
        if len(seconds) != len(videos):
            raise ConfigError(
                f"second_per_grid_ts: {len(seconds)} numbers for {len(videos)} video grids; expected one for each"
            )
        if not all(0 <= number < math.inf for number in seconds):
            raise ConfigError(f"second_per_grid_ts: {seconds}; expected seconds of at least 0")
        self.seconds = iter(seconds)

    def place(self, ids: Tensor, position: int) -> Tensor:
        """Positions (3, L) of one row's real tokens ids (L,), the first at `position`."""
        visual = (ids == self.rules.image_token_id) | (ids == self.rules.video_token_id)
        pieces, done = [], 0
        while done < len(ids):
            ahead = visual[done:].nonzero()
            text = int(ahead[0]) if len(ahead) else len(ids) - done
            pieces.append(torch.arange(position, position + text, device="cpu").expand(3, -1))
            position, done = position + text, done + text
            if done < len(ids):
                piece, position = self._place_visual(ids[done:], position)
                pieces.append(piece)
                done += piece.shape[1]
        return torch.cat(pieces, dim=1) if pieces else torch.empty(3, 0, dtype=torch.int64, device="cpu")

    def finish(self) -> None:
        """Complain about grids that no token referred to."""
        for kind, grids in self.grids.items():
            left = len(list(grids))
            if left:
                raise ConfigError(
                    f"input_ids: {left} more {kind} grids than runs of {kind} tokens; expected one run each"
                )

    def _place_visual(self, ids: Tensor, position: int) -> tuple[Tensor, int]:
        token = int(ids[0])
        kind, merge = self.tokens[token], self.rules.merge_size
        grid = next(self.grids[kind], None)
        if grid is None:
            raise ConfigError(f"input_ids: more runs of {kind} tokens (id {token}) than {kind} grids")
        frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        size = frames * rows * columns
        found = int((ids[:size] == token).sum())
        if found != size:
            raise ConfigError(
                f"input_ids: {found} {kind} tokens (id {token}) where the grid {list(grid)} asks for {size} tokens"
            )
        times, step = self._times(kind, frames), torch.arange(max(rows, columns), device="cpu")
        axes = torch.meshgrid(times, step[:rows], step[:columns], indexing="ij")
        placed = torch.stack([axis.flatten() for axis in axes]) + position
        fractional = self.rules.video_convention == "v523"
        return placed, position + max(rows, columns) if fractional else int(placed.max()) + 1

    def _times(self, kind: str, frames: int) -> Tensor:
        index = torch.arange(frames, device="cpu")
        whole = self.rules.video_convention == "v457"
        if kind == "image":
            return torch.zeros_like(index) if whole else index  # a still image has one frame, where both agree
        seconds = float(next(self.seconds))
        rate = self.rules.tokens_per_second
        if whole:
            return ((index * int(seconds)).float() * rate).to(torch.int64)
        # In float32, the interval first: times that are nearly whole numbers must be cut as transformers cuts them.
        return (index * torch.tensor(seconds * rate, dtype=torch.float32, device="cpu")).to(torch.int64)


def _filler(rules: PositionRules) -> int:
    return 1 if rules.video_convention == "v457" else 0


def _text_positions(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, start: Tensor | None
) -> Tensor:
    rows, length = input_ids.shape
    index = torch.arange(length, device=input_ids.device)
    if cu_seqlens is not None:
        segment = _segment_of(cu_seqlens, length)
        first = -cu_seqlens[:-1] if start is None else start - cu_seqlens[:-1]
        return (index + first[segment]).unsqueeze(0)
    positions = index.expand(rows, -1) if attention_mask is None else attention_mask.ne(0).cumsum(1) - 1
    return positions if start is None else positions + start.unsqueeze(1)


def _segment_of(cu_seqlens: Tensor, length: int) -> Tensor:
    return torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=cu_seqlens.device), right=True)


def _row_slots(ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Iterable[Tensor]:
    """Indices into the flattened (B * T) slots of the real tokens of every row or segment."""
    rows, length = ids.shape
    slots = torch.arange(rows * length, device="cpu")
    if cu_seqlens is not None:
        return slots.split(cu_seqlens.diff().tolist())
    if attention_mask is None:
        return slots.split(length)
    return [row[real] for row, real in zip(slots.split(length), attention_mask.cpu() != 0, strict=True)]
