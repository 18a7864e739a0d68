"""The processor files of Qwen2.5-VL's and InfiniteVL's folders: image and video settings, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import CLIP_MEAN, CLIP_STD, ImageConfig
from hybridvl.data.video import VideoConfig
from hybridvl.layers.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
BOTH_FILE = "processor_config.json"

# What the code here always does; a folder that asks for anything else is refused. 3 is PIL's bicubic filter.
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
_SIZES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_TOKEN_SHARE = 0.9  # of `max_video_tokens` that a video may fill
_IMAGE_LIMITS = (3_136, 1_003_520)  # of the image processor's class, where the file names none

_QUESTION = [{"role": "user", "content": "Q"}]
_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image", "image": ""}, {"type": "text", "text": "Q"}]},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": [{"type": "video", "video": ""}, {"type": "text", "text": "R"}]},
]


def has_settings(folder: Path) -> bool:
    """Whether a folder has the files of a transformers processor."""
    return any((folder / name).is_file() for name in (IMAGE_FILE, VIDEO_FILE, BOTH_FILE))


def read_settings(folder: Path) -> tuple[ImageConfig, VideoConfig]:
    """Image and video settings of a transformers processor's folder.

    A folder that says nothing of videos gets the limits with which Qwen2.5-VL is used (those of qwen-vl-utils).

    Raises:
        ConfigError: naming the file and the setting that is damaged or not supported.
    """
    both = _read(folder / BOTH_FILE)
    image_file = folder / (IMAGE_FILE if (folder / IMAGE_FILE).is_file() else BOTH_FILE)
    video_file = folder / (VIDEO_FILE if (folder / VIDEO_FILE).is_file() else BOTH_FILE)
    images = _read(folder / IMAGE_FILE) or both.get("image_processor") or {}
    videos = _read(folder / VIDEO_FILE) or both.get("video_processor") or {}
    sizes = {name: _integer(images or videos, name, default, image_file) for name, default in _SIZES.items()}
    _check(images, sizes, image_file)
    _check(videos, sizes, video_file)
    low, high = _limits(images, image_file)
    try:
        image_config = ImageConfig(
            **sizes,
            min_pixels=_IMAGE_LIMITS[0] if low is None else low,
            max_pixels=_IMAGE_LIMITS[1] if high is None else high,
            mean=tuple((images or videos).get("image_mean", CLIP_MEAN)),
            std=tuple((images or videos).get("image_std", CLIP_STD)),
        )
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{image_file}: {error}") from error
    return image_config, _video_config(videos, image_config.factor, video_file)


def write_settings(folder: Path, images: ImageConfig, videos: VideoConfig) -> None:
    """Write the two files from which transformers makes the same image and video processors.

    Greyscale images have none: transformers' processors are for colours.
    """
    if images.channels != 3:
        return
    common = {
        **{name: getattr(images, name) for name in _SIZES},
        **{"image_mean": list(images.mean), "image_std": list(images.std), **_FIXED, "rescale_factor": 1 / 255},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    low, high = images.pixel_limits
    own = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": low, "max_pixels": high}
    _write(folder / IMAGE_FILE, {**own, **common})
    low, high, total = videos.areas(images.factor)
    own = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": low, "longest_edge": high}}
    rates = {"fps": videos.fps} if videos.frames is None else {"num_frames": videos.frames}
    rates |= {"do_sample_frames": True, "min_frames": videos.min_frames, "max_frames": videos.max_frames}
    budget = {"cap_pixels_per_frame": True, "max_video_tokens": round(total / images.factor**2 / _TOKEN_SHARE)}
    _write(folder / VIDEO_FILE, {**own, **rates, **budget, **common})


def use_template(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str | None:
    """The system turn that the folder's chat template adds, None when it adds none, ChatML's without a template.

    The template is kept in the tokenizer.

    Raises:
        ConfigError: the template writes anything but ChatML.
    """
    from jinja2 import TemplateError

    place = folder / "chat_template.jinja"
    if place.is_file():
        tokenizer.chat_template = place.read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        place = folder / "chat_template.json"
        tokenizer.chat_template = _read(place).get("chat_template")
    template = tokenizer.chat_template
    if template is None:
        return ChatFormat(tokenizer).system
    try:
        rendered = _render(tokenizer, _QUESTION)
        head, separator, rest = rendered.partition("<|im_end|>\n")
        opening = "<|im_start|>system\n"
        system = head.removeprefix(opening) if separator and head.startswith(opening) and rest else None
        # A text model's template cannot take parts.
        turns = _TURNS if any(word in str(template) for word in ("image", "vision_start")) else _QUESTION
        theirs, ours = _render(tokenizer, turns), ChatFormat(tokenizer, system).render(turns, generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"{place}: the chat template cannot be used: {error}") from error
    if theirs != ours:
        raise ConfigError(f"{place}: the chat template writes {theirs!r}; expected ChatML: {ours!r}")
    return system


def chat_template(system: str | None) -> str:
    """ChatML with images and videos as a Jinja template, with the system turn of messages that have none."""
    opening = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    opening = json.dumps(opening, ensure_ascii=False)  # a string of Jinja's, too
    return (
        "{%- for message in messages %}"
        "{%- if loop.first and message.role != 'system' %}{{ " + opening + " }}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.content is string %}{{ message.content }}"
        "{%- else %}{%- for part in message.content %}"
        "{%- if part.type == 'text' %}{{ part.text }}"
        "{%- else %}{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{%- endif %}"
        "{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {type(values).__name__}; expected an object")
    return values


def _check(values: Mapping[str, Any], sizes: Mapping[str, int], place: Path) -> None:
    """Raise ConfigError for a setting that the code here does not follow."""
    for name, value in {**_FIXED, **sizes}.items():
        if values.get(name) not in (None, value):
            raise ConfigError(f"{place}: {name}: {values[name]!r}; expected {value!r}")
    factor = values.get("rescale_factor")
    if factor is not None and abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{place}: rescale_factor: {factor}; expected 1 / 255")


def _limits(values: Mapping[str, Any], place: Path) -> tuple[int | None, int | None]:
    """min_pixels and max_pixels, under any of the names they have had; None where the file has none."""
    size = values.get("size") or {}
    if not isinstance(size, Mapping):
        raise ConfigError(f"{place}: size: {size!r}; expected an object with shortest_edge and longest_edge")
    names = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    # As in transformers, where both are given the older name wins.
    found = [
        next((source[key] for source in (values, size) for key in pair if source.get(key) is not None), None)
        for pair in names
    ]
    return found[0], found[1]


def _video_config(values: Mapping[str, Any], factor: int, place: Path) -> VideoConfig:
    low, high = _limits(values, place)
    options = {
        name: values[key]
        for name, key in (("fps", "fps"), ("frames", "num_frames"), ("min_frames", "min_frames"))
        if values.get(key) is not None
    }
    try:
        longest = values.get("max_frames") or VideoConfig.max_frames
        tokens = values.get("max_video_tokens")
        total = None if tokens is None else int(tokens * factor**2 * _TOKEN_SHARE)
        return VideoConfig(**options, max_frames=longest, min_pixels=low, max_pixels=high, total_pixels=total)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{place}: {error}") from error


def _integer(values: Mapping[str, Any], name: str, default: int, place: Path) -> int:
    value = values.get(name, default)
    if not isinstance(value, int):
        raise ConfigError(f"{place}: {name}: {value!r}; expected a whole number")
    return value
