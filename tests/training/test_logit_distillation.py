"""LogitDistillation: loss and gradients against full logits, what they do not depend on, a fit and what it logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest import Largest
from lightning.pytorch import seed_everything
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.training.answers import model_inputs
from hybridvl.training.base import causal_inputs
from hybridvl.training.logit_distillation import LogitDistillation
from hybridvl.training.losses.divergences import DIVERGENCES
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.student import StudentConfig

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
CHUNKS = {"token_chunk": 7, "vocab_chunk": 300}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("teacher"), tiny.net("full*2"))


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("text"), pairs.text_net("full*3"))


def module(teacher: str, pattern: str, **options: Any) -> LogitDistillation:
    torch.manual_seed(1)
    return LogitDistillation(StudentConfig(teacher, pattern, {"swa": {"window": 5}}), **(CHUNKS | options)).double()


def full_logits(made: LogitDistillation, batch: dict[str, Any], kind: str, share: float, answers: bool) -> Tensor:
    """The loss by its definition, from both models' logits."""
    with torch.no_grad():
        theirs = made.teacher(**model_inputs(batch)).logits
    own = made.net(**model_inputs(batch)).logits
    log_q, log_p = ((logits / made.temperature).log_softmax(-1) for logits in (own, theirs))
    log_m = ((log_q.exp() + log_p.exp()) / 2).log()
    distance = {
        "forward": log_p.exp() * (log_p - log_q),
        "reverse": log_q.exp() * (log_q - log_p),
        "jensen_shannon": (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2,
    }[kind].sum(-1)
    labels = batch["labels"]
    if answers:
        mask = F.pad(labels[:, 1:] != -100, (0, 1))
    else:
        mask = batch.get("attention_mask", torch.ones_like(labels)).bool()
    entropy = F.cross_entropy(own[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return (1 - share) * made.temperature**2 * distance[mask].mean() + share * entropy


@pytest.mark.parametrize(
    ("kind", "share", "tokens"),
    [
        ("forward", 0.0, "all"),
        ("forward", 0.25, "answers"),
        ("reverse", 0.25, "all"),
        ("jensen_shannon", 0.0, "answers"),
        ("jensen_shannon", 1.0, "all"),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_are_those_of_full_logits(
    teacher: str, kind: Any, share: float, tokens: Any, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(teacher, "swa gdn", divergence=kind, cross_entropy=share, tokens=tokens)
    batch = pairs.batch64(packing=packing)
    loss, found = pairs.gradients(made, batch, monkeypatch)
    made.zero_grad()
    right = full_logits(made, batch, kind, share, tokens == "answers")
    right.backward()
    expected = {name: p.grad for name, p in made.net.named_parameters() if p.grad is not None}
    assert right.item() > 1e-3
    torch.testing.assert_close(loss, right.detach(), **CLOSE)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_only_new_mixers_are_trained_unless_said_otherwise(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = pairs.gradients(module(teacher, "full gdn"), pairs.batch64(), monkeypatch)
    assert {name.split(".mixer.")[0] for name in found} == {"decoder.layers.1"}
    made = module(teacher, "full gdn", train_only=None, freeze=["vision", "head"])
    _, found = pairs.gradients(made, pairs.batch64(), monkeypatch)
    frozen = {name for name, p in made.net.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in made.net.named_parameters() if n.startswith(("visual.", "decoder.embed_tokens."))}
    assert found.keys() == dict(made.net.named_parameters()).keys() - frozen
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), extra=st.integers(0, 7), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_alone_padded_or_packed_is_the_same(
    text_teacher: str, monkeypatch: pytest.MonkeyPatch, lengths: list[int], extra: int, seed: int
) -> None:
    made = module(text_teacher, "gdn swa mamba2")
    rows = pairs.text_batch(lengths, seed)
    loss, found = pairs.gradients(made, rows, monkeypatch)
    alone = [
        pairs.gradients(made, pairs.text_batch([length], seed + row), monkeypatch) for row, length in enumerate(lengths)
    ]
    weights = torch.tensor(lengths).double() / sum(lengths)
    parts = [(sum(w * a[0] for w, a in zip(weights, alone, strict=True)), _weighted([a[1] for a in alone], weights))]
    padded = pairs.text_batch(lengths, seed, padded_to=max(lengths) + extra)
    parts += [pairs.gradients(made, batch, monkeypatch) for batch in (padded, pairs.packed(rows))]
    for other, gradients in parts:
        torch.testing.assert_close(other, loss, **CLOSE)
        for name, gradient in found.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


def _weighted(found: list[dict[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    return {name: sum(w * own[name] for w, own in zip(weights, found, strict=True)) for name in found[0]}


@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_eight_times_as_many_tokens_give_the_same_loss(
    text_teacher: str, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(text_teacher, "gdn*3", tokens=tokens, cross_entropy=0.5)
    batch = pairs.text_batch([9])
    many = {"input_ids": 0, "labels": 0, "attention_mask": 0, "position_ids": 1}
    many = {key: torch.cat([batch[key]] * 8, dim) for key, dim in many.items()}
    loss, found = pairs.gradients(made, batch, monkeypatch)
    for other in (many, pairs.packed(many)):
        longer, gradients = pairs.gradients(made, other, monkeypatch)
        torch.testing.assert_close(longer, loss, **CLOSE)
        for name, gradient in found.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_processes_with_unequal_rows_average_to_the_gradient_of_all_rows(
    text_teacher: str, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(text_teacher, "gdn*3", tokens=tokens, cross_entropy=0.3)
    whole = pairs.text_batch([9, 4, 7])
    whole["labels"][:2, 1:3] = -100
    halves = [
        {key: value[:, rows] if key == "position_ids" else value[rows] for key, value in whole.items()}
        for rows in (slice(0, 1), slice(1, 3))
    ]
    loss, found = pairs.gradients(made, whole, monkeypatch)
    sent: list[Tensor] = []
    place = "hybridvl.training.logit_distillation"
    monkeypatch.setattr(f"{place}.summed", lambda values: sent.append(values) or values)
    for half in halves:
        made.training_step(half, 0)
    monkeypatch.setattr(f"{place}.summed", lambda _: sent[0] + sent[1])
    monkeypatch.setattr(f"{place}.processes", lambda: 2)
    parts = [pairs.gradients(made, half, monkeypatch) for half in halves]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss, **CLOSE)
    for name, gradient in found.items():
        mean = (parts[0][1][name] + parts[1][1][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-8, atol=1e-11, msg=name)


def test_frozen_embeddings_are_made_once_for_both_models(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {}
    for trained in (False, True):
        made = module(teacher, "full gdn", train_only=["mixers:new", *(["vision"] if trained else [])])
        calls[trained] = 0

        def counted(*_: Any, trained: bool = trained) -> None:
            calls[trained] += 1

        for visual in (made.net.visual, made.teacher.visual):
            assert visual is not None
            visual.register_forward_hook(counted)
        own, theirs = made.hidden_states(pairs.batch64())
        inputs = causal_inputs(pairs.batch64())
        torch.testing.assert_close(own, made.net.hidden(**inputs), **CLOSE)
        torch.testing.assert_close(theirs, made.teacher.hidden(**inputs), **CLOSE)
        assert own.requires_grad
        assert not theirs.requires_grad
    assert calls == {False: 1 + 2, True: 2 + 2}


def test_no_tensor_is_as_large_as_all_logits(text_teacher: str) -> None:
    made = module(text_teacher, "gdn*3", token_chunk=8, train_only=None)
    batch = pairs.text_batch([200, 150])
    with Largest() as largest:
        made.logit_loss(batch, labels=True).divergence.backward()
    assert 0 < largest.numel <= 1024 * 64 < 350 * 1024  # the embedding's own gradient, or the MLP's activations


def test_a_student_like_its_teacher_has_nothing_to_learn(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, found = pairs.gradients(module(teacher, "full*2", train_only=["mixers"]), pairs.batch64(), monkeypatch)
    assert abs(loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in found.values())


def test_no_tokens_give_no_loss(text_teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(text_teacher, "gdn*3", tokens="answers", cross_entropy=0.5)
    batch = pairs.text_batch([5, 3])
    loss, found = pairs.gradients(made, batch | {"labels": torch.full_like(batch["labels"], -100)}, monkeypatch)
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in found.values())


def test_a_fit_brings_the_student_nearer_and_logs_it(teacher: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    made = LogitDistillation(
        StudentConfig(teacher, "full gdn"),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
        cross_entropy=0.01,
        train_only=["mixers", "mlps", "norms"],
        reply_tokens=4,
    )
    frozen = {name: p.detach().clone() for name, p in made.net.named_parameters() if not p.requires_grad}
    taught = {name: p.detach().clone() for name, p in made.teacher.named_parameters()}
    trainer, data = tiny.trainer(tmp_path, 32, [], validate=8), tiny.data()
    trainer.fit(made, data)
    trainer.test(made, data, verbose=False)
    found = tiny.scalars(next(tmp_path.glob("tiny/*")))
    train, val = (dict(found[tag]) for tag in ("train/divergence", "val/divergence"))
    assert sum(list(train.values())[-4:]) < 0.6 * sum(list(train.values())[:4])
    assert val[max(val)] < val[min(val)]
    mixed = {step: 0.99 * train[step] + 0.01 * value for step, value in found["train/cross_entropy"]}
    assert dict(found["train/loss"]) == pytest.approx(mixed, rel=1e-5)
    assert {"train/lr", "train/gradient_norm", "val/token_accuracy", "val/exact", "test/exact"} <= found.keys()
    assert all(torch.equal(value, dict(made.net.named_parameters())[name]) for name, value in frozen.items())
    assert all(torch.equal(value, dict(made.teacher.named_parameters())[name]) for name, value in taught.items())


def test_validation_is_the_mean_over_all_its_tokens(teacher: str, tmp_path: Path) -> None:
    made = module(teacher, "full gdn", cross_entropy=0.25, temperature=1.5).float()
    data = tiny.data(batch_size=3)
    logged = tiny.trainer(tmp_path, 1, [], validate=1).validate(made, data, verbose=False)[0]
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in data.val_dataloader():
        with torch.no_grad():
            divergence, tokens, labels = made.logit_loss(batch, labels=True)
        assert labels is not None
        count = labels.hits.numel()
        sums += torch.tensor([divergence * tokens, tokens, labels.loss * count, count], dtype=torch.float64)
    means = float(sums[0] / sums[1]), float(sums[2] / sums[3])
    assert (logged["val/divergence"], logged["val/cross_entropy"]) == pytest.approx(means, rel=1e-5)
    assert logged["val/loss"] == pytest.approx(0.75 * means[0] + 0.25 * means[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "model.divergence: 'kl'; expected one of forward, reverse, jensen_shannon"),
        ({"tokens": "some"}, "model.tokens: 'some'; expected one of all, answers"),
        ({"temperature": 0.0}, "model.temperature: 0.0"),
        ({"temperature": math.nan}, "model.temperature: nan"),
        ({"cross_entropy": 1.5}, "model.cross_entropy: 1.5; expected a share from 0 to 1"),
        ({"token_chunk": 0}, "model.token_chunk: 0"),
        ({"vocab_chunk": -3}, "model.vocab_chunk: -3"),
    ],
)
def test_mistakes_name_the_setting(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LogitDistillation(StudentConfig("nowhere", "gdn"), **options)


def test_every_kind_is_accepted(teacher: str) -> None:
    batch = pairs.batch64()
    found = [
        module(teacher, "full gdn", divergence=kind, temperature=1.0).logit_loss(batch, False).divergence.item()
        for kind in DIVERGENCES
    ]
    assert len(set(found)) == 3
    assert 0 < found[2] < math.log(2)
