"""transformers' Qwen2.5-VL, text model and vision tower, with the weights and the cached keys and values of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hybridvl.bench.plain import modeling
from hybridvl.layers.cache import KeyValueState
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.positions import rotary_sections
from hybridvl.models.vision import VisionTower
from hybridvl.models.vlm import VisionLanguageModel

_NAMES = {"mixer_norm.": "input_layernorm.", "mixer.": "self_attn.", "mlp_norm.": "post_attention_layernorm."}


class Qwen25TextPeer:
    """The text model and its output head; its weights are our model's own memory."""

    def __init__(self, model: VisionLanguageModel) -> None:
        module = modeling("qwen2_5_vl")
        config = module.Qwen2_5_VLTextConfig(**_values(model))
        config._attn_implementation = "sdpa"
        self._head = model.lm_head_weight
        self.text: nn.Module = module.Qwen2_5_VLTextModel(config).eval()
        ours = {
            name.removeprefix("decoder."): value.detach()
            for name, value in model.named_parameters()
            if name.startswith("decoder.")
        }
        self.text.load_state_dict({_their_name(name): value for name, value in ours.items()}, assign=True)
        self.text.to(model.lm_head_weight.device)
        self._config = config

    def empty_cache(self) -> Any:
        """A cache without tokens."""
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def cache(self, state: ModelState, context: int) -> Any:
        """A cache with the keys and values of our state, which has seen `context` tokens."""
        cache = self.empty_cache()
        for index, layer in enumerate(state.layers):
            assert isinstance(layer, KeyValueState)
            cache.update(*(x[:, :context].transpose(1, 2).contiguous() for x in (layer.k, layer.v)), index)
        return cache

    def cache_bytes(self, context: int) -> int:
        """Bytes of a cache of so many tokens."""
        config = self._config
        heads = config.num_hidden_layers * config.num_key_value_heads
        return 2 * heads * config.head_dim * context * self._head.itemsize

    def rewinder(self, cache: Any) -> Callable[[], None]:
        """What brings a cache back to the tokens that it has now."""
        context = cache.get_seq_length()

        def rewind() -> None:
            if further := cache.get_seq_length() - context:
                cache.crop(-further)

        return rewind

    def logits(self, input_ids: Tensor, cache: Any) -> Tensor:
        """(B, 1, vocab) after the last of the tokens (B, T), which go on from the cache."""
        hidden = self.text(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        return F.linear(hidden[:, -1:], self._head)

    def hidden(self, embeds: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Hidden states (B, T, D), after the final norm, of embeddings (B, T, D) at positions (3, B, T), which go on
        from the cache."""
        found: Tensor = self.text(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return found


class Qwen25VisionPeer:
    """The vision tower; its weights are our tower's own memory."""

    def __init__(self, tower: VisionTower) -> None:
        module, config = modeling("qwen2_5_vl"), tower.config
        theirs = module.Qwen2_5_VLVisionConfig(
            depth=config.depth,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_heads=config.heads,
            in_channels=config.channels,
            patch_size=config.patch_size,
            spatial_merge_size=config.spatial_merge_size,
            temporal_patch_size=config.temporal_patch_size,
            window_size=config.window_size,
            out_hidden_size=tower.out_width,
            fullatt_block_indexes=config.full_attention_blocks,
        )
        theirs._attn_implementation = "sdpa"
        weight = tower.patch_embed.proj.weight
        self.tower: nn.Module = module.Qwen2_5_VisionTransformerPretrainedModel(theirs).eval()
        self.tower.load_state_dict({name: value.detach() for name, value in tower.named_parameters()}, assign=True)
        self.tower.to(weight.device)

    def features(self, rows: Tensor, grid_thw: Tensor) -> Tensor:
        """Features (tokens, D) of patches (P, patch_dim) of grids (n, 3)."""
        found: Tensor = self.tower(rows, grid_thw=grid_thw).pooler_output
        return found


def _their_name(name: str) -> str:
    for ours, theirs in _NAMES.items():
        head, found, tail = name.partition(f".{ours}")
        if found:
            return f"{head}.{theirs}{tail}"
    return name


def _values(model: VisionLanguageModel) -> dict[str, Any]:
    config, kinds = model.config, set(model.mixer_configs)
    (first, *others) = kinds
    plain = isinstance(first, FullAttentionConfig) and not others
    if not plain or not (first.qkv_bias and first.rope) or first.qk_norm or first.out_bias or config.mlp_width == 0:  # type: ignore[attr-defined]
        raise ConfigError(
            f"peer qwen2.5-vl: {model.pattern}; expected full attention of Qwen2.5-VL's kind and an MLP in every layer"
        )
    assert isinstance(first, FullAttentionConfig)
    sections = rotary_sections(first.head_dim, config.rope_sections)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": len(model.mixer_configs),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "rms_norm_eps": config.norm_eps,
        "use_sliding_window": False,
        "max_position_embeddings": 1 << 20,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(sections),
        },
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }
