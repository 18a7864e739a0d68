"""The whole model: one result however the rows are cut, padded or packed; sizes, initial values, modes, mistakes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_cases import (
    IMAGE,
    MIXERS,
    VISION,
    Prompt,
    joined_images,
    packed,
    padded,
    prompt,
    prompts,
    relative_error,
    small_config,
    small_model,
)
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel

PATTERNS = ["full*2", "swa gdn", "mamba2*2", "(swa+mamba2) full", "gdn+full swa"]
DTYPES = [(torch.float32, 2e-5), (torch.float64, 1e-10)]


def logits_alone(model: VisionLanguageModel, row: Prompt, state: ModelState | None = None) -> Tensor:
    pixels = None if row.pixel_values is None else row.pixel_values.to(model.lm_head_weight.dtype)
    return model(row.input_ids, pixel_values=pixels, image_grid_thw=row.image_grid_thw, state=state).logits


def assert_same_states(found: ModelState, wanted: list[ModelState], tolerance: float) -> None:
    """Every row of `found` holds what the row alone left behind, as far as a cache reaches."""
    for row, alone in enumerate(wanted):
        assert found.length[row] == alone.length[0]
        assert found.rope_delta[row] == alone.rope_delta[0]
        for name, tensor in alone.tensors().items():
            mine = found.tensors()[name][row]
            if name.endswith((".k", ".v")):
                used = min(int(alone.length), len(tensor[0]))
                mine, tensor = mine[:used], tensor[:, :used]
            assert relative_error(mine.double(), tensor[0].double()) <= tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_cut_padded_and_packed_rows_equal_rows_alone(pattern: str, dtype: torch.dtype, tolerance: float) -> None:
    model, rows = small_model(pattern, dtype), prompts()
    images = joined_images(rows)
    images["pixel_values"] = images["pixel_values"].to(dtype)
    states = [model.init_state(1) for _ in rows]
    alone = [logits_alone(model, row) for row in rows]
    with_state = [logits_alone(model, row, state) for row, state in zip(rows, states, strict=True)]
    for one, other in zip(alone, with_state, strict=True):
        assert relative_error(other, one) <= tolerance

    for left in (True, False):
        ids, mask = padded(rows, left)
        state = model.init_state(len(rows))
        for given in (None, state):
            found = model(ids, attention_mask=mask, **images, state=given).logits
            for number, wanted in enumerate(alone):
                assert relative_error(found[number][mask[number]], wanted[0]) <= tolerance
        assert_same_states(state, states, tolerance)

    ids, cu_seqlens = packed(rows)
    state = model.init_state(len(rows))
    for given in (None, state):
        found = model(ids, **images, cu_seqlens=cu_seqlens, state=given).logits
        assert relative_error(found, torch.cat(alone, dim=1)) <= tolerance
    assert_same_states(state, states, tolerance)

    for cuts in ([1] * 100, [5, 1, 9, 2, 40], [13, 3, 50]):  # some of them in the middle of an image
        for row, wanted, left_behind in zip(rows, alone, states, strict=True):
            embeds = model.embed(row.input_ids, *pixels_of(row, dtype))
            positions, _ = model.rope_positions(row.input_ids, row.image_grid_thw)
            state, pieces, done = model.init_state(1), [], 0
            for cut in cuts:
                piece = slice(done, done + cut)
                if done < embeds.shape[1]:
                    pieces.append(model.run_decoder(embeds[:, piece], positions[:, :, piece], state=state))
                done += cut
            found = torch.cat(pieces, dim=1) @ model.lm_head_weight.T
            assert relative_error(found, wanted) <= tolerance
            assert_same_states(state, [left_behind], tolerance)


def pixels_of(row: Prompt, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    return None if row.pixel_values is None else row.pixel_values.to(dtype), row.image_grid_thw


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_turns_go_on_where_the_state_stopped(pattern: str) -> None:
    """Calls with a state find their own positions: after images, in padded batches, with images in later turns."""
    model = small_model(pattern, torch.float64)
    first, second = [prompts(), [prompt(4, [(1, 4, 4)], 7), prompt(1, [], 8), prompt(9, [(1, 6, 4)], 9)]]
    whole = [joined_turns(a, b) for a, b in zip(first, second, strict=True)]
    state = model.init_state(len(first))
    for left, turn in ((True, first), (False, second)):
        ids, mask = padded(turn, left)
        images = joined_images(turn)
        found = model(ids, attention_mask=mask, **to_double(images), state=state).logits
    for number, (row, start) in enumerate(zip(whole, first, strict=True)):
        wanted = logits_alone(model, row)[0, start.input_ids.shape[1] :]
        assert relative_error(found[number][mask[number]], wanted) <= 1e-10


def joined_turns(a: Prompt, b: Prompt) -> Prompt:
    images = joined_images([a, b]) if a.image_grid_thw is not None or b.image_grid_thw is not None else {}
    return Prompt(
        torch.cat((a.input_ids, b.input_ids), dim=1), images.get("pixel_values"), images.get("image_grid_thw")
    )


def to_double(images: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**images, "pixel_values": images["pixel_values"].double()}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_padded_and_packed_rows(pattern: str) -> None:
    model, rows = small_model(pattern, torch.float64), prompts()
    images = to_double(joined_images(rows))

    def gradients(*losses: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.stack(losses).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(*(logits_alone(model, row).square().sum() for row in rows))
    assert wanted.keys() == dict(model.named_parameters()).keys()
    ids, mask = padded(rows, left=True)
    in_padded = gradients(model(ids, attention_mask=mask, **images).logits[mask].square().sum())
    ids, cu_seqlens = packed(rows)
    in_packed = gradients(model(ids, **images, cu_seqlens=cu_seqlens).logits.square().sum())
    for name, gradient in wanted.items():
        assert relative_error(in_padded[name], gradient) <= 1e-10, name
        assert relative_error(in_packed[name], gradient) <= 1e-10, name


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_the_equivalences_would_notice_a_fault(pattern: str) -> None:
    """The rows above do depend on early tokens, on pixels, on boundaries and on positions."""
    model, row = small_model(pattern, torch.float64), prompts()[0]
    wanted = logits_alone(model, row)
    other = dataclasses.replace(row, input_ids=row.input_ids.clone())
    other.input_ids[0, 4] += 1
    assert relative_error(logits_alone(model, other)[:, -6:], wanted[:, -6:]) > 1e-5
    other = dataclasses.replace(row, pixel_values=-row.pixel_values)
    assert relative_error(logits_alone(model, other)[:, -1], wanted[:, -1]) > 1e-5
    ids, _ = packed([row, row])
    both = model(ids, **to_double(joined_images([row, row]))).logits[:, -1]
    assert relative_error(both, wanted[:, -1]) > 1e-5


@pytest.mark.parametrize(
    ("pattern", "tied", "total"), [("(swa gdn*3)*9", True, 4_408_381_536), ("full*36", True, 3_754_622_976)]
)
def test_published_sizes(pattern: str, tied: bool, total: int) -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(ModelConfig(pattern=pattern, tie_embeddings=tied, vision=VisionConfig()))
    assert model.num_params == total
    assert model.visual is not None
    assert sum(p.numel() for p in model.visual.parameters()) == 668_684_288
    assert all(parameter.is_meta for parameter in model.parameters())
    mixers = sum(config.num_params(2048) for config in model.mixer_configs)
    assert mixers == sum(p.numel() for name, p in model.named_parameters() if ".mixer." in name)


def test_initial_values() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(small_config("gdn mamba2"), init_std=0.02)
    model = VisionLanguageModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight") or "embed_tokens" in name or "patch_embed" in name or ".attn." in name:
            if parameter.dim() > 1:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
        elif name.endswith("norm.weight") or "norm1" in name or "norm2" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("A_log"):
            assert 0 <= parameter.min() <= parameter.max() <= torch.tensor(16.0).log() + 1e-6
            assert parameter.std() > 0.1
    assert all(not bias.any() for name, bias in model.named_parameters() if name.endswith("proj.bias"))


@pytest.mark.parametrize("pattern", ["swa gdn", "(swa+mamba2) full"])
def test_activation_checkpointing_changes_nothing(pattern: str) -> None:
    row, found = prompts()[0], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = VisionLanguageModel(dataclasses.replace(small_config(pattern), activation_checkpointing=recompute))
        logits_alone(model, row).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_compiles_into_one_graph() -> None:
    model = small_model("full gdn (swa+mamba2)")
    ids = torch.randint(0, 80, (2, 70))
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, :7] = False
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    for arguments in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            found, wanted = compiled(ids, **arguments).logits, model(ids, **arguments).logits
        assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16(pattern: str) -> None:
    """Half precision, true or automatic, gives finite gradients and roughly the same logits."""
    row, wanted = prompts()[0], logits_alone(small_model(pattern), prompts()[0])
    model = small_model(pattern)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_alone(model, row)
    assert relative_error(found, wanted) < 0.1
    found.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model = small_model(pattern, torch.bfloat16)
    state = model.init_state(1)
    for given in (None, state):
        found = logits_alone(model, row, given)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, wanted) < 0.1


def test_outputs_fit_together() -> None:
    model, row = small_model("swa gdn*2"), prompts()[0]
    images = {"pixel_values": row.pixel_values, "image_grid_thw": row.image_grid_thw}
    with torch.no_grad():
        out = model(row.input_ids, **images, output_hidden_states=True)
        hidden = model.hidden(row.input_ids, **images)
        embeds = model.embed(row.input_ids, row.pixel_values, row.image_grid_thw)
    assert model(row.input_ids, **images).hidden_states is None
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], embeds)
    assert torch.equal(out.hidden_states[-1], hidden)
    assert torch.equal(hidden @ model.lm_head_weight.T, out.logits)
    features = model.encode_images(row.pixel_values, row.image_grid_thw)
    assert torch.equal(embeds[row.input_ids == IMAGE], features)


def test_state_is_owned_by_the_caller() -> None:
    model, row = small_model("swa gdn"), prompts()[1]
    state = model.init_state(1)
    assert len(state.layers) == 2
    assert state.nbytes == sum(layer.nbytes for layer in state.layers) + 16
    empty = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with torch.no_grad():
        logits_alone(model, row, state)
        fork, before = state.clone(), {name: tensor.clone() for name, tensor in state.tensors().items()}
        addresses = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        logits_alone(model, row, fork)
        assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
        logits_alone(model, row, state)
    assert addresses == {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    assert state.length.tolist() == [22]
    restored = model.init_state(1)
    restored.load_state_dict(state.state_dict())
    assert all(torch.equal(state.tensors()[name], tensor) for name, tensor in restored.tensors().items())
    state.reset()
    assert all(torch.equal(empty[name], tensor) for name, tensor in state.tensors().items())


def test_head_dims_need_no_sections_without_vision() -> None:
    mixers = {**MIXERS, "full": {"heads": 2, "kv_heads": 1, "head_dim": 6}}
    config = dataclasses.replace(small_config("full", vision=None), mixers=mixers)
    assert VisionLanguageModel(config)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)
    with pytest.raises(ConfigError, match="head_dim: 6; expected a multiple of 16"):
        VisionLanguageModel(dataclasses.replace(config, vision=VISION))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": 1}, r"input_ids: 5 image tokens \(id 90\), but the images given make 6 features"),
        ({"images": False}, r"input_ids: 6 image tokens \(id 90\), but the images given make 0 features"),
        ({"tokens": False}, r"input_ids: 0 image tokens \(id 90\), but the images given make 6 features"),
        ({"grid": False}, "images: pixel values and grids must be given together"),
        ({"mask": (1, 3)}, r"attention_mask: shape \(1, 3\); expected \(1, 12\)"),
        ({"position_ids": (1, 12)}, r"position_ids: shape \(1, 12\); expected \(3, 1, 12\)"),
        ({"cu_seqlens": True, "mask": (1, 12)}, "cu_seqlens: packed segments"),
        ({"state": 2}, "state: 2 rows; expected 1, one per row or packed segment"),
    ],
)
def test_mistakes_in_the_inputs(change: dict[str, object], message: str) -> None:
    model, row = small_model("full"), prompt(4, [(1, 4, 6)], 0)
    if change.get("drop"):
        row.input_ids = torch.cat((row.input_ids[:, :5], row.input_ids[:, 6:]), dim=1)
    if change.get("tokens") is False:
        row.input_ids = torch.ones(1, 12, dtype=torch.int64)
    if change.get("images") is False:
        row.pixel_values = row.image_grid_thw = None
    if change.get("grid") is False:
        row.image_grid_thw = None
    shapes = {name: torch.ones(change[name], dtype=torch.int64) for name in ("mask", "position_ids") if name in change}
    with pytest.raises(ConfigError, match=message):
        model(
            row.input_ids,
            attention_mask=shapes.get("mask"),
            position_ids=shapes.get("position_ids"),
            pixel_values=row.pixel_values,
            image_grid_thw=row.image_grid_thw,
            cu_seqlens=torch.tensor([0, 12]) if "cu_seqlens" in change else None,
            state=model.init_state(2) if "state" in change else None,
        )


def test_images_need_a_vision_tower() -> None:
    model = VisionLanguageModel(small_config("full", vision=None))
    with pytest.raises(ConfigError, match="a model without a vision tower"):
        model(torch.tensor([[90]]), pixel_values=torch.zeros(4, 1176), image_grid_thw=torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4)])
def test_tokens_come_in_rows(shape: tuple[int, ...]) -> None:
    model, ids = small_model("full"), torch.ones(shape, dtype=torch.int64)
    for call in (model, model.hidden, model.generate, model.embed, model.rope_positions):
        with pytest.raises(ConfigError, match=r"input_ids: shape \(.*\); expected \(B, T\)"):
            call(ids)


@pytest.mark.parametrize("bounds", [[0, 3], [0, 3, 9], [0, 5, 3, 7]])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_positions", [False, True])
def test_segments_must_cover_the_row(bounds: list[int], with_state: bool, with_positions: bool) -> None:
    model = small_model("swa gdn")
    with pytest.raises(ConfigError, match="expected to rise from 0 to the 7 tokens of the row"):
        model(
            torch.ones(1, 7, dtype=torch.int64),
            position_ids=torch.zeros(3, 1, 7, dtype=torch.int64) if with_positions else None,
            cu_seqlens=torch.tensor(bounds),
            state=model.init_state(len(bounds) - 1) if with_state else None,
        )


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_no_rows_and_no_tokens(pattern: str) -> None:
    model, row = small_model(pattern), prompts()[1]
    assert model(row.input_ids[:0]).logits.shape == (0, 11, 96)
    assert model(row.input_ids[:0], state=model.init_state(0)).logits.shape == (0, 11, 96)
    state = model.init_state(1)
    first = logits_alone(model, Prompt(row.input_ids[:, :6]), state)
    assert logits_alone(model, Prompt(row.input_ids[:, :0]), state).shape == (1, 0, 96)
    assert (state.length.tolist(), state.next_position.tolist()) == ([6], [6])
    second = logits_alone(model, Prompt(row.input_ids[:, 6:]), state)
    assert relative_error(torch.cat((first, second), dim=1), logits_alone(model, row)) <= 2e-5


@torch.no_grad()
def test_no_images() -> None:
    model, ids = small_model("full"), torch.tensor([[1, 2, 3]])
    pixels, grids = torch.zeros(0, VISION.patch_dim), torch.zeros(0, 3, dtype=torch.int64)
    assert model.encode_images(pixels, grids).shape == (0, 32)
    assert torch.equal(model(ids, pixel_values=pixels, image_grid_thw=grids).logits, model(ids).logits)
    with pytest.raises(ConfigError, match=r"pixel_values: shape \(4, 1176\); expected \(0, 1176\) for 0 grids"):
        model.encode_images(torch.zeros(4, VISION.patch_dim), grids)
