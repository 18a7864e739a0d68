"""Multimodal rotary positions of random rows of texts, images and videos, against transformers and plain Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridvl.models.decoder import ModelState
from hybridvl.models.positions import PositionRules, VisualGrids, rope_positions, row_ends, row_lengths

START, END, IMAGE, VIDEO, PAD = 248, 249, 250, 251, 254
CONVENTIONS = ["v457", "v523"]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """A piece of a row: `text` tokens, then unless `kind` is empty an image or a video of `grid` merged units."""

    text: int
    kind: str = ""
    grid: Triple = (0, 0, 0)
    seconds: float = 1.0

    @property
    def size(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


Row = list[Part]


@st.composite
def rows(draw: st.DrawFn) -> Row:
    texts, sides = st.integers(0, 5), st.integers(1, 4)
    parts = []
    for kind in draw(st.lists(st.sampled_from(["", "image", "video"]), min_size=0, max_size=4)):
        frames = draw(st.integers(1, 5)) if kind == "video" else 1
        seconds = draw(st.one_of(st.floats(0.03125, 6, width=32), st.sampled_from([0.5, 0.75, 1.0, 2.0])))
        grid = (frames, draw(sides), draw(sides)) if kind else (0, 0, 0)
        parts.append(Part(draw(texts), kind, grid, seconds))
    return [*parts, Part(draw(st.integers(1, 5)))]


def tokens(row: Row) -> list[int]:
    ids: list[int] = []
    for part in row:
        ids += range(1, part.text + 1)
        if part.kind:
            ids += [START, *[IMAGE if part.kind == "image" else VIDEO] * part.size, END]
    return ids


def grids(batch: list[Row]) -> VisualGrids:
    """Grids in patches: two per side of a merged unit."""

    def of(kind: str) -> Tensor | None:
        found = [(t, 2 * h, 2 * w) for row in batch for part in row if part.kind == kind for t, h, w in [part.grid]]
        return torch.tensor(found) if found else None

    seconds = [part.seconds for row in batch for part in row if part.kind == "video"]
    return VisualGrids(of("image"), of("video"), torch.tensor(seconds) if seconds else None)


def left_padded(batch: list[Row], more: int) -> tuple[Tensor, Tensor]:
    ids = [tokens(row) for row in batch]
    length = max(map(len, ids)) + more
    padded = [[PAD] * (length - len(row)) + row for row in ids]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(padded), torch.tensor(mask)


def plain(row: Row, rate: float) -> Iterator[Triple]:
    """Positions of a row one by one, in whole seconds: text steps on all axes, a visual spans (time, row, column)."""
    at = 0
    for part in row:
        for _ in range(part.text + bool(part.kind)):
            yield at, at, at
            at += 1
        if not part.kind:
            continue
        frames, height, width = part.grid
        times = [int(frame * int(part.seconds) * rate) if part.kind == "video" else 0 for frame in range(frames)]
        yield from ((at + t, at + h, at + w) for t in times for h in range(height) for w in range(width))
        at += max(height, width, times[-1] + 1)
        yield at, at, at
        at += 1


@cache
def transformers_index(rate: int):
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": rate})
    with torch.device("meta"):
        config.text_config.num_hidden_layers = config.vision_config.depth = 1
        return Qwen2_5_VLModel(config).get_rope_index


def deltas(ids: Tensor, positions: Tensor, mask: Tensor | None, real: Tensor | None) -> Tensor:
    return (row_ends(positions, mask, None) - row_lengths(ids, real, None)).unsqueeze(1)


@given(batch=st.lists(rows(), min_size=1, max_size=3), more=st.integers(0, 2), rate=st.sampled_from([2, 3, 4, 25]))
@settings(max_examples=120, deadline=None)
def test_fractional_seconds_as_in_transformers(batch: list[Row], more: int, rate: int) -> None:
    (ids, mask), visuals = left_padded(batch, more), grids(batch)
    rules = PositionRules(
        image_token_id=IMAGE, video_token_id=VIDEO, tokens_per_second=float(rate), video_convention="v523"
    )
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    wanted, wanted_deltas = transformers_index(rate)(
        ids, kinds, visuals.images, visuals.videos, visuals.seconds, attention_mask=mask
    )
    found = rope_positions(rules, ids, visuals, mask)
    assert torch.equal(found, wanted)
    assert torch.equal(deltas(ids, found, mask, mask), wanted_deltas)


@given(batch=st.lists(rows(), min_size=1, max_size=3), more=st.integers(0, 2), rate=st.sampled_from([2.0, 4.0, 25.0]))
@settings(max_examples=120, deadline=None)
def test_whole_seconds_as_in_plain_python(batch: list[Row], more: int, rate: float) -> None:
    ids, mask = left_padded(batch, more)
    rules = PositionRules(image_token_id=IMAGE, video_token_id=VIDEO, tokens_per_second=rate)
    found = rope_positions(rules, ids, grids(batch), mask)
    for number, row in enumerate(batch):
        wanted = list(plain(row, rate))
        assert found[:, number, mask[number] == 1].T.tolist() == [list(place) for place in wanted]
        assert bool((found[:, number, mask[number] == 0] == 1).all())
        # The older version counts padding among the tokens.
        assert int(deltas(ids, found, mask, None)[number]) == max(map(max, wanted)) + 1 - ids.shape[1]


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(batch=st.lists(rows(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_packed_rows_are_placed_as_alone(convention: str, batch: list[Row]) -> None:
    rules = PositionRules(image_token_id=IMAGE, video_token_id=VIDEO, video_convention=convention)
    ids = [tokens(row) for row in batch]
    bounds = torch.tensor([0, *map(len, ids)]).cumsum(0)
    found = rope_positions(rules, torch.tensor([[*chain(*ids)]]), grids(batch), cu_seqlens=bounds)
    alone = [rope_positions(rules, torch.tensor([row]), grids([part])) for row, part in zip(ids, batch, strict=True)]
    assert torch.equal(found, torch.cat(alone, dim=2))
    assert row_ends(found, None, bounds).tolist() == [int(row.max()) + 1 for row in alone]


@given(row=rows(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_calls_go_on_where_the_last_one_ended(row: Row, data: st.DataObject) -> None:
    """A row in several calls, cut anywhere but within an image or a video, and then token by token."""
    rules = PositionRules(image_token_id=IMAGE, video_token_id=VIDEO)
    whole = rope_positions(rules, torch.tensor([[*tokens(row), 1, 2, 3]]), grids([row]))
    calls: list[Row] = [[]]
    for part in row:
        calls[-1].append(part)
        if data.draw(st.booleans()):
            calls.append([])
    state = ModelState([], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    pieces = []
    for ids, visuals in [
        *((tokens(call), grids([call])) for call in calls if call),
        *(([token], VisualGrids()) for token in (1, 2, 3)),
    ]:
        given_ids = torch.tensor([ids], dtype=torch.int64)
        positions = rope_positions(rules, given_ids, visuals, start=state.next_position)
        state.advance(row_lengths(given_ids, None, None), row_ends(positions, None, None))
        pieces.append(positions)
    assert torch.equal(torch.cat(pieces, dim=2), whole)
    assert state.length.tolist() == [whole.shape[2]]


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(batch=st.lists(rows(), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_decoding_goes_on_at_length_plus_delta(convention: str, batch: list[Row]) -> None:
    (ids, mask), count = left_padded(batch, 1), len(batch)
    rules = dataclasses.replace(PositionRules(image_token_id=IMAGE, video_token_id=VIDEO), video_convention=convention)
    positions = rope_positions(rules, ids, grids(batch), mask)
    counted = mask if convention == "v523" else None
    lengths, delta = row_lengths(ids, counted, None), deltas(ids, positions, mask, counted).squeeze(1)
    state = ModelState([], torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    state.advance(row_lengths(ids, mask, None), row_ends(positions, mask, None))
    for step in range(3):
        assert torch.equal(state.next_position, lengths + step + delta)
        state.advance(torch.ones(count, dtype=torch.int64), state.next_position + 1)
