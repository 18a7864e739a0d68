"""Our models do what was recorded of others: for every recorded array its counterpart, by the same name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from model_cases import DATA, Recorded
from torch import Tensor

import hybridvl
from hybridvl.layers import State
from hybridvl.layers.cache import KeyValueState
from hybridvl.layers.gdn import GatedDeltaNetState
from hybridvl.models.generation import generate
from hybridvl.models.positions import multimodal_rotary, rotary_sections
from hybridvl.models.vision_plan import Segments, vision_plan
from hybridvl.models.vlm import VisionLanguageModel

QWEN, INFINITE, STREAM = "qwen2_5_vl_tiny", "infinitevl_tiny_standard", "infinitevl_tiny_streaming"
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


@dataclass
class Run:
    """What one of our models gives for a recorded folder.

    found: our array for each recorded one. masks: case -> (B, T) bool, the tokens that are comparable.
    """

    model: VisionLanguageModel
    recorded: Recorded
    found: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def visuals(self, case: str) -> dict[str, Tensor]:
        """The images and videos of a case, by the names of `VisionLanguageModel.forward`."""
        given = self.recorded.inputs
        images = {"pixel_values": given["pixel_values"].float(), "image_grid_thw": given["image_grid_thw"]}
        seconds = given["videofrac.second_per_grid_ts" if case == "videofrac" else "video.second_per_grid_ts"]
        videos = {
            "pixel_values_videos": given["pixel_values_videos"].float(),
            "video_grid_thw": given["video_grid_thw"],
            "second_per_grid_ts": seconds,
        }
        second = {"pixel_values": images["pixel_values"][60:], "image_grid_thw": images["image_grid_thw"][1:]}
        cases = {"images": images, "video": videos, "videofrac": videos, "mixed": {**second, **videos}}
        return cases.get(case, {})

    def tokens(self, case: str) -> tuple[Tensor, Tensor | None]:
        """input_ids and attention_mask of a case."""
        case = "video" if case == "videofrac" else case
        return self.recorded.inputs[f"{case}.input_ids"], self.recorded.inputs.get(f"{case}.attention_mask")

    def positions(self, case: str, convention: str) -> tuple[Tensor, Tensor]:
        """Positions and deltas of a case."""
        ids, mask = self.tokens(case)
        grids = {name: given for name, given in self.visuals(case).items() if name in GRIDS}
        return self.model.rope_positions(ids, attention_mask=mask, video_convention=convention, **grids)

    def outputs(self, case: str, convention: str, prefix: str, tokens: int) -> None:
        """Logits and hidden states of a case, and greedy tokens with the logits they were taken from."""
        (ids, mask), given = self.tokens(case), self.visuals(case)
        positions = None  # the model's own, where they are what is asked for
        if convention != self.model.config.video_convention:
            positions, _ = self.positions(case, convention)
        out = self.model(ids, attention_mask=mask, position_ids=positions, **given, output_hidden_states=True)
        self.found |= {f"{prefix}.logits": out.logits, f"{prefix}.hidden_states": torch.stack(out.hidden_states)}
        if mask is not None:
            self.masks[prefix] = mask.bool()
        if tokens:
            steps = list(self.model.steps(ids, tokens, attention_mask=mask, position_ids=positions, **given))
            self.found[f"{prefix}.generated"] = torch.stack([step.tokens for step in steps], dim=1)
            self.found[f"{prefix}.generated_logits"] = torch.stack([step.logits for step in steps], dim=1)

    def features(self, kind: str) -> None:
        """The vision tower's result."""
        pixels, grid, *_ = self.visuals("images" if kind == "image" else "video").values()
        self.found[f"vision.{kind}.features"] = self.model.encode_images(pixels, grid)

    def states(self, case: str) -> None:
        """The state of every layer after a whole prompt."""
        ids, _ = self.tokens(case)
        state = self.model.init_state(len(ids))
        self.model(ids, state=state)
        self.found |= state_arrays(case, state.layers)


def state_arrays(prefix: str, layers: list[State]) -> dict[str, Tensor]:
    """States by the recorded names: recurrent and convolution states, keys and values but for the oldest slot."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        if isinstance(layer, KeyValueState):
            newest = layer.positions().argsort(1)[:, 1:, None, None]
            for name, x in (("keys", layer.k), ("values", layer.v)):
                found[f"{prefix}.layer{number}.{name}"] = x.gather(1, newest.expand(-1, -1, *x.shape[2:])).transpose(
                    1, 2
                )
        else:
            assert isinstance(layer, GatedDeltaNetState)
            found[f"{prefix}.layer{number}.recurrent_state"] = layer.recurrent
            for name, x in (("q", layer.conv_q), ("k", layer.conv_k), ("v", layer.conv_v)):
                found[f"{prefix}.layer{number}.conv_state_{name}"] = x
    return found


@cache
@torch.no_grad()
def qwen() -> Run:
    """Qwen2.5-VL: text, images, a video and a mixed batch, the latter two in both conventions."""
    run = Run(hybridvl.load(DATA / QWEN), Recorded(DATA / QWEN))
    run.outputs("text", "v523", "text", 16)
    run.outputs("images", "v457", "images", 16)
    positions, deltas = run.positions("images", "v457")
    cos, sin = multimodal_rotary(positions, rotary_sections(16, (2, 3, 3)), 1e6, torch.float32)
    run.found |= {"images.position_ids": positions, "images.rope_deltas": deltas}
    run.found |= {"images.rope_cos": cos, "images.rope_sin": sin}
    for convention in ("v457", "v523"):
        for case, tokens in (("video", 16), ("mixed", 0), ("videofrac", None)):
            positions, deltas = run.positions(case, convention)
            run.found |= {f"{case}.position_ids_{convention}": positions, f"{case}.rope_deltas_{convention}": deltas}
            if tokens is not None:
                run.outputs(case, convention, f"{case}.{convention}", tokens)
    for kind in ("image", "video"):
        run.features(kind)
        run.found |= vision_arrays(run, kind)
    return run


def vision_arrays(run: Run, kind: str) -> dict[str, Tensor]:
    """What goes on within the vision tower; places and embeddings in the patches' own order."""
    tower = run.model.visual
    assert tower is not None
    pixels, grid, *_ = run.visuals("images" if kind == "image" else "video").values()
    blocks: list[Tensor] = []
    tower(pixels, grid, blocks)
    plan = vision_plan(tuple(map(tuple, grid.tolist())), tower.config, torch.device("cpu"))
    places = plan.rows_columns.unflatten(0, (-1, 4))[plan.inverse].flatten(0, 1)
    cos, sin = tower._rotary(places, torch.float32)
    found = {
        "blocks_window_order": torch.stack(blocks),
        "cu_window_seqlens": boundaries(plan.windows, len(places)),
        "patch_embed": tower.patch_embed(pixels),
        "pos_hw": places,
        "rope_cos": cos[0],
        "rope_sin": sin[0],
        "window_index": plan.order,
    }
    return {f"vision.{kind}.{name}": tensor for name, tensor in found.items()}


def boundaries(segments: Segments, patches: int) -> Tensor:
    """Where segments begin, and where the last one ends."""
    if segments.equal is not None:
        return torch.arange(0, patches + 1, segments.equal[1])
    starts = torch.cat([bucket.index[:, 0] for bucket in segments.buckets]).sort().values
    return torch.cat((starts, torch.tensor([patches])))


@cache
@torch.no_grad()
def infinite() -> Run:
    """InfiniteVL: text, a long text, images and a video; states after the two texts."""
    run = Run(hybridvl.load(DATA / INFINITE), Recorded(DATA / INFINITE))
    for case, tokens in (("text", 16), ("long", 0), ("images", 16), ("video", 16), ("textpad", 0)):
        positions, deltas = run.positions(case, "v457")
        run.found |= {f"{case}.position_ids": positions, f"{case}.rope_deltas": deltas}
        run.outputs(case, "v457", case, tokens)
    # The published code mixes the padding of the second row into its state: nothing of that row is comparable.
    run.masks["textpad"] = torch.tensor([[True], [False]]).expand(2, 20)
    del run.found["textpad.hidden_states"]
    for case in ("text", "long"):
        run.states(case)
    for kind in ("image", "video"):
        run.features(kind)
    return run


@cache
@torch.no_grad()
def stream() -> Run:
    """InfiniteVL fed with five frames one by one, then with a question; and the same tokens in one pass."""
    run = Run(hybridvl.load(DATA / INFINITE), Recorded(DATA / STREAM))
    model, given, found = run.model, run.recorded.inputs, run.found
    grid = given["frame_grid_thw"]
    frames = given["frames.pixel_values"].float().chunk(5)
    found["vision.features"] = torch.stack([model.encode_images(frame, grid) for frame in frames])
    state, logits = model.init_state(1), []
    for number, frame in enumerate(frames):
        ids = given["first_frame.input_ids" if number == 0 else "next_frame.input_ids"]
        positions = given[f"frame{number}.position_ids"]
        out = model(ids, position_ids=positions, pixel_values=frame, image_grid_thw=grid, state=state)
        logits.append(out.logits)
    found |= state_arrays("stream.after_frames", state.clone().layers)  # the question updates them in place
    question, positions = given["question.input_ids"], given["question.position_ids"]
    steps = list(generate(model, model.embed(question), positions, None, 9, state=state.clone(), chunk=3))
    found["stream.answer_tokens"] = torch.stack([step.tokens for step in steps[:8]], dim=1)
    # Recorded are the logits that each token led to, not those it was taken from.
    found["stream.answer_logits"] = torch.stack([step.logits for step in steps[1:]], dim=1)
    found["stream.logits"] = torch.cat([*logits, model(question, position_ids=positions, state=state).logits], dim=1)
    visuals = {"pixel_values": torch.cat(frames), "image_grid_thw": grid.expand(5, 3)}
    for case in ("oneshot", "oneshot_standard_positions"):
        out = model(given["oneshot.input_ids"], position_ids=given[f"{case}.position_ids"], **visuals)
        found[f"{case}.logits"] = out.logits
    positions, deltas = model.rope_positions(given["first_frame.input_ids"], grid)
    found |= {"rope_first_frame.standard": positions, "rope_first_frame.delta_standard": deltas}
    return run
