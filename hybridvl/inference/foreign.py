"""The processor files of Qwen2.5-VL's and InfiniteVL's folders: image and video settings, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridvl.checkpoints.files import parse_json, read_text
from hybridvl.data.chat import ChatFormat
from hybridvl.data.checks import is_finite, require_whole
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
# A template is a program, and may fail as programs do.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
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
    images, image_file = _section(folder, IMAGE_FILE, "image_processor")
    videos, video_file = _section(folder, VIDEO_FILE, "video_processor")
    shared, shared_file = (images, image_file) if images else (videos, video_file)
    sizes = {name: _given(shared, name, default) for name, default in _SIZES.items()}
    low, high = _limits(images, image_file)
    try:
        image_config = ImageConfig(
            **sizes,
            min_pixels=_IMAGE_LIMITS[0] if low is None else low,
            max_pixels=_IMAGE_LIMITS[1] if high is None else high,
            mean=_given(shared, "image_mean", CLIP_MEAN),
            std=_given(shared, "image_std", CLIP_STD),
        )
    except ConfigError as error:
        raise ConfigError(f"{shared_file}: {error}") from error
    _check(images, sizes, image_file)
    _check(videos, sizes, video_file)
    return image_config, _video_config(videos, image_config.factor, video_file)


def settings_files(images: ImageConfig, videos: VideoConfig) -> dict[str, dict[str, Any]]:
    """What the two files hold from which transformers makes the same image and video processors, by their names.

    Greyscale images have none: transformers' processors are for colours.
    """
    if images.channels != 3:
        return {}
    common = {
        **{name: getattr(images, name) for name in _SIZES},
        **{"image_mean": list(images.mean), "image_std": list(images.std), **_FIXED, "rescale_factor": 1 / 255},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    low, high = images.pixel_limits
    image_own = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": low, "max_pixels": high}
    low, high, total = videos.areas(images.factor)
    video_own = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": low, "longest_edge": high}}
    rates = {"fps": videos.fps} if videos.frames is None else {"num_frames": videos.frames}
    rates |= {"do_sample_frames": True, "min_frames": videos.min_frames, "max_frames": videos.max_frames}
    budget = {"cap_pixels_per_frame": True, "max_video_tokens": round(total / images.factor**2 / _TOKEN_SHARE)}
    return {IMAGE_FILE: {**image_own, **common}, VIDEO_FILE: {**video_own, **rates, **budget, **common}}


def use_template(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str | None:
    """The system turn that the folder's chat template adds, None when it adds none, ChatML's without a template.

    The template is kept in the tokenizer.

    Raises:
        ConfigError: the template writes anything but ChatML.
    """
    from jinja2 import TemplateError

    place = folder / "chat_template.jinja"
    if place.is_file():
        tokenizer.chat_template = read_text(place)
    elif (folder / "chat_template.json").is_file():
        place = folder / "chat_template.json"
        tokenizer.chat_template = parse_json(read_text(place), place).get("chat_template")
    template = tokenizer.chat_template
    if template is None:
        return ChatFormat(tokenizer).system
    if not isinstance(template, str | dict):
        raise ConfigError(f"{place}: chat_template: {template!r:.80}; expected a Jinja template")
    try:
        rendered = _render(tokenizer, _QUESTION)
        head, separator, rest = rendered.partition("<|im_end|>\n")
        opening = "<|im_start|>system\n"
        system = head.removeprefix(opening) if separator and head.startswith(opening) and rest else None
        # A text model's template cannot take parts.
        turns = _TURNS if any(word in str(template) for word in ("image", "vision_start")) else _QUESTION
        theirs, ours = _render(tokenizer, turns), ChatFormat(tokenizer, system).render(turns, generation_prompt=True)
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{place}: the chat template cannot be used: {reason:.200}; expected ChatML's") from error
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


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _section(folder: Path, name: str, key: str) -> tuple[dict[str, Any], Path]:
    """The settings of one kind and the file that holds them: one of their own, or a section of the common one."""
    path = folder / name
    if path.is_file():
        return parse_json(read_text(path), path), path
    path = folder / BOTH_FILE
    section = _given(parse_json(read_text(path), path), key, {}) if path.is_file() else {}
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {key}: {section!r:.80}; expected an object")
    return section, path


def _given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting; null counts as not written."""
    value = values.get(name)
    return default if value is None else value


def _check(values: Mapping[str, Any], sizes: Mapping[str, int], place: Path) -> None:
    """Raise ConfigError for a setting that the code here does not follow."""
    for name, accepted in {**_FIXED, **sizes}.items():
        value = _given(values, name, accepted)
        if type(value) is not type(accepted) or value != accepted:
            raise ConfigError(f"{place}: {name}: {value!r:.80}; expected {accepted!r}")
    factor = _given(values, "rescale_factor", 1 / 255)
    if not is_finite(factor) or abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{place}: rescale_factor: {factor!r:.80}; expected 1 / 255")


def _limits(values: Mapping[str, Any], place: Path) -> tuple[int | None, int | None]:
    """min_pixels and max_pixels, under any of the names they have had; None where the file has none."""
    size = _given(values, "size", {})
    if not isinstance(size, Mapping):
        raise ConfigError(f"{place}: size: {size!r:.80}; expected an object with shortest_edge and longest_edge")
    names = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    # As in transformers, where both are given the older name wins.
    found = [
        next((source[key] for source in (values, size) for key in pair if source.get(key) is not None), None)
        for pair in names
    ]
    return found[0], found[1]


def _video_config(values: Mapping[str, Any], factor: int, place: Path) -> VideoConfig:
    low, high = _limits(values, place)
    # The names are ours on the left, transformers' on the right.
    options = {
        name: values[key]
        for name, key in (
            *(("fps", "fps"), ("frames", "num_frames")),
            *(("min_frames", "min_frames"), ("max_frames", "max_frames")),
        )
        if values.get(key) is not None
    }
    try:
        tokens = values.get("max_video_tokens")
        if tokens is not None:
            require_whole("max_video_tokens", tokens)
        total = None if tokens is None else int(tokens * factor**2 * _TOKEN_SHARE)
        return VideoConfig(**options, min_pixels=low, max_pixels=high, total_pixels=total)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
