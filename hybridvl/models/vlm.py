"""The vision-language model: visual features scattered into token embeddings, a decoder of mixers, an output head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvl.layers import ConfigError, MixerConfig, Sequence
from hybridvl.layers.ops.one_row import one_row_products
from hybridvl.models.config import ModelConfig
from hybridvl.models.decoder import Decoder, ModelState
from hybridvl.models.generation import PREFILL_CHUNK, GenerationStep, StepRunner, generate
from hybridvl.models.positions import (
    PositionRules,
    VisualGrids,
    check_layout,
    multimodal_rotary,
    rope_positions,
    rotary_sections,
    row_ends,
    row_lengths,
)
from hybridvl.models.sampling import Sampling
from hybridvl.models.vision import VisionTower
from hybridvl.pattern import parse_pattern


@dataclass(frozen=True)
class ModelOutput:
    """logits: (B, T, vocab). hidden_states: layers + 1 tensors (B, T, D), the embeddings first and the last one after
    the final norm; None unless asked for."""

    logits: Tensor
    hidden_states: list[Tensor] | None = None


class VisionLanguageModel(nn.Module):
    """A model of any layer pattern, with or without a vision tower.

    Inputs that `forward`, `hidden` and `generate` share:
        input_ids: (B, T) int64; one image_token_id (video_token_id) per visual feature.
        attention_mask: (B, T), nonzero at real tokens; padding may stand left, right or between.
        position_ids: (3, B, T) int64 positions on the axes (t, h, w); None computes them (`rope_positions`), going on
            after what the state has seen.
        pixel_values: (P, channels * frames * patch ** 2), the images' patches; image_grid_thw: (images, 3) their
            frames, rows and columns. pixel_values_videos, video_grid_thw: the same for videos.
        second_per_grid_ts: (videos,) seconds between the frames of a video's grid, default 1.
        cu_seqlens: (N + 1,) int64, boundaries of N segments packed into one row; not with attention_mask.
        state: from `init_state`, updated in place; with cu_seqlens it has one row per segment.
    Mistakes in the inputs are ConfigErrors.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pattern = parse_pattern(config.pattern, config.mixers)
        self.config = config
        self.pattern = str(pattern)
        self.mixer_configs: list[MixerConfig] = pattern.configs(config.mixers, path="mixers")
        self._rotary_sections = sections_by_dim(self.mixer_configs, config)
        self.visual = None
        if config.vision is not None:
            self.visual = VisionTower(config.vision, config.width, config.activation_checkpointing)
        self.decoder = Decoder(
            self.mixer_configs,
            config.width,
            config.mlp_width,
            config.vocab_size,
            config.norm_eps,
            config.activation_checkpointing,
        )
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.in_step = False
        """Whether `embed` runs the vision tower exactly once, whatever it is given: processes that share its weights
        must do so together, also where one of them has nothing to look at."""
        self.apply(partial(init_weights, std=config.init_std))

    @property
    def num_params(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def lm_head_weight(self) -> Tensor:
        """(vocab, D), the output head: the embedding when tied."""
        return self.decoder.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """An empty state for batch_size rows; device and dtype default to the parameters'."""
        device = self.lm_head_weight.device if device is None else device
        layers = self.decoder.init_states(batch_size, device, dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return ModelState(layers, length, length.clone())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        state: ModelState | None = None,
        output_hidden_states: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> ModelOutput:
        """Logits for every token; see the class for the inputs."""
        collected: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden(
            input_ids,
            attention_mask,
            position_ids,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            second_per_grid_ts,
            state,
            cu_seqlens,
            collected,
        )
        return ModelOutput(self.logits(hidden), collected)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head: hidden states (..., D) after the final norm to (..., vocab)."""
        with one_row_products(hidden):
            return F.linear(hidden, self.lm_head_weight)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, without the head; see the class for the inputs, and
        `run_decoder` for `collected`."""
        embeds = self.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if position_ids is None:
            grids = VisualGrids(image_grid_thw, video_grid_thw, second_per_grid_ts)
            position_ids = self.next_positions(input_ids, grids, attention_mask, cu_seqlens, state)
        return self.run_decoder(embeds, position_ids, attention_mask, cu_seqlens, state, collected)

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Features (tokens, D) of images or videos, in order."""
        if self.visual is None:
            raise ConfigError("pixel_values: given to a model without a vision tower; expected vision in its config")
        return self.visual(pixel_values, image_grid_thw)

    def rope_positions(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        video_convention: str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Positions (3, B, T) int64, and per row (or segment) the delta (B, 1) from a number of tokens to the position
        of the next one. "v457" counts padding among the tokens, "v523" does not; None is the config's convention."""
        rules = position_rules(self.config, video_convention)
        grids = VisualGrids(image_grid_thw, video_grid_thw, second_per_grid_ts)
        positions = rope_positions(rules, input_ids, grids, attention_mask, cu_seqlens)
        counted = attention_mask if rules.video_convention == "v523" else None
        ends = row_ends(positions, attention_mask, cu_seqlens)
        return positions, (ends - row_lengths(input_ids, counted, cu_seqlens)).unsqueeze(1)

    def next_positions(
        self,
        input_ids: Tensor,
        grids: VisualGrids,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
    ) -> Tensor:
        """Positions (3, B, T) int64 of the tokens, going on after what the state has seen."""
        start = None if state is None else state.next_position
        return rope_positions(position_rules(self.config), input_ids, grids, attention_mask, cu_seqlens, start)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 16,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        sampling: Sampling | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> Tensor:
        """(B, T + new) tokens: input_ids and what follows, greedily unless `sampling` says otherwise.

        chunk: prompt tokens per call of the layers; the result does not depend on it. Rows that reached a stop token
        are filled with it; generation ends early when all rows have.
        """
        steps = self.steps(
            input_ids,
            max_new_tokens,
            attention_mask,
            position_ids,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            second_per_grid_ts,
            sampling,
            chunk,
        )
        return torch.cat([input_ids, *(step.tokens.unsqueeze(1) for step in steps)], dim=1)

    @torch.no_grad()
    def steps(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 16,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        sampling: Sampling | None = None,
        chunk: int = PREFILL_CHUNK,
        runner: StepRunner | None = None,
    ) -> Iterator[GenerationStep]:
        """What `generate` does, token by token: an iterator whose first step includes the prefill."""
        embeds = self.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if position_ids is None:
            grids = VisualGrids(image_grid_thw, video_grid_thw, second_per_grid_ts)
            position_ids = self.next_positions(input_ids, grids, attention_mask)
        return generate(
            self,
            embeds,
            position_ids,
            attention_mask,
            max_new_tokens,
            sampling,
            chunk=chunk,
            input_ids=input_ids,
            runner=runner,
        )

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, T, D) of the tokens, with visual features in the places of visual tokens."""
        _check_tokens(input_ids, self.decoder.embed_tokens.weight.shape[0])
        embeds = self.decoder.embed_tokens(input_ids)
        visuals = (
            ("image", self.config.image_token_id, pixel_values, image_grid_thw),
            ("video", self.config.video_token_id, pixel_values_videos, video_grid_thw),
        )
        given = []
        for kind, _, pixels, grid_thw in visuals:
            if pixels is not None and grid_thw is not None:
                given.append((pixels, grid_thw))
            elif pixels is not None or grid_thw is not None:
                raise ConfigError(f"{kind}s: pixel values and grids must be given together, one of them is missing")
        features = self._encode_in_step(given) if self.in_step else [self.encode_images(*visual) for visual in given]
        for kind, token, pixels, _ in visuals:
            embeds = self._scatter(embeds, input_ids, kind, token, None if pixels is None else features.pop(0))
        return sum(features, embeds)  # of what has no place

    def run_decoder(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) of embeddings (B, T, D) at positions (3, B, T); for inputs made by `embed`.

        collected: a list that receives the hidden states of all layers, see `ModelOutput`.
        """
        shape = tuple(embeds.shape[:2])
        check_layout(shape, attention_mask, cu_seqlens, None if state is None else state.length)
        if tuple(position_ids.shape) != (3, *shape):
            raise ConfigError(f"position_ids: shape {tuple(position_ids.shape)}; expected {(3, *shape)}")
        states = None if state is None else state.layers
        sequence = self.layer_sequence(embeds, position_ids, attention_mask, cu_seqlens)
        hidden = self.decoder(embeds, sequence, states, collected)
        if state is not None:
            tokens = row_lengths(embeds, attention_mask, cu_seqlens)
            state.advance(tokens, row_ends(position_ids, attention_mask, cu_seqlens))
        return hidden

    def layer_sequence(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Sequence:
        """What the layers share about embeddings (B, T, D) at positions (3, B, T), for who calls them one by one."""
        rotary = {
            dim: multimodal_rotary(position_ids, sections, self.config.rope_theta, embeds.dtype)
            for dim, sections in self._rotary_sections.items()
        }
        return Sequence(rotary, None if attention_mask is None else attention_mask != 0, cu_seqlens)

    def _encode_in_step(self, visuals: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Features of each by one call of the tower, if there is one; of none, a zero that hangs on all its weights."""
        if self.visual is None:
            return [self.encode_images(*visual) for visual in visuals]
        config, weight = self.visual.config, self.visual.patch_embed.proj.weight
        merge = config.spatial_merge_size
        if not visuals:
            grid_thw = torch.tensor([[1, merge, merge]], device=weight.device)
            return [0 * self.encode_images(weight.new_zeros(merge**2, config.patch_dim), grid_thw).sum()]
        pixels, grids = zip(*visuals, strict=True)
        found = self.encode_images(torch.cat(pixels), torch.cat(grids))
        return list(found.split([len(part) // merge**2 for part in pixels]))

    def _scatter(self, embeds: Tensor, input_ids: Tensor, kind: str, token: int, features: Tensor | None) -> Tensor:
        if features is None:
            # A compiled graph cannot look at the tokens; everywhere else a forgotten image is an error.
            if self.visual is not None and not torch.compiler.is_compiling():
                _check_count(kind, token, int((input_ids == token).sum()), 0)
            return embeds
        features = features.to(embeds.dtype)
        places = (input_ids.flatten() == token).nonzero().squeeze(1)
        _check_count(kind, token, len(places), len(features))
        return embeds.flatten(0, 1).index_copy(0, places, features).view_as(embeds)


def init_weights(module: nn.Module, std: float) -> None:
    """Fresh values for a module of any model, std from `ModelConfig.init_std`; for `nn.Module.apply`.

    Only what every model has in common: a mixer initialises its own special parameters.
    """
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def position_rules(config: ModelConfig, video_convention: str | None = None) -> PositionRules:
    """How a model of this configuration places visual tokens; None keeps the config's video convention."""
    return PositionRules(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=1 if config.vision is None else config.vision.spatial_merge_size,
        tokens_per_second=config.tokens_per_second,
        video_convention=config.video_convention if video_convention is None else video_convention,
    )


def sections_by_dim(mixers: Iterable[MixerConfig], config: ModelConfig) -> dict[int, tuple[int, ...]]:
    """How many frequencies turn with each axis (t, h, w), for every head size that turns; ConfigError if that fails."""
    dims = sorted({dim for mixer in mixers for dim in mixer.rotary_dims})
    if config.vision is None and config.rope_sections is None:
        return {dim: (dim // 2, 0, 0) for dim in dims}  # text alone: the three axes agree
    return {dim: rotary_sections(dim, config.rope_sections) for dim in dims}


def _check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ConfigError(f"input_ids: {kind}; expected a tensor of int64")
    check_layout(tuple(input_ids.shape), None, None, None)
    # Elsewhere, a look at the tokens would wait for the device; a compiled graph cannot look at all.
    if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
        least, most = (int(end) for end in input_ids.aminmax())
        if least < 0 or most >= vocab_size:
            raise ConfigError(f"input_ids: tokens from {least} to {most}; expected 0 to {vocab_size - 1}")


def _check_count(kind: str, token: int, found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(
            f"input_ids: {found} {kind} tokens (id {token}), but the {kind}s given make {wanted} features; "
            "expected as many tokens as features"
        )
