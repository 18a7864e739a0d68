"""Tests of hybridvl.inference.processor: prompts, batches, our folders, and those of Qwen2.5-VL and InfiniteVL."""

import json
import re

import pytest
import torch
from PIL import Image

from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.inference.processor import Processor
from hybridvl.layers import ConfigError

PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}SYSTEM{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}"
    "{{ '<|vision_start|><|' + p['type'] + '_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_TURN = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
RED, WIDE = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (112, 56), "blue")
CLIP = [Image.new("RGB", (64, 48), (number, 0, 0)) for number in range(5)]


def user(*parts):
    kinds = {str: "text", list: "video"}
    return {"role": "user", "content": [{"type": (k := kinds.get(type(p), "image")), k: p} for p in parts]}


@pytest.fixture
def folder(tmp_path):
    """A folder as Qwen2.5-VL's, with the built-in tokenizer."""
    load_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path


@pytest.fixture
def small():
    images = ImageProcessor(ImageConfig(min_pixels=784, max_pixels=10000))
    return Processor(ChatFormat(load_tokenizer()), images, VideoProcessor(images, VideoConfig(min_pixels=784)))


def test_a_prompt_holds_what_the_model_takes(small):
    inputs = small.prompt([user(RED, CLIP, WIDE, "Which?")])
    ids = inputs["input_ids"][0].tolist()
    assert small.chat.render([user(RED, CLIP, WIDE, "Which?")], [4, 8], [12], generation_prompt=True) == (
        small.chat.tokenizer.decode(ids)
    )
    assert (ids.count(6), ids.count(7)) == (4 + 8, 12)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert inputs["second_per_grid_ts"].tolist() == [1.0]
    assert inputs["pixel_values"].shape == (16 + 32, 1176)
    assert inputs["pixel_values_videos"].shape == (48, 1176)
    assert {name: value.dtype for name, value in inputs.items()} == {
        "input_ids": torch.int64,
        "pixel_values": torch.float32,
        "image_grid_thw": torch.int64,
        "pixel_values_videos": torch.float32,
        "video_grid_thw": torch.int64,
        "second_per_grid_ts": torch.float32,
    }
    assert set(small.prompt([{"role": "user", "content": "hi"}])) == {"input_ids"}


def test_a_batch_is_the_prompts_padded_on_the_left(small):
    conversations = [
        [user(RED, "Which color?")],
        [{"role": "user", "content": "hi"}],
        [user(CLIP, "?"), {"role": "assistant", "content": "red"}, user(WIDE, CLIP, "And now?")],
    ]
    batch, prompts = small.batch(conversations), [small.prompt(messages) for messages in conversations]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)
    for row, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        assert batch["attention_mask"][row].tolist() == [False] * (longest - length) + [True] * length
        assert torch.equal(batch["input_ids"][row, longest - length :], prompt["input_ids"][0])
        assert (batch["input_ids"][row, : longest - length] == small.chat.pad_token_id).all()
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(batch[name], torch.cat([prompt[name] for prompt in prompts if name in prompt]))
    assert set(small.batch([conversations[1]])) == {"input_ids", "attention_mask"}
    with pytest.raises(ConfigError, match="no conversations"):
        small.batch([])
    with pytest.raises(ConfigError, match=r"messages\[1\]\[0\]\.content\[0\]: image gone\.png cannot be read"):
        small.batch([conversations[0], [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, 'image part without a value; expected {"type": "image", "image": ...}'),
        ({"type": "image", "image": None}, "image part without a value"),
        ({"type": "video", "fps": 3}, 'video part without a value; expected {"type": "video", "video": ...}'),
        ({"type": "image_url", "image_url": "a.png"}, "{'type': 'image_url', 'image_url': 'a.png'}; expected"),
        ({"type": "image", "image": 5}, "int; expected a PIL image, an array, a file or its bytes"),
        ({"type": "image", "image": RED, "fps": 3}, "option 'fps'; expected one of min_pixels, max_pixels"),
        ({"type": "video", "video": CLIP, "speed": 3}, "option 'speed'; expected one of fps"),
        ({"type": "video", "video": CLIP, "fps": 0}, "videos.fps: 0; expected a number from 1e-6"),
        ({"type": "video", "video": 5}, "int; expected a video's file, its bytes or a list of frames"),
        ({"type": "video", "video": [RED, 5]}, "frame 1: int; expected a PIL image"),
    ],
)
def test_mistakes_in_a_part_are_named(small, part, message):
    question = {"role": "user", "content": [{"type": "text", "text": "a"}, part]}
    with pytest.raises(ConfigError, match=r"messages\[1\]\.content\[1\]:? ?" + re.escape(message)):
        small.prompt([{"role": "system", "content": "Be brief."}, question])


@pytest.mark.parametrize("conversations", [None, 5, [None], ["x"], [{"role": "user", "content": "x"}], {}])
def test_mistakes_in_a_batch_are_named(small, conversations):
    with pytest.raises(ConfigError, match=r"messages(\[0\])?: .*expected (a list of messages|at least one)"):
        small.batch(conversations)


def test_limits_of_one_part(small):
    large = Image.new("RGB", (280, 280))
    parts = [{"type": "image", "image": large, "max_pixels": 3136}, {"type": "image", "image": large}]
    clip = {"type": "video", "video": CLIP, "min_pixels": 10000, "max_pixels": 20000}
    inputs = small.prompt([{"role": "user", "content": [*parts, clip]}])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 6, 6]]
    assert inputs["video_grid_thw"].tolist() == [[3, 8, 10]]


def test_what_was_saved_is_loaded(small, tmp_path):
    small.save(tmp_path)
    again = Processor.load(tmp_path)
    assert again.images.config == small.images.config
    assert again.videos.config == small.videos.config
    assert again.chat.system == small.chat.system
    settings = json.loads((tmp_path / "hybridvl_processor.json").read_text())
    del settings["videos"]  # as older folders have it
    (tmp_path / "hybridvl_processor.json").write_text(json.dumps(settings))
    assert Processor.load(tmp_path).videos.config == VideoConfig()


@pytest.mark.parametrize("system", [None, "Say \"yes\" or 'no'.\nNothing {{ else }} \U0001f3a5é."])
def test_transformers_makes_the_same_of_a_saved_folder(tmp_path, system):
    from transformers import AutoImageProcessor, AutoTokenizer

    images = ImageProcessor(ImageConfig(16, 2, 2, 784, 10000, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1)))
    videos = VideoProcessor(images, VideoConfig(fps=1, min_pixels=1024, max_frames=9, total_pixels=921600))
    Processor(ChatFormat(load_tokenizer(), system), images, videos).save(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(WIDE, return_tensors="pt")
    rows, grid = images(WIDE)
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(rows, theirs["pixel_values"], rtol=0, atol=1e-5)
    messages = [user("a", RED, CLIP, "b"), {"role": "assistant", "content": "c"}, user("d")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for turns in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert rendered == ChatFormat(load_tokenizer(), system).render(turns, generation_prompt=True)
    (tmp_path / "hybridvl_processor.json").unlink()
    again = Processor.load(tmp_path)
    assert again.images.config == images.config
    assert again.videos.config == VideoConfig(
        fps=1, min_pixels=1024, max_pixels=768 * 32**2, max_frames=9, total_pixels=921600
    )
    assert again.chat.system == system


def test_a_published_folder(folder):
    processor = Processor.load(folder)
    assert processor.images.config == ImageConfig(min_pixels=3136, max_pixels=12845056)
    assert processor.videos.config == VideoConfig()
    assert processor.chat.system == "You are a helpful assistant."
    assert processor.prompt([user(RED, "?")])["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_settings_under_their_newer_names(folder):
    both = {
        "image_processor": {
            **{name: PUBLISHED[name] for name in ("patch_size", "temporal_patch_size", "merge_size")},
            "size": {"shortest_edge": 1000, "longest_edge": 50000},
            "rescale_factor": 0.00392156862745098,
            "resample": 3,
        },
        "video_processor": {"size": {"shortest_edge": 2000, "longest_edge": 60000}, "fps": 1, "max_frames": 64},
    }
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(both))
    processor = Processor.load(folder)
    assert processor.images.config.pixel_limits == (1000, 50000)
    assert processor.videos.config == VideoConfig(fps=1, max_frames=64, min_pixels=2000, max_pixels=60000)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"max_pixels": 70000, "patch_size": 14}))
    assert Processor.load(folder).videos.config == VideoConfig(max_pixels=70000)


def test_files_that_transformers_writes(folder, tmp_path_factory):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil(min_pixels=1000, max_pixels=20000, patch_size=16).save_pretrained(folder)
    config = Processor.load(folder).images.config
    assert (config.pixel_limits, config.patch_size) == ((1000, 20000), 16)


@pytest.mark.parametrize("where", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("default", [True, False])
def test_chat_templates_are_followed(folder, where, default):
    template = CHATML.replace("SYSTEM", DEFAULT_TURN if default else "")
    if where.endswith("jinja"):
        (folder / where).write_text(template)
    else:
        values = json.loads((folder / where).read_text()) if (folder / where).exists() else {}
        (folder / where).write_text(json.dumps({**values, "chat_template": template}))
    processor = Processor.load(folder)
    assert processor.chat.system == ("You are a helpful assistant." if default else None)
    messages = [user("a", RED, CLIP, "b"), {"role": "assistant", "content": "c"}, user("d")]
    rendered = processor.chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.chat.render(messages, generation_prompt=True) == rendered


@pytest.mark.parametrize("template", [CHATML.replace("SYSTEM", "").replace("_pad", ""), "{{ messages", "plain"])
def test_other_chat_templates_are_refused(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: the chat template (writes|cannot be used)"):
        Processor.load(folder)


def test_a_vocabulary_and_merges_are_enough(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"]))
    special = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": special, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    builtin = ChatFormat(load_tokenizer()).encode([user("Which digit?")], generation_prompt=True)
    assert Processor.load(folder).prompt([user("Which digit?")])["input_ids"].tolist() == [builtin.input_ids]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, r"preprocessor_config\.json: resample: 2; expected 3"),
        ({"do_normalize": False}, "do_normalize: False; expected True"),
        ({"rescale_factor": 1.0}, "rescale_factor: 1.0; expected 1 / 255"),
        ({"rescale_factor": "1/255"}, "rescale_factor: '1/255'; expected 1 / 255"),
        ({"rescale_factor": float("nan")}, "rescale_factor: nan; expected 1 / 255"),
        ({"patch_size": "14"}, r"preprocessor_config\.json: images\.patch_size: '14'; expected a whole number"),
        ({"patch_size": True}, r"images\.patch_size: True; expected a whole number"),
        ({"image_mean": ["a", "b", "c"]}, r"images\.mean and images\.std: \['a', 'b', 'c'\]"),
        ({"image_mean": 5}, r"images\.mean and images\.std: 5 and"),
        ({"size": {"shortest_edge": "a"}, "min_pixels": None}, r"images\.min_pixels: 'a'; expected a whole number"),
        ({"min_pixels": 10, "max_pixels": 5}, r"preprocessor_config\.json: .*expected 0 < min <= max"),
        ({"size": 5, "min_pixels": None}, "size: 5; expected an object"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(folder, change, message):
    (folder / "preprocessor_config.json").write_text(json.dumps({**PUBLISHED, **change}))
    with pytest.raises(ConfigError, match=message):
        Processor.load(folder)


def test_damaged_folders_are_named(folder, tmp_path):
    for name, content, message in (
        ("preprocessor_config.json", "{", r"preprocessor_config\.json: not valid JSON"),
        ("preprocessor_config.json", "[]", r"preprocessor_config\.json: holds a list; expected an object"),
        ("tokenizer.json", "{", "tokenizer .* cannot be loaded"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            Processor.load(folder)
        (folder / name).write_text(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
        Processor.load(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"neither hybridvl_processor\.json nor preprocessor_config\.json"):
        Processor.load(folder)
