"""Tests of hybridvl.data.encode and hybridvl.data.collate: shapes, labels, and packed = padded in content."""

import numpy as np
import pytest
import torch
from data_cases import SMALL_IMAGES, small_module
from PIL import Image

from hybridvl.data.chat import IGNORED, ChatFormat
from hybridvl.data.collate import Collator
from hybridvl.data.encode import SampleEncoder
from hybridvl.data.images import ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.layers import ConfigError


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(load_tokenizer())


@pytest.fixture(scope="module")
def encoder(chat):
    return SampleEncoder(chat, ImageProcessor(SMALL_IMAGES), 512)


@pytest.fixture(scope="module")
def examples(encoder):
    source = small_module().source("train")
    return [encoder(source.sample(index, 0)) for index in range(5)]


def test_an_example_has_a_token_for_every_four_patches(chat, examples):
    for example in examples:
        assert (example.input_ids == chat.image_token_id).sum() * 4 == len(example.pixel_values)
        assert example.image_grid_thw.prod() == len(example.pixel_values)
        assert len(example.kinds) == 2


def test_padded_batch(chat, examples):
    batch = Collator(chat, 2)(examples)
    rows, longest = len(examples), max(map(len, examples))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (rows, longest)
    assert batch["position_ids"].shape == (3, rows, longest)
    assert "cu_seqlens" not in batch
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].sum(1).tolist() == [len(example) for example in examples]
    padding = ~batch["attention_mask"]
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["input_ids"][padding] == chat.pad_token_id).all()
    assert batch["answer_kinds"] == [kind for example in examples for kind in example.kinds]


def test_packed_is_the_same_samples(chat, examples):
    packed, padded = Collator(chat, 2, packing=True)(examples), Collator(chat, 2)(examples)
    assert packed["cu_seqlens"].tolist() == np.cumsum([0, *map(len, examples)]).tolist()
    assert packed["cu_seqlens"].dtype == torch.int64
    assert "attention_mask" not in packed
    for row, (start, end) in enumerate(zip(packed["cu_seqlens"][:-1], packed["cu_seqlens"][1:], strict=True)):
        length = end - start
        assert torch.equal(packed["input_ids"][0, start:end], padded["input_ids"][row, :length])
        assert torch.equal(packed["labels"][0, start:end], padded["labels"][row, :length])
        assert torch.equal(packed["position_ids"][:, 0, start:end], padded["position_ids"][:, row, :length])
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(packed[name], padded[name])
    assert packed["answer_kinds"] == padded["answer_kinds"]


def test_shifted_labels_never_cross_a_segment(chat, examples):
    """Predicting labels[1:] from the position before: no first token of a segment is a target."""
    forced = [type(example)(**{**vars(example), "labels": example.input_ids.copy()}) for example in examples]
    packed = Collator(chat, 2, packing=True)(forced)
    starts = packed["cu_seqlens"][:-1]
    assert (packed["labels"][0, starts] == IGNORED).all()
    assert (packed["labels"] == IGNORED).sum() == len(examples)


def test_image_positions_are_rows_and_columns(chat, encoder):
    picture = Image.new("L", (48, 32))
    sample = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": "How many 7s?"}],
            },
            {"role": "assistant", "content": "0"},
        ]
    }
    batch = Collator(chat, 2)([encoder(sample)])
    shown = (batch["input_ids"][0] == chat.image_token_id).nonzero()[:, 0]
    first = int(shown[0])
    assert shown.tolist() == list(range(first, first + 6))
    positions = batch["position_ids"][:, 0]
    assert positions[:, :first].tolist() == [list(range(first))] * 3
    expected = [[first] * 6, [first, first, first, first + 1, first + 1, first + 1], [first, first + 1, first + 2] * 2]
    assert positions[:, shown].tolist() == expected
    after = torch.arange(batch["input_ids"].shape[1] - first - 6) + first + 3
    assert positions[:, first + 6 :].tolist() == [after.tolist()] * 3


def test_text_alone_has_no_pixels(chat, encoder):
    batch = Collator(chat, 2)([encoder({"messages": [{"role": "assistant", "content": "yes"}]})])
    assert "pixel_values" not in batch
    assert "image_grid_thw" not in batch
    assert batch["position_ids"][0, 0].tolist() == list(range(batch["input_ids"].shape[1]))


def test_an_answer_that_does_not_fit_is_named(chat):
    messages = [{"role": "user", "content": "Read the page."}, {"role": "assistant", "content": "1 2 3"}]
    whole = chat.encode(messages)
    end = whole.answers[0][1]
    fitting = SampleEncoder(chat, ImageProcessor(SMALL_IMAGES), end)
    assert len(fitting({"messages": messages})) == end == len(whole.input_ids) - 1
    short = SampleEncoder(chat, ImageProcessor(SMALL_IMAGES), end - 1)
    message = (
        rf"train sample 7: its last answer ends at {end} tokens \(0 of them image tokens\), .*max_tokens = {end - 1}"
    )
    with pytest.raises(ConfigError, match=message):
        short({"messages": messages}, "train sample 7")


def test_samples_without_answers_are_refused_unless_predicting(chat, encoder):
    sample = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(ConfigError, match="val sample 0: no assistant turn"):
        encoder(sample, "val sample 0")
    predicting = SampleEncoder(chat, ImageProcessor(SMALL_IMAGES), 512, require_answers=False)
    assert set(predicting(sample).labels) == {IGNORED}


def test_kinds_must_match_the_answers(encoder):
    sample = {"messages": [{"role": "assistant", "content": "yes"}], "kinds": ["a", "b"]}
    with pytest.raises(ConfigError, match="2 kinds for 1 answers"):
        encoder(sample)
