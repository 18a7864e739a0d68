"""The real Qwen vocabulary: chat turns become exactly the ids of the published template and of tiktoken's merging."""

import base64
import unicodedata
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import SPECIAL_TOKENS, from_tiktoken, load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.inference.processor import Processor
from hybridvl.layers import ConfigError

tiktoken = pytest.importorskip("tiktoken", reason="comes with dashscope, of the dev extra")

FIRST_IDS = dict(zip(SPECIAL_TOKENS, [151643, 151644, 151645, 151652, 151653, 151654, 151655, 151656], strict=True))
# The pattern and the chat template as Qwen2.5-VL's files have them (Apache-2.0), the reference to compare with.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == "
    "'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def vocabulary():
    found = find_spec("dashscope")
    if found is None:
        pytest.skip("dashscope is not installed (dev extra): it holds Qwen's vocabulary")
    return Path(found.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return from_tiktoken(vocabulary)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer)


@pytest.fixture(scope="module")
def reference(vocabulary):
    """tiktoken's own reading of the file."""
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in vocabulary.read_text().splitlines()}
    return tiktoken.Encoding("qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=FIRST_IDS)


def published_ids(reference, messages, images=(), videos=(), generation_prompt=False):
    """Ids of the rendered template, each placeholder repeated as transformers' processor does."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE).render(messages=messages, add_generation_prompt=generation_prompt)
    for pad, sizes in (("<|image_pad|>", images), ("<|video_pad|>", videos)):
        head, *rest = text.split(pad)
        assert len(rest) == len(sizes)
        text = head + "".join(pad * size + part for size, part in zip(sizes, rest, strict=True))
    return reference.encode(unicodedata.normalize("NFC", text), allowed_special="all")


def part(kind):
    return {"type": kind, kind: None}


def text(words):
    return {"type": "text", "text": words}


ONE = [{"role": "user", "content": "What is 12 + 30?"}]
SYSTEM = [{"role": "system", "content": "Réponds en français.\n\nBref !"}, *ONE]
SEVERAL = [
    *ONE,
    {"role": "assistant", "content": "42. 四十二。"},
    {"role": "user", "content": "  Why?\n\tSay it again, don't explain  "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": ""},
]
IMAGE = [{"role": "user", "content": [part("image"), text("Describe this image.")]}]
IMAGES = [
    {"role": "user", "content": [text("First: "), part("image"), text("\nsecond:"), part("image"), text(" differ?")]},
    {"role": "assistant", "content": [text("Yes, "), text("they do.")]},
    {"role": "user", "content": [part("image"), text("And this?")]},
]
VIDEOS = [
    {"role": "system", "content": [text("Watch closely.")]},
    {"role": "user", "content": [part("video"), part("image"), text("\U0001f3a5 vs 图"), part("video")]},
]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("messages", "images", "videos"),
    [
        (ONE, (), ()),
        (SYSTEM, (), ()),
        (SEVERAL, (), ()),
        (IMAGE, (391,), ()),
        (IMAGES, (4, 64, 1), ()),
        (VIDEOS, (9,), (280, 6)),
    ],
    ids=["one turn", "system", "several turns", "image", "several images", "several videos"],
)
def test_turns_become_the_published_ids(chat, reference, messages, images, videos, prompt):
    encoded = chat.encode(messages, images, videos, generation_prompt=prompt)
    assert encoded.input_ids == published_ids(reference, messages, images, videos, prompt)


def test_a_greeting_has_the_well_known_ids(chat):
    assert chat.tokenizer("Hello, world!").input_ids == [9707, 11, 1879, 0]
    encoded = chat.encode([{"role": "user", "content": "Hello, world!"}], generation_prompt=True)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert encoded.input_ids == [*system, 151644, 872, 198, 9707, 11, 1879, 0, 151645, 198, 151644, 77091, 198]


def test_the_chat_tokens_have_the_published_ids(tokenizer):
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in FIRST_IDS} == FIRST_IDS
    assert len(tokenizer) == 151665
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = [FIRST_IDS["<|video_pad|>"], tokenizer.convert_tokens_to_ids("<tool_call>"), FIRST_IDS["<|im_end|>"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>"


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n\tabc'SD1\xe9\u0301\u4e2d", max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text_becomes_the_ids_of_tiktoken(tokenizer, reference, words):
    # Published as tokens that are not special: they are one id in any text, and tiktoken does not know them.
    assume(not any(token in words for token in _one_id_in_any_text(tokenizer)))
    normal = unicodedata.normalize("NFC", words)
    ids = tokenizer.encode(words, split_special_tokens=True)
    assert ids == reference.encode(normal, disallowed_special=())
    assert tokenizer.decode(ids) == normal


def test_tokens_that_are_not_special_are_one_id_in_any_text(tokenizer):
    found = _one_id_in_any_text(tokenizer)
    assert {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>"} <= found.keys()
    for token, number in found.items():
        assert tokenizer.encode(f"a{token}b", split_special_tokens=True) == [64, number, 65]


def _one_id_in_any_text(tokenizer):
    return {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if not token.special}


def test_every_token_of_one_word_is_itself(tokenizer, reference):
    """A token's text is encoded by that token alone wherever tiktoken does so: no merge is missing or out of order."""
    wrong = []
    for number in range(0, 151643, 97):
        data = reference.decode_single_token_bytes(number)
        words = data.decode("utf-8", errors="ignore")
        if words.encode() == data and unicodedata.is_normalized("NFC", words):
            ids = tokenizer.backend_tokenizer.encode(words).ids
            wrong += [number] if ids != reference.encode(words, disallowed_special=()) else []
    assert not wrong


def test_a_processor_with_this_vocabulary(chat, reference, tmp_path):
    images = ImageProcessor(ImageConfig())
    Processor(chat, images, VideoProcessor(images, VideoConfig(min_pixels=784))).save(tmp_path)
    processor = Processor.load(tmp_path)
    shown = {"image": Image.new("RGB", (100, 60)), "video": [Image.new("RGB", (56, 28))] * 3}
    for messages, images, videos in ((IMAGE, (8,), ()), (IMAGES, (8, 8, 8), ()), (VIDEOS, (8,), (4, 4))):
        filled = [
            {**m, "content": [{**p, p["type"]: shown.get(p["type"], p.get("text"))} for p in m["content"]]}
            for m in messages
        ]
        expected = published_ids(reference, messages, images, videos, generation_prompt=True)
        assert processor.prompt(filled)["input_ids"].tolist() == [expected]
    assert processor.chat.tokenizer.get_vocab() == chat.tokenizer.get_vocab()


def test_a_file_that_is_no_vocabulary_is_named(tmp_path):
    path = tmp_path / "a.tiktoken"
    for content in ("", "IQ== 0\n", "IQ== zero\n", "é 0\n", "IQ== 0 0\n"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"tokenizer .*a\.tiktoken: (no tiktoken file|expected tokens)"):
            load_tokenizer(str(path))
    with pytest.raises(ConfigError, match=r"tokenizer .*gone\.tiktoken: no tiktoken file"):
        from_tiktoken(tmp_path / "gone.tiktoken")


def test_a_small_vocabulary(tmp_path):
    """Merges are found by merging: "abc" comes from "ab" and "c", the pair with the lower number, not "a" and "bc"."""
    numbers = count()
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"bc", b"abc", b"xyz"]
    lines = [f"{base64.b64encode(token).decode()} {next(numbers)}" for token in tokens]
    path = tmp_path / "a.tiktoken"
    path.write_text("\n".join(lines))
    tokenizer = from_tiktoken(path)
    assert [tokenizer.encode(word) for word in ("abc", "bc", "abcbc", "xyz")] == [
        [258],
        [257],
        [258, 257],
        [120, 121, 122],
    ]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 260
