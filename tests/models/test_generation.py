"""Generation: batches with padding, chunked prefill, penalties, stop tokens, forked states, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import joined_images, padded, prompts, relative_error, small_model
from torch import Tensor

from hybridvl.inference import Sampling, decode_step, generate, prefill
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

PATTERNS = ["swa gdn", "(swa+mamba2) full"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_recomputing_every_step(pattern: str) -> None:
    """Padded batch with images against the growing row alone, recomputed from the start for every token."""
    model, rows = small_model(pattern, torch.float64), prompts()
    images = joined_images(rows)
    images["pixel_values"] = images["pixel_values"].double()
    for left in (True, False):
        ids, mask = padded(rows, left)
        found = model.generate(ids, 6, attention_mask=mask, **images)
        assert found.shape == (3, ids.shape[1] + 6)
        for number, row in enumerate(rows):
            pixels = None if row.pixel_values is None else row.pixel_values.double()
            alone = row.input_ids
            for _ in range(6):
                alone = torch.cat((alone, recomputed(model, alone, row.input_ids, pixels, row.image_grid_thw)), dim=1)
            assert torch.equal(found[number, ids.shape[1] :], alone[0, row.input_ids.shape[1] :])


@torch.no_grad()
def recomputed(
    model: VisionLanguageModel, ids: Tensor, given: Tensor, pixels: Tensor | None, grid: Tensor | None
) -> Tensor:
    """The most likely next token (1, 1), without a state; generated tokens are embedded as plain tokens."""
    positions, deltas = model.rope_positions(given, image_grid_thw=grid)
    more = torch.arange(given.shape[1], ids.shape[1]) + deltas
    positions = torch.cat((positions, more.expand(3, 1, -1)), dim=2)
    embeds = torch.cat((model.embed(given, pixels, grid), model.decoder.embed_tokens(ids[:, given.shape[1] :])), dim=1)
    return (model.run_decoder(embeds, positions)[:, -1] @ model.lm_head_weight.T).argmax(-1, keepdim=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_prefill_in_chunks_of_any_size(pattern: str) -> None:
    model, rows = small_model(pattern, torch.float64), prompts()
    images = joined_images(rows)
    for left in (True, False):
        ids, mask = padded(rows, left)
        embeds = model.embed(ids, images["pixel_values"].double(), images["image_grid_thw"])
        positions, _ = model.rope_positions(ids, images["image_grid_thw"], attention_mask=mask)
        results = []
        for chunk in (1, 7, 100, 10**30):
            state = model.init_state(3)
            hidden = prefill(model, embeds, positions, mask, state, chunk)
            results.append((hidden, decode_step(model, torch.tensor([1, 2, 3]), state)))
            assert state.length.tolist() == [26, 12, 14]
        for other in results[1:]:
            assert relative_error(other[0], results[0][0]) < 1e-10
            assert relative_error(other[1], results[0][1]) < 1e-10


def test_stop_tokens_end_rows_and_generation() -> None:
    model, ids = small_model("swa gdn"), torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = model.generate(ids, 12)[:, 3:]
    stop = int(free[0, 4])
    first = free[0].tolist().index(stop)
    found = model.generate(ids, 12, sampling=Sampling(stop_ids=(stop,)))[:, 3:]
    assert found[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(found[0, first:].tolist()) == {stop}
    if stop not in free[1].tolist():
        assert torch.equal(found[1], free[1])
    both = Sampling(stop_ids=(int(free[0, 0]), int(free[1, 0])))
    assert model.generate(ids, 12, sampling=both).shape == (2, 4)


def test_a_forked_state_goes_on_alone() -> None:
    model, ids = small_model("swa gdn"), torch.tensor([[1, 2, 3]])
    positions, _ = model.rope_positions(ids)
    with torch.no_grad():
        steps = generate(model, model.embed(ids), positions, max_new_tokens=5)
        first = next(steps)
        fork = first.state.clone()
        rest = [step.tokens.item() for step in steps]
        tokens, again = first.tokens, []
        for _ in rest:
            tokens = (decode_step(model, tokens, fork) @ model.lm_head_weight.T).argmax(-1)
            again.append(tokens.item())
    assert again == rest


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_is_its_rows_alone(pattern: str) -> None:
    """Greedy with a penalty: each row counts its own tokens, and padding is none of them."""
    model, rows = small_model(pattern, torch.float64), prompts()
    images, sampling = joined_images(rows), Sampling(repetition_penalty=1.4)
    images["pixel_values"] = images["pixel_values"].double()
    for left in (True, False):
        ids, mask = padded(rows, left)
        steps = list(model.steps(ids, 8, attention_mask=mask, **images, sampling=sampling, chunk=9))
        for number, row in enumerate(rows):
            pixels = None if row.pixel_values is None else row.pixel_values.double()
            alone = model.steps(
                row.input_ids, 8, pixel_values=pixels, image_grid_thw=row.image_grid_thw, sampling=sampling
            )
            for together, single in zip(steps, alone, strict=True):
                assert together.tokens[number] == single.tokens[0]
                assert relative_error(together.scores[number], single.scores[0]) < 1e-10


def test_a_penalty_keeps_tokens_from_coming_back() -> None:
    model, ids = small_model("swa gdn"), torch.tensor([[1, 2, 3]])
    written = model.generate(ids, 20, sampling=Sampling(repetition_penalty=1e6))[0].tolist()
    free = model.generate(ids, 20)[0].tolist()
    assert len(set(free)) < 23
    assert len(set(written)) == 23


def test_a_seed_repeats_a_sample() -> None:
    model, ids = small_model("swa gdn"), torch.tensor([[1, 2, 3]])

    def sample(seed: int) -> list[int]:
        return model.generate(ids, 12, sampling=Sampling(temperature=2.0, seed=seed))[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_nothing_to_generate() -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(small_model("full").generate(ids, 0), ids)


def test_tokens_of_32_bits() -> None:
    model, ids, sampling = small_model("gdn"), torch.tensor([[1, 2, 3]]), Sampling(repetition_penalty=1.5)
    wanted = model.generate(ids, 4, sampling=sampling)
    assert torch.equal(model.generate(ids.int(), 4, sampling=sampling), wanted)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 96]]), "input_ids: tokens from 1 to 96; expected 0 to 95"),
        (torch.tensor([[1, -1]]), "input_ids: tokens from -1 to 1; expected 0 to 95"),
        (torch.tensor([[1.0, 2.0]]), "input_ids: torch.float32; expected a tensor of int64"),
        ([[1, 2]], "input_ids: list; expected a tensor of int64"),
        (torch.tensor([1, 2]), r"input_ids: shape \(2,\); expected \(B, T\)"),
    ],
)
def test_tokens_that_are_none(tokens: Any, message: str) -> None:
    model = small_model("gdn")
    for call in (model, model.hidden, model.generate):
        with pytest.raises(ConfigError, match=message):
            call(tokens)


def test_mistakes() -> None:
    model, ids = small_model("full"), torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ConfigError, match="max_new_tokens: -1; expected a whole number of at least 0"):
        model.generate(ids, -1)
    with pytest.raises(ConfigError, match="chunk: 0; expected a whole number of at least 1"):
        model.generate(ids, 1, chunk=0)
    with pytest.raises(ConfigError, match=r"chunk: 2.5; expected a whole number"):
        model.generate(ids, 1, chunk=2.5)
    with pytest.raises(ConfigError, match="input_ids: None; expected the prompt's tokens"):
        next(generate(model, model.embed(ids), torch.zeros(3, 2, 2), sampling=Sampling(repetition_penalty=2.0)))
    with pytest.raises(ConfigError, match="a row without a real token"):
        model.generate(ids, 1, attention_mask=torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ConfigError, match="an empty prompt"):
        model.generate(ids[:, :0], 1)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_logits_that_are_no_numbers(sampling: Sampling) -> None:
    model = small_model("gdn")
    with torch.no_grad():
        model.decoder.norm.weight[3] = torch.nan
    with pytest.raises(ConfigError, match=r"logits: not finite in torch.float32; expected weights without NaN"):
        model.generate(torch.tensor([[1, 2, 3]]), 2, sampling=sampling)
