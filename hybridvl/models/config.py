"""What a vision-language model is made of: the frozen configuration of the vision tower and of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridvl.layers.errors import ConfigError, within

VIDEO_CONVENTIONS = ("v457", "v523")
MAX_SIZE = 2**24  # of a width, a vocabulary, a row of pixels: larger than any model's, and two of them number a tensor
MAX_BLOCKS = 4096  # of the vision tower: as many as a pattern may have layers


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The Qwen2.5-VL vision tower; the defaults are the published 3B model's.

    Attributes:
        depth: transformer blocks.
        width: model width of the tower D.
        heads: attention heads H; width / heads must be a multiple of 4 (2-D rotary).
        mlp_width: hidden width of the SwiGLU (with biases).
        patch_size: pixels per patch side.
        temporal_patch_size: frames per patch; a still image is its frame repeated.
        spatial_merge_size: patches per side that the merger joins into one token.
        window_size: pixels per side of an attention window, a multiple of patch_size * spatial_merge_size.
        full_attention_blocks: blocks that attend within the whole frame instead of within a window.
        channels: colour channels.
        norm_eps: epsilon of the RMS norms.
        rope_theta: base of the 2-D rotary frequencies.
    """

    depth: int = 32
    width: int = 1280
    heads: int = 16
    mlp_width: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    channels: int = 3
    norm_eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        _set_tuple(self, "full_attention_blocks", "vision.full_attention_blocks")
        _require_int("vision.depth", self.depth, minimum=1, maximum=MAX_BLOCKS)
        for name in (
            *("width", "heads", "mlp_width", "patch_size", "temporal_patch_size"),
            *("spatial_merge_size", "window_size", "channels"),
        ):
            _require_int(f"vision.{name}", getattr(self, name), minimum=1)
        _set_positive(self, "norm_eps", "vision.norm_eps")
        _set_positive(self, "rope_theta", "vision.rope_theta")
        _require_int("vision.channels * temporal_patch_size * patch_size ** 2", self.patch_dim, minimum=1)
        _require_int("vision.width * spatial_merge_size ** 2", self.width * self.spatial_merge_size**2, minimum=1)
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ConfigError(
                f"vision.heads: {self.heads} heads for width {self.width}; width / heads must be a multiple of 4"
            )
        if self.window_size % self.merged_patch_size:
            raise ConfigError(
                f"vision.window_size: {self.window_size}; expected a multiple of patch_size * spatial_merge_size "
                f"= {self.merged_patch_size}"
            )
        for block in self.full_attention_blocks:
            _require_int("vision.full_attention_blocks", block, minimum=0)
            if block >= self.depth:
                raise ConfigError(
                    f"vision.full_attention_blocks: {list(self.full_attention_blocks)}; expected block numbers "
                    f"from 0 to {self.depth - 1} for vision.depth {self.depth}"
                )

    @property
    def head_dim(self) -> int:
        """Key dim per head K."""
        return self.width // self.heads

    @property
    def merged_patch_size(self) -> int:
        """Pixels per side that become one token of the language model; image sides must be multiples of it."""
        return self.patch_size * self.spatial_merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one row of pixel_values: channels * frames * patch_size ** 2."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of mixers, with or without a vision tower; the defaults are InfiniteVL-4B's decoder.

    Attributes:
        pattern: layer pattern, for example "(swa gdn*3)*9".
        mixers: named mixers and overrides of registered ones: {"swa": {"window": 4096}}.
        width: model width D.
        mlp_width: hidden width of each layer's SwiGLU; 0 builds layers of a mixer alone, as in Mamba2 models.
        vocab_size: rows of the embedding.
        tie_embeddings: use the embedding as the output head.
        norm_eps: epsilon of the layers' RMS norms (mixers have their own).
        rope_theta: base of the rotary frequencies.
        rope_sections: how many of the head_dim / 2 frequencies turn with (t, h, w); None splits 1/4, 3/8, 3/8.
        vision: the vision tower; None for a text model.
        image_token_id, video_token_id: tokens whose embeddings are replaced by visual features.
        vision_start_token_id: token that opens an image or a video in the chat format.
        tokens_per_second: temporal positions per second of video.
        video_convention: "v457" (whole seconds, text goes on at max + 1; InfiniteVL) or "v523" (fractions of a
            second, text goes on at start + max(h, w)).
        init_std: standard deviation of fresh linear and embedding weights.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    pattern: str = "(swa gdn*3)*9"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    width: int = 2048
    mlp_width: int = 11008
    vocab_size: int = 151936
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_sections: tuple[int, int, int] | None = None
    vision: VisionConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    tokens_per_second: float = 2.0
    video_convention: str = "v457"
    init_std: float = 0.02
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require_int("width", self.width, minimum=1)
        _require_int("mlp_width", self.mlp_width, minimum=0)
        _require_int("vocab_size", self.vocab_size, minimum=1)
        for name in ("norm_eps", "rope_theta", "tokens_per_second", "init_std"):
            _set_positive(self, name, name)
        for name in ("tie_embeddings", "activation_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {getattr(self, name)!r}; expected true or false")
        if not isinstance(self.pattern, str):
            raise ConfigError(f"pattern: {self.pattern!r}; expected text such as '(swa gdn*3)*9'")
        if not isinstance(self.mixers, Mapping):
            raise ConfigError(f"mixers: {self.mixers!r}; expected a mapping of names to options")
        if self.video_convention not in VIDEO_CONVENTIONS:
            raise ConfigError(f"video_convention: {self.video_convention!r}; expected one of {VIDEO_CONVENTIONS}")
        if self.rope_sections is not None:
            _set_tuple(self, "rope_sections", "rope_sections")
            if len(self.rope_sections) != 3:
                raise ConfigError(f"rope_sections: {list(self.rope_sections)}; expected three numbers for (t, h, w)")
            for section in self.rope_sections:
                _require_int("rope_sections", section, minimum=0)
        if self.vision is not None:
            if not isinstance(self.vision, VisionConfig):
                raise ConfigError(f"vision: {self.vision!r}; expected a VisionConfig or null")
            self._check_vision_tokens()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json; `from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str = "") -> ModelConfig:
        """The configuration from plain values; ConfigErrors, for unknown keys too, begin with `place`."""
        with within(place):
            _refuse_unknown(cls, values)
            values = dict(values)
            if values.get("vision") is not None:
                with within("vision"):
                    _refuse_unknown(VisionConfig, values["vision"])
                values["vision"] = VisionConfig(**values["vision"])
            return cls(**values)

    def _check_vision_tokens(self) -> None:
        _require_int("vision_start_token_id", self.vision_start_token_id, minimum=0)
        for name in ("image_token_id", "video_token_id"):
            token = getattr(self, name)
            _require_int(name, token, minimum=0)
            if token >= self.vocab_size:
                raise ConfigError(f"{name}: {token}; expected a token below vocab_size {self.vocab_size}")
        if self.image_token_id == self.video_token_id:
            raise ConfigError(f"image_token_id and video_token_id: both {self.image_token_id}; expected two tokens")


def _refuse_unknown(cls: type, values: object) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{values!r}; expected a mapping of options")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise ConfigError(f"unknown key {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}")


def _require_int(name: str, value: object, minimum: int, maximum: int = MAX_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}: {value!r}; expected a whole number of at least {minimum}")
    if value > maximum:
        shown = value if value < 10**40 else "a number of more than 40 digits"
        raise ConfigError(f"{name}: {shown}; expected a whole number of at most {maximum}")


def _set_positive(config: object, name: str, place: str) -> None:
    """Check a number above 0 and keep it as a float, whatever whole number stands in the file."""
    value = getattr(config, name)
    try:
        found = None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = None
    if found is None or not 0 < found < float("inf"):
        raise ConfigError(f"{place}: {value!r}; expected a finite number above 0")
    object.__setattr__(config, name, found)


def _set_tuple(config: object, name: str, place: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{place}: {value!r}; expected a list of whole numbers")
    object.__setattr__(config, name, tuple(value))
