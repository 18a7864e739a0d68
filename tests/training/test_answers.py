"""Answers of a batch: what is right, and each as a question of its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch

from hybridvl.training.answers import answers_right, model_inputs, real_tokens, sample_count, split_questions

X = -100


def test_an_answer_is_right_when_all_its_tokens_are() -> None:
    labels = torch.tensor([[X, X, 1, 2, X, 3], [4, 5, X, 6, 7, X]])
    # Label tokens from position 1 on: 1 2 | 3 | 5 | 6 7; position 0 is nobody's.
    hits = torch.tensor([True, False, True, True, True, True])
    assert answers_right(labels, hits).tolist() == [False, True, True, True]
    assert answers_right(labels, ~hits).tolist() == [False, False, False, False]


def test_neighbouring_rows_are_not_one_answer() -> None:
    labels = torch.tensor([[X, X, 1], [X, 2, X]])
    assert answers_right(labels, torch.tensor([True, False])).tolist() == [True, False]


def test_a_batch_without_answers_has_none() -> None:
    assert answers_right(torch.full((2, 3), X), torch.zeros(0, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("packing", [False, True])
def test_questions_of_real_batches_rebuild_the_samples(packing: bool) -> None:
    batch = tiny.batch(packing)
    merge = 4
    questions = split_questions(batch, 6, merge)
    assert [question.kind for question in questions] == batch["answer_kinds"]
    assert len({question.row for question in questions}) == sample_count(batch)
    for question in questions:
        assert question.pixel_values is not None
        assert question.image_grid_thw is not None
        assert int(question.image_grid_thw.prod()) == len(question.pixel_values)
        assert int((question.prompt == 6).sum()) * merge == len(question.pixel_values)
        assert question.answer[-1] == 2  # <|im_end|>
    patches = [q.pixel_values for i, q in enumerate(questions) if not i or questions[i - 1].row != q.row]
    assert torch.equal(torch.cat(patches), batch["pixel_values"])
    targets = torch.cat([question.answer for question in questions])
    assert torch.equal(targets, batch["labels"][batch["labels"] != X])


def test_a_later_question_has_the_earlier_turns_in_its_prompt() -> None:
    questions = split_questions(tiny.batch(), 6, 4)
    pairs = [(a, b) for a, b in pairwise(questions) if a.row == b.row]
    assert pairs
    for first, second in pairs:
        whole = torch.cat([first.prompt, first.answer])
        assert torch.equal(second.prompt[: len(whole)], whole)


def test_images_that_come_after_an_answer_are_not_seen_by_it() -> None:
    image, start = 6, 3
    row = [1, start, image, 9, start, image, image, 9]
    batch = {
        "input_ids": torch.tensor([row]),
        "labels": torch.tensor([[X, X, X, 9, X, X, X, 9]]),
        "pixel_values": torch.arange(12.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]]),
    }
    first, second = split_questions(batch, image, 4)
    assert first.pixel_values is not None
    assert second.pixel_values is not None
    assert first.pixel_values.flatten().tolist() == list(range(4))
    assert second.pixel_values.flatten().tolist() == list(range(12))
    batch["image_grid_thw"] = torch.tensor([[1, 4, 2], [1, 2, 2]])
    with pytest.raises(ValueError, match="do not end at an image or video"):
        split_questions(batch, image, 4)


def test_padding_is_not_counted() -> None:
    batch = tiny.batch()
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() < batch["input_ids"].shape[1]
    assert real_tokens(batch) == int(lengths.sum())
    packed = tiny.batch(packing=True)
    assert real_tokens(packed) == packed["input_ids"].shape[1]
    assert sample_count(packed) == len(packed["cu_seqlens"]) - 1


def test_the_model_gets_no_labels() -> None:
    batch = tiny.batch()
    assert set(batch) - set(model_inputs(batch)) == {"labels", "answer_kinds"}
