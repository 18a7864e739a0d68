"""Conversations with images, alone, padded, or packed within a budget: the same loss and gradients in every stage."""

from __future__ import annotations

import itertools
from typing import Any

import pairs
import pytest
import tiny
import torch
from torch import Tensor

from hybridvl.data.collate import Collator
from hybridvl.data.digits import DigitPages
from hybridvl.data.images import ImageConfig
from hybridvl.data.module import ChatDataModule
from hybridvl.training.answers import real_tokens, sample_count
from hybridvl.training.layer_distillation import LayerDistillation
from hybridvl.training.logit_distillation import LogitDistillation
from hybridvl.training.student import StudentConfig
from hybridvl.training.supervised import SupervisedTuning

PATTERN = "full gdn swa mamba2"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("teacher"), tiny.net("full*4"))


def module(stage: str, teacher: str) -> Any:
    torch.manual_seed(1)
    student = StudentConfig(teacher, PATTERN, {"swa": {"window": 9}})
    made: Any
    if stage == "supervised":
        made = SupervisedTuning(tiny.net(PATTERN))
    elif stage == "layers":
        made = LayerDistillation(student, loss="relative_mse")
    else:
        made = LogitDistillation(student, cross_entropy=0.4, train_only=None, freeze=["vision"])
    return made.double()


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict[str, Any]]]:
    """The same conversations about pages of several sizes: alone, padded, and as the loader packs them."""
    data = _data(256)
    encoder, source = data._encoder(), data.source("train")
    order = itertools.islice(data.train_dataloader()._stream.order, 5)
    examples = [encoder(source.sample(number, epoch)) for epoch, number in order]
    assert len({len(example) for example in examples}) > 2
    assert len({len(example.pixel_values) for example in examples}) > 1
    padded, packed = (Collator(data.chat, 2, packing=packing) for packing in (False, True))
    budget = sum(map(len, examples))
    made = {
        "alone": [padded([example]) for example in examples],
        "padded": [padded(examples)],
        "packed": [next(iter(_data(budget).train_dataloader()))],
        "in two rows": [packed(examples[:2]), packed(examples[2:])],
    }
    assert [sum(map(sample_count, found)) for found in made.values()] == [5] * 4
    assert {sum(map(real_tokens, found)) for found in made.values()} == {budget}
    return {name: [_double(batch) for batch in found] for name, found in made.items()}


def _data(budget: int) -> ChatDataModule:
    """Pages of one to eight visual tokens."""
    task = DigitPages(rows=(1, 2), columns=(1, 4), cell=8, turns=2, train_pages=32, val_pages=8, test_pages=8)
    images = ImageConfig(tiny.PATCH, 1, 2, mean=(0.5,), std=(0.5,), min_pixels=64)
    return ChatDataModule(task, images=images, max_tokens=128, tokens_per_batch=budget, packing=True, system=None)


def _double(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }


def _weights(stage: str, batches: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Each batch's share of the real tokens and of the label tokens."""
    counts = [(real_tokens(batch), int((batch["labels"][:, 1:] != -100).sum())) for batch in batches]
    real, labels = (sum(count[part] for count in counts) for part in (0, 1))
    return [(own[0] / real, own[1] / labels) for own in counts]


@pytest.mark.parametrize("stage", ["supervised", "layers", "logits"])
def test_a_conversation_is_alone_wherever_it_stands(
    stage: str, teacher: str, batches: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(stage, teacher)
    # The mixture of two means over different tokens is compared one part at a time.
    parts = (0.0, 1.0) if stage == "logits" else (None,)
    for part in parts:
        if part is not None:
            made.cross_entropy = part
        by_labels = stage == "supervised" or part == 1.0
        found = {}
        for name, group in batches.items():
            weights = [pair[by_labels] for pair in _weights(stage, group)]
            results = [pairs.gradients(made, batch, monkeypatch) for batch in group]
            loss = sum(w * own for w, (own, _) in zip(weights, results, strict=True))
            names = results[0][1]
            found[name] = (
                loss,
                {key: sum(w * own[key] for w, (_, own) in zip(weights, results, strict=True)) for key in names},
            )
        loss, gradients = found.pop("padded")
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())
        for name, (other, others) in found.items():
            torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-12, msg=name)
            assert others.keys() == gradients.keys()
            for key, gradient in gradients.items():
                largest = float(gradient.abs().max())
                torch.testing.assert_close(
                    others[key], gradient, rtol=0, atol=1e-8 * largest + 1e-12, msg=f"{name} {key}"
                )


@pytest.mark.parametrize("stage", ["supervised", "layers", "logits"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_eight_times_the_conversations_leave_loss_and_gradients_where_they_are(
    kind: str, stage: str, teacher: str, batches: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(stage, teacher)
    [batch] = batches[kind]
    along = {"input_ids": int(kind == "packed"), "labels": int(kind == "packed"), "attention_mask": 0}
    along |= {"position_ids": 1 + (kind == "packed"), "pixel_values": 0, "image_grid_thw": 0}
    more = {name: torch.cat([batch[name]] * 8, dim) for name, dim in along.items() if name in batch}
    if kind == "packed":
        sizes = batch["cu_seqlens"].diff().repeat(8)
        more["cu_seqlens"] = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    (loss, found), (other, others) = (pairs.gradients(made, given, monkeypatch) for given in (batch, more))
    torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-12)
    for name, gradient in found.items():
        near = 1e-8 * float(gradient.abs().max()) + 1e-12
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=near, msg=name)


def test_tokens_of_a_neighbour_change_nothing(teacher: str, batches: dict[str, list[dict[str, Any]]]) -> None:
    made = module("supervised", teacher)
    [packed] = batches["packed"]
    bounds = packed["cu_seqlens"].tolist()
    other = {**packed, "input_ids": packed["input_ids"].clone(), "pixel_values": packed["pixel_values"].clone()}
    words = other["input_ids"][0, bounds[1] : bounds[2]]
    words[words > 7] = 100  # what is neither chat nor image
    first = int(packed["image_grid_thw"][0].prod())
    other["pixel_values"][first : first + int(packed["image_grid_thw"][1].prod())] += 1.0
    with torch.no_grad():
        before, after = (made.net.hidden(**_inputs(batch))[0] for batch in (packed, other))
    changed = (before - after).abs().amax(-1) > 1e-12
    assert changed[bounds[1] : bounds[2]].any()
    changed[bounds[1] : bounds[2]] = False
    assert not changed.any()


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    names = ("input_ids", "position_ids", "pixel_values", "image_grid_thw", "cu_seqlens")
    return {name: batch[name] for name in names}
