"""Generation against transformers' own, on a small random Qwen2.5-VL that it builds and saves itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_cases import relative_error
from torch import Tensor

import hybridvl
from hybridvl.models.sampling import Sampling
from hybridvl.models.vlm import VisionLanguageModel

START, END, IMAGE, VIDEO, PAD = 90, 91, 92, 93, 94
NEW = 12


@dataclass(frozen=True)
class Pair:
    """The same weights in both implementations, and inputs for either."""

    theirs: Any
    ours: VisionLanguageModel

    def generate(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """transformers' new tokens (B, new), and logits and processed scores (B, new, vocab)."""
        ids = inputs["input_ids"]
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
        out = self.theirs.generate(
            **inputs,
            mm_token_type_ids=kinds,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **options,
        )
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1), torch.stack(out.scores, dim=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(3)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 96, "initializer_range": 0.2, "max_position_embeddings": 512}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2, "initializer_range": 0.2}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    return Pair(model, hybridvl.load(folder))


def batch(lengths: list[int], grid: tuple[int, int] | None, video: bool = False) -> dict[str, Tensor]:
    """Rows of random text around an image or a video each, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    frames = 3 if video else 1
    visual = [START, *[VIDEO if video else IMAGE] * (frames * grid[0] * grid[1] // 4), END] if grid else []
    rows = [torch.randint(0, 80, (length,), generator=generator).tolist() for length in lengths]
    rows = [[*row[:2], *visual, *row[2:]] for row in rows]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    if grid is None:
        return inputs
    grids = torch.tensor([[frames, *grid]]).repeat(len(rows), 1)
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, generator=generator)
    if not video:
        return {**inputs, "pixel_values": pixels, "image_grid_thw": grids}
    seconds = torch.full((len(rows),), 1.5)
    return {**inputs, "pixel_values_videos": pixels, "video_grid_thw": grids, "second_per_grid_ts": seconds}


CASES = {
    "text": batch([9, 4, 1], None),
    "images": batch([7, 3, 5], (4, 6)),
    # Text goes on past the end of the videos: up to there the two ways in which transformers decodes agree.
    "videos": batch([10, 8], (4, 4), video=True),
}


@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy(pair: Pair, case: str, chunk: int) -> None:
    inputs = CASES[case]
    tokens, logits, _ = pair.generate(inputs, {})
    grids = {
        name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in inputs
    }
    positions, _ = pair.ours.rope_positions(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], video_convention="v523", **grids
    )
    steps = list(pair.ours.steps(**inputs, max_new_tokens=NEW, position_ids=positions, chunk=chunk))
    assert relative_error(torch.stack([step.logits for step in steps], dim=1), logits) < 5e-5
    assert torch.equal(torch.stack([step.tokens for step in steps], dim=1), tokens)


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (Sampling(repetition_penalty=1.3), {"repetition_penalty": 1.3}),
        (
            Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2),
            {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        ),
        (Sampling(temperature=1.5), {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 1.0}),
    ],
)
@torch.no_grad()
def test_scores_and_draws(pair: Pair, sampling: Sampling, options: dict[str, Any]) -> None:
    """Rows of one length, as transformers penalizes the token that pads."""
    inputs = batch([6, 6], (4, 6))
    torch.manual_seed(11)
    tokens, _, scores = pair.generate(inputs, options)
    sampling = dataclasses.replace(sampling, seed=11)
    steps = list(pair.ours.steps(**inputs, max_new_tokens=NEW, sampling=sampling))
    assert torch.equal(torch.stack([step.tokens for step in steps], dim=1), tokens)
    found = torch.stack([step.scores for step in steps], dim=1)
    possible = torch.isfinite(scores)
    assert torch.equal(torch.isfinite(found), possible)
    assert relative_error(found[possible], scores[possible]) < 5e-5


@torch.no_grad()
def test_stop_tokens(pair: Pair) -> None:
    inputs = CASES["text"]
    free, _, _ = pair.generate(inputs, {})
    stops = (int(free[0, 3]), int(free[1, 6]))
    tokens, _, _ = pair.generate(inputs, {"eos_token_id": list(stops)})
    found = pair.ours.generate(**inputs, max_new_tokens=NEW, sampling=Sampling(stop_ids=stops))
    found = found[:, inputs["input_ids"].shape[1] :]
    assert found.shape == tokens.shape
    for ours, theirs in zip(found.tolist(), tokens.tolist(), strict=True):
        until = next((i for i, token in enumerate(theirs) if token in stops), len(theirs) - 1)
        assert ours[: until + 1] == theirs[: until + 1]
        assert set(ours[until + 1 :]) <= {ours[until]}  # theirs is filled with padding, ours with the stop token
