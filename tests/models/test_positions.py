"""Multimodal rotary positions: padded and packed rows, tables and mistakes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import small_model

from hybridvl.layers import ConfigError
from hybridvl.models.positions import (
    PositionRules,
    VisualGrids,
    multimodal_rotary,
    rope_positions,
    rotary_sections,
    row_ends,
    row_lengths,
)

RULES = PositionRules(image_token_id=250, video_token_id=251)
GRID = torch.tensor([[1, 4, 6]])


def test_tables_by_hand() -> None:
    positions = torch.tensor([[[5]], [[7]], [[11]]])
    cos, _ = multimodal_rotary(positions, rotary_sections(16, None), 100.0, torch.float64)
    axes = [5, 5, 7, 7, 7, 11, 11, 11]
    wanted = [math.cos(position * 100.0 ** (-i / 8)) for i, position in enumerate(axes)]
    assert cos[0, 0].tolist() == pytest.approx(wanted * 2, abs=1e-12)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    starts=st.lists(st.integers(0, 50), min_size=4, max_size=4),
    image=st.booleans(),
    left=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_padded_and_packed_rows_are_placed_as_alone(
    lengths: list[int], starts: list[int], image: bool, left: bool
) -> None:
    rows = [torch.arange(length) + 1 for length in lengths]
    if image:
        rows[0] = torch.cat((rows[0], torch.full((6,), 250), rows[0]))
    start = torch.tensor(starts[: len(rows)])
    grids = VisualGrids(GRID if image else None)
    alone = [
        rope_positions(RULES, row[None], grids if i == 0 else VisualGrids(), start=start[i : i + 1])
        for i, row in enumerate(rows)
    ]
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    padded = rope_positions(RULES, ids, grids, mask, start=start)
    cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0)
    packed = rope_positions(RULES, torch.cat(rows)[None], grids, cu_seqlens=cu_seqlens, start=start)
    assert torch.equal(packed, torch.cat(alone, dim=2))
    for i, positions in enumerate(alone):
        assert torch.equal(padded[:, i, mask[i] == 1], positions[:, 0])
    assert row_lengths(ids, mask, None).tolist() == [len(row) for row in rows]
    ends = [int(positions.max()) + 1 for positions in alone]
    assert row_ends(padded, mask, None).tolist() == ends
    assert row_ends(packed, None, cu_seqlens).tolist() == ends


def test_adjacent_images_need_no_separator() -> None:
    ids = torch.tensor([[250] * 12])
    positions = rope_positions(RULES, ids, VisualGrids(torch.tensor([[1, 4, 6], [1, 4, 6]])))
    first = [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert positions[:, 0, :6].tolist() == first
    assert positions[:, 0, 6:].tolist() == [[p + 3 for p in axis] for axis in first]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 250, 250, 2], r"2 image tokens \(id 250\) where the grid \[1, 4, 6\] asks for 6"),
        ([250] * 7, r"more runs of image tokens \(id 250\) than image grids"),
        ([1, 2, 3], "1 more image grids than runs of image tokens"),
    ],
)
def test_tokens_must_match_grids(ids: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_positions(RULES, torch.tensor([ids]), VisualGrids(GRID))


def test_sections_must_fit_the_head() -> None:
    assert rotary_sections(128, None) == (16, 24, 24)
    with pytest.raises(ConfigError, match=r"add up to 9; expected head_dim / 2 for head_dim 16"):
        rotary_sections(16, (3, 3, 3))
    with pytest.raises(ConfigError, match="head_dim: 24; expected a multiple of 16"):
        rotary_sections(24, None)


def test_unknown_video_convention() -> None:
    with pytest.raises(ConfigError, match=r"video_convention: 'v999'; expected one of \('v457', 'v523'\)"):
        dataclasses.replace(RULES, video_convention="v999")
    for name in ("v999", ""):
        with pytest.raises(ConfigError, match=f"video_convention: '{name}'"):
            small_model("full").rope_positions(torch.tensor([[1, 2]]), video_convention=name)


@pytest.mark.parametrize("seconds", [[], [1.0], [1.0, 1.0, 1.0]])
def test_every_video_has_its_seconds(seconds: list[float]) -> None:
    ids, videos = torch.tensor([[251, 251, 1, 251, 251]]), torch.tensor([[2, 2, 2], [2, 2, 2]])
    message = rf"second_per_grid_ts: {len(seconds)} numbers for 2 video grids"
    with pytest.raises(ConfigError, match=message):
        rope_positions(RULES, ids, VisualGrids(videos=videos, seconds=torch.tensor(seconds)))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"second_per_grid_ts: \[1.0, {wrong}\]; expected seconds of at least 0"):
            rope_positions(RULES, ids, VisualGrids(videos=videos, seconds=[1.0, wrong]))
    right = rope_positions(RULES, ids, VisualGrids(videos=videos, seconds=[1.0, 3.0]))
    assert right[0, 0].tolist() == [0, 2, 3, 4, 10]


def test_ends_of_rows_without_slots() -> None:
    nothing = torch.zeros(3, 2, 0, dtype=torch.int64)
    assert row_ends(nothing, None, None).tolist() == [0, 0]
    assert row_ends(nothing, torch.ones(2, 0), None).tolist() == [0, 0]
    assert row_ends(nothing[:, :1], None, torch.tensor([0, 0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("grid", [[1, 4, 6], [[1, 4]], [[[1, 4, 6]]]])
def test_shape_of_grids(kind: str, grid: list[object]) -> None:
    with pytest.raises(ConfigError, match=rf"{kind}_grid_thw: shape \(.*\); expected \(n, 3\)"):
        rope_positions(RULES, torch.tensor([[1, 2]]), VisualGrids(**{f"{kind}s": torch.tensor(grid)}))


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4)])
def test_shape_of_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"input_ids: shape \(.*\); expected \(B, T\)"):
        rope_positions(RULES, torch.ones(shape, dtype=torch.int64), VisualGrids())


@pytest.mark.parametrize("bounds", [[0, 3], [0, 3, 9], [0, 5, 3, 7], [1, 7]])
@pytest.mark.parametrize("image", [False, True])
def test_segments_must_cover_the_row(bounds: list[int], image: bool) -> None:
    ids = torch.tensor([[1, *[250] * 6]]) if image else torch.ones(1, 7, dtype=torch.int64)
    with pytest.raises(ConfigError, match="expected to rise from 0 to the 7 tokens of the row"):
        rope_positions(RULES, ids, VisualGrids(GRID if image else None), cu_seqlens=torch.tensor(bounds))


def test_lists_in_place_of_tensors() -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="attention_mask: list; expected a tensor"):
        small_model("full")(ids, attention_mask=[[1, 1, 1]])
    with pytest.raises(ConfigError, match="cu_seqlens: list; expected a tensor"):
        small_model("full")(ids, cu_seqlens=[0, 3])
