"""Whether a model and its data speak of the same tokens and the same patches."""

from __future__ import annotations

from hybridvl.data.module import ChatDataModule
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig

_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
}


def check_agreement(net: ModelConfig, data: ChatDataModule) -> None:
    """Raise ConfigError that names both places where the recipe says different things."""
    tokenizer = data.chat.tokenizer
    if len(tokenizer) > net.vocab_size:
        raise ConfigError(f"model.net.vocab_size: {net.vocab_size}; the tokenizer has {len(tokenizer)} tokens")
    vision = net.vision
    if vision is None:
        return
    for field, token in _TOKENS.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if getattr(net, field) != found:
            raise ConfigError(f"model.net.{field}: {getattr(net, field)}; the tokenizer's {token} is {found}")
    images = data.images.config
    pairs = {
        "patch_size": (images.patch_size, vision.patch_size),
        "temporal_patch_size": (images.temporal_patch_size, vision.temporal_patch_size),
        "merge_size": (images.merge_size, vision.spatial_merge_size),
    }
    for field, (cut, expected) in pairs.items():
        if cut != expected:
            theirs = "spatial_merge_size" if field == "merge_size" else field
            raise ConfigError(f"data.images.{field}: {cut}; model.net.vision.{theirs} is {expected}")
    videos = data.videos.config
    if videos.tokens_per_second != net.tokens_per_second:
        raise ConfigError(
            f"data.videos.tokens_per_second: {videos.tokens_per_second}; "
            f"model.net.tokens_per_second is {net.tokens_per_second}"
        )
    if videos.convention != net.video_convention:
        raise ConfigError(
            f"data.videos.convention: {videos.convention!r}; model.net.video_convention is {net.video_convention!r}"
        )
    if images.channels != vision.channels:
        raise ConfigError(
            f"data.images.mean: {images.channels} channels; model.net.vision.channels is {vision.channels}"
        )
