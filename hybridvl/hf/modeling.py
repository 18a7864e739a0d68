"""A hybridvl model as a transformers model: loading, saving, `generate`, the loss and the Trainer's switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from hybridvl.hf.cache import HybridVLCache
from hybridvl.hf.configuration import HybridVLConfig
from hybridvl.hf.visual_rows import repeat_visuals
from hybridvl.layers import ConfigError
from hybridvl.layers.ops.one_row import one_row_products
from hybridvl.models.generation import PREFILL_CHUNK
from hybridvl.models.positions import VisualGrids
from hybridvl.models.vlm import VisionLanguageModel


class HybridVLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Wraps a `VisionLanguageModel`, which stays reachable, and usable by itself, as `model.net`.

    Both hold the same modules under the same names: what `save_pretrained` writes is what `hybridvl.save` writes, and
    a module replaced in one (a resized embedding, a LoRA layer) is replaced in the other.

    Args:
        config: the configuration.
        net: the model to wrap, of that configuration; a freshly initialised one by default, in torch's default dtype.
    """

    config_class = HybridVLConfig
    net: VisionLanguageModel
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch
    _is_stateful = True  # transformers refuses assisted generation, which takes tokens back
    _supports_sdpa = True  # one of the backends that the attention mixers choose from, whatever is asked for here
    _supports_context_parallel = False
    _no_split_modules: set[str] | list[str] | None = ["Block", "VisionBlock"]  # noqa: RUF012

    def __init__(self, config: HybridVLConfig, net: VisionLanguageModel | None = None) -> None:
        super().__init__(config)
        net = _fresh(config) if net is None else net
        # Past nn.Module's bookkeeping: as a child, `net` would put a prefix before every name of a parameter.
        self.__dict__["net"] = net
        self._modules = net._modules
        for parameter in net.parameters():
            # On the meta device, transformers loads the parameters; everywhere else they have their values already.
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        self.gradient_checkpointing = net.config.activation_checkpointing
        self.post_init()

    @classmethod
    def wrap(cls, net: VisionLanguageModel) -> HybridVLForConditionalGeneration:
        """The same model, with the same parameters, for transformers; in the mode (train, eval) that `net` is in."""
        config = HybridVLConfig.from_model_config(net.config)
        config.dtype = net.lm_head_weight.dtype
        return cls(config, net).train(net.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridVLCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where labels are given; see `VisionLanguageModel` for the inputs.

        attention_mask: (B, T), or (B, seen + T) with a cache, of which the last T columns count. position_ids:
        (3, B, T); by default they follow from the grids, the mask and the cache. past_key_values: the
        cache of an earlier output, updated in place. inputs_embeds: (B, T, D) in place of input_ids; with pictures in
        them, position_ids too. labels: (B, T), -100 where there is nothing to predict; shifted here, packed segments
        apart. num_items_in_batch: by what the summed
        loss is divided; None takes the mean. use_cache: return a cache. logits_to_keep: how many of the last positions
        get logits (0 is all), or which positions. mm_token_type_ids: not needed, the tokens tell; taken because
        transformers' processors give it. Mistakes in the inputs are ConfigErrors.
        """
        if output_attentions:
            raise ConfigError(
                "output_attentions: True; expected False, for recurrent mixers have no attention matrices"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        visuals = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        cache = self._cache(past_key_values, use_cache, inputs_embeds if input_ids is None else input_ids)
        embeds, grids = self._embed(input_ids, inputs_embeds, *visuals, second_per_grid_ts, cache)
        mask = None if attention_mask is None else _new_columns(attention_mask, embeds, cache)
        if position_ids is None:
            if input_ids is None and not grids.empty:
                raise ConfigError("position_ids: None with inputs_embeds and grids; expected those of `rope_positions`")
            ids = embeds.new_zeros(embeds.shape[:2], dtype=torch.int64) if input_ids is None else input_ids
            state = None if cache is None else cache.state
            position_ids = self.net.next_positions(ids, grids, mask, cu_seqlens, state)
        collected: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self._decode(embeds, position_ids, mask, cu_seqlens, cache, collected)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.get_output_embeddings()  # called, not only its weight used: it may have become a LoRA layer
        hidden = hidden[:, kept]
        with one_row_products(hidden):
            logits = F.linear(hidden, self.net.lm_head_weight) if head is None else head(hidden)
        loss = None
        if labels is not None:
            targets = _targets(labels, logits, cu_seqlens)
            loss = self.loss_function(logits, targets, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if collected is None else tuple(collected),
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.net.decoder.embed_tokens

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the token embedding."""
        self.net.decoder.embed_tokens = value  # type: ignore[assignment]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> torch.nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`; `model.net` learns of it too."""
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.net.config = self.config.model_config()
        return embedding

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give the parameters that no checkpoint filled the values of a fresh model."""
        waiting = {
            name: parameter
            for name, parameter in self.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
        }
        if waiting:
            # A whole model, for only its construction knows how each mixer, third-party ones too, begins.
            fresh = dict(VisionLanguageModel(self.net.config).named_parameters())
            for name, parameter in waiting.items():
                parameter.copy_(fresh[name])

    def _cache(
        self, given: HybridVLCache | None, use_cache: bool | None, inputs: Tensor | None
    ) -> HybridVLCache | None:
        if given is not None and not isinstance(given, HybridVLCache):
            raise ConfigError(
                f"past_key_values: a {type(given).__name__}; expected the cache of an earlier output of this model"
            )
        if given is not None or not use_cache or inputs is None:
            return given
        return HybridVLCache(self.net.init_state(inputs.shape[0]))

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        pixel_values_videos: Tensor | None,
        video_grid_thw: Tensor | None,
        second_per_grid_ts: Tensor | None,
        cache: HybridVLCache | None,
    ) -> tuple[Tensor, VisualGrids]:
        """Embeddings of the inputs, and the grids that their positions depend on."""
        pixels = pixel_values is not None or pixel_values_videos is not None
        grids = VisualGrids(image_grid_thw, video_grid_thw, second_per_grid_ts)
        if inputs_embeds is not None:
            if input_ids is not None or pixels:
                raise ConfigError("inputs_embeds: given with input_ids or pixel values; expected only one of them")
            return inputs_embeds, grids
        if input_ids is None:
            raise ConfigError("input_ids: None; expected tokens, or inputs_embeds")
        if cache is not None and cache.seen and not pixels and input_ids.shape[1] == 1:
            # A step of `generate`, which may pass on the grids of the prompt. As in `decode_step`, a generated visual
            # token is a token like any other: no image belongs to it.
            return self.net.decoder.embed_tokens(input_ids), VisualGrids()
        return self.net.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw), grids

    def _decode(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: HybridVLCache | None,
        collected: list[Tensor] | None,
    ) -> Tensor:
        """Hidden states (B, T, D); the cache, if there is one, has seen the tokens afterwards."""
        state, length = None if cache is None else cache.state, embeds.shape[1]
        # Prompts go in pieces, as in `VisionLanguageModel.generate`, unless a backward pass or the layers' outputs are
        # wanted of the whole.
        whole = cache is None or cu_seqlens is not None or collected is not None or torch.is_grad_enabled()
        chunk = max(length, 1) if whole else PREFILL_CHUNK
        pieces = []
        for begin in range(0, max(length, 1), chunk):
            part = slice(begin, begin + chunk)
            here = None if mask is None else mask[:, part]
            pieces.append(
                self.net.run_decoder(embeds[:, part], position_ids[..., part], here, cu_seqlens, state, collected)
            )
        if cache is not None:
            cache.seen += length
        return torch.cat(pieces, dim=1)

    def _expand_inputs_for_generation(  # type: ignore[override] # the keywords are spelled out
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        past_key_values: HybridVLCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Every row expand_size times, for beams and several answers; images and videos go along with their rows."""
        if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[:, -1:].all()):
            # `generate` goes on from the last column of every row.
            raise ConfigError("attention_mask: a row of `generate` ends in padding; expected padding on the left")
        rows = {
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "mm_token_type_ids": mm_token_type_ids,
        }
        others = {
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        visuals = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
        }
        if expand_size > 1 and input_ids is not None:
            visuals = repeat_visuals(self.net.config, input_ids, visuals, expand_size)
            rows = {name: None if t is None else t.repeat_interleave(expand_size, 0) for name, t in rows.items()}
            input_ids = input_ids.repeat_interleave(expand_size, 0)
            position_ids = None if position_ids is None else position_ids.repeat_interleave(expand_size, 1)
        inputs = {**rows, **visuals, **others, "position_ids": position_ids}
        return input_ids, {name: value for name, value in inputs.items() if value is not None}

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> CausalLMOutputWithPast:
        """The first step of `generate`, which takes from the prompt what the cache has not seen."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        # `generate` drops a mask of ones and keeps its length.
        length = getattr(generation_config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        length = length if embeds is None else embeds.shape[1]
        if cache is not None and 0 < length <= (seen := cache.get_seq_length()):
            raise ConfigError(
                f"past_key_values: has seen {seen} tokens a row, the prompt with its attention_mask has {length}; "
                "expected those and at least one more"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc, arg-type]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` then makes no cache: `forward` makes ours in the first step, `generate` passes it on.
        return False

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        # What `generate` would make suits text alone. Ours follow from the grids, the mask and the state, in `forward`.
        return None

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Turn our own checkpointing of layers on or off; how it recomputes is not a choice."""
        if every_n_layers != 1:
            raise ConfigError(f"every_n_layers: {every_n_layers}; expected 1, every layer is recomputed")
        self.gradient_checkpointing = enable
        for part in (self.net.decoder, self.net.visual):
            if part is not None:
                part.activation_checkpointing = enable


def _fresh(config: HybridVLConfig) -> VisionLanguageModel:
    """A freshly initialised model in torch's default dtype, but for the parameters that mixers keep in float32."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        net = VisionLanguageModel(config.model_config())
    finally:
        torch.set_default_dtype(dtype)
    return net.to(dtype)


def _targets(labels: Tensor, logits: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Labels (B, T) without those that no token of their segment comes before."""
    if labels.shape != logits.shape[:2]:
        raise ConfigError(
            f"labels: shape {tuple(labels.shape)}; expected {tuple(logits.shape[:2])}, one for each token that gets "
            "logits (logits_to_keep: 0)"
        )
    if cu_seqlens is None:
        return labels
    begins = cu_seqlens[:-1].long()
    return labels.index_fill(1, begins[begins < labels.shape[1]], -100)  # an empty segment may begin at the end


def _new_columns(mask: Tensor, embeds: Tensor, cache: HybridVLCache | None) -> Tensor | None:
    """The part (B, T) of a mask that belongs to the new tokens; None for one new token that is real in every row."""
    seen = 0 if cache is None else cache.seen
    rows, length = embeds.shape[:2]
    if tuple(mask.shape) not in {(rows, length), (rows, seen + length)}:
        raise ConfigError(
            f"attention_mask: shape {tuple(mask.shape)}; expected {(rows, length)}, the new tokens alone, or "
            f"{(rows, seen + length)}, with those that the cache has seen"
        )
    mask = mask[:, mask.shape[1] - length :]
    return None if length == 1 and bool(mask.all()) else mask
