"""A teacher's top tokens in parquet: found again by content, refused where they are of something else, used in place of
the teacher."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hybridvl
from hybridvl.data.collate import Collator
from hybridvl.layers.errors import ConfigError
from hybridvl.training import logit_distillation, teacher_logits
from hybridvl.training.logit_distillation import LogitDistillation
from hybridvl.training.losses.top_divergence import TopTokens
from hybridvl.training.student import StudentConfig
from hybridvl.training.teacher_logits import TeacherLogits, TeacherLogitsConfig, sample_keys, teacher_digest

FACTS = {"format": 1, "teacher": "abc", "top_k": 3}
VOCABULARY = tiny.net().vocab_size


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("teacher"), tiny.net("full*2"))


def module(teacher: str, folder: Path | None, top_k: int = VOCABULARY, **options: Any) -> LogitDistillation:
    torch.manual_seed(1)
    kept = None if folder is None else TeacherLogitsConfig(str(folder), top_k)
    student = StudentConfig(teacher, "swa gdn", {"swa": {"window": 5}})
    return LogitDistillation(student, **{"train_only": None, **options}, teacher_logits=kept).double()


def top(seed: int, tokens: int, k: int = 3) -> TopTokens:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**31 - 1, (tokens, k), generator=made).int()
    return TopTokens(ids, torch.randn(tokens, k, generator=made), torch.randn(tokens, generator=made))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    flushes=st.sets(st.integers(0, 11)),
    group=st.sampled_from([1, 200, 10_000]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_kept_is_found(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    flushes: set[int],
    group: int,
) -> None:
    monkeypatch.setattr(teacher_logits, "_ROW_GROUP", group)
    folder = tmp_path_factory.mktemp("kept") / "new"
    kept = TeacherLogits(folder, FACTS)
    for number, size in enumerate(sizes):
        assert kept.find(f"key {number}", size) is None
        kept.add(f"key {number}", top(number, size))
        if number in flushes:
            kept.flush()
    for store in (kept, _flushed(kept, folder)):
        assert len(store) == len(sizes)
        for number, size in enumerate(sizes):
            found = store.find(f"key {number}", size)
            assert found is not None
            assert tiny.same(tuple(found), tuple(top(number, size)))


def _flushed(kept: TeacherLogits, folder: Path) -> TeacherLogits:
    kept.flush()
    return TeacherLogits(folder, FACTS)


def test_much_is_written_by_itself_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_logits, "_PENDING", 500)
    kept, other = TeacherLogits(tmp_path, FACTS), TeacherLogits(tmp_path, FACTS)
    for number in range(10):
        for store in (kept, kept, other):
            store.add(str(number), top(number, 5))  # 140 bytes
    assert len(list(tmp_path.glob("*.parquet"))) == 4
    assert len(TeacherLogits(tmp_path, FACTS)) == 8  # as of two processes that have kept the same
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"teacher": "xyz"}, "was made with teacher = 'abc'; here it is 'xyz'; expected the same, or another folder"),
        ({"top_k": 4}, "was made with top_k = 3; here it is 4"),
        ({"temperature": 2.0}, "was made with temperature = None; here it is 2.0"),
    ],
)
def test_what_is_of_something_else_is_refused(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    early = TeacherLogits(tmp_path, FACTS | facts)
    early.add("a", top(0, 2, early.top_k))
    kept = TeacherLogits(tmp_path, FACTS)
    kept.add("a", top(0, 2))
    kept.flush()
    for refused in (lambda: TeacherLogits(tmp_path, FACTS | facts), early.flush):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert f"model.teacher_logits.folder: {tmp_path} {message}" in str(caught.value)


def test_damage_is_told(tmp_path: Path) -> None:
    kept = TeacherLogits(tmp_path, FACTS)
    kept.add("a", top(0, 2))
    kept.flush()
    with pytest.raises(ConfigError, match="damaged, an entry is not of 5 tokens"):
        kept.find("a", 5)
    [part] = tmp_path.glob("*.parquet")
    (tmp_path / "part-cut.parquet").write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"part-cut.parquet: damaged or no parquet file"):
        TeacherLogits(tmp_path, FACTS)


def test_a_digest_is_of_the_contents(teacher: str, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(teacher, copied)
    assert teacher_digest(str(copied)) == teacher_digest(teacher)
    model = hybridvl.load(teacher)
    with torch.no_grad():
        model.decoder.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    hybridvl.save(model, tmp_path / "other")
    narrower = dataclasses.replace(tiny.net("full*2"), rope_theta=1e3)
    digests = {teacher_digest(folder) for folder in (teacher, str(tmp_path / "other"))}
    assert len({*digests, teacher_digest(pairs.folder(tmp_path / "theta", narrower))}) == 3


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict[str, Any]]]:
    """The same five conversations with images in several batches, in two orders, padded and packed."""
    data = tiny.data(turns=2)
    encoder, source = data._encoder(), data.source("train")
    examples = [encoder(source.sample(number, 0)) for number in range(5)]
    padded, packed = (Collator(data.chat, 2, packing=packing) for packing in (False, True))
    made = {
        "alone": [padded([example]) for example in examples],
        "padded": [padded(examples[:3]), padded(examples[3:])],
        "backwards": [padded(examples[::-1])],
        "packed": [packed([examples[number] for number in (2, 0, 4)]), packed([examples[number] for number in (1, 3)])],
    }
    return {name: [_double(batch) for batch in found] for name, found in made.items()}


def _double(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_keys_are_of_the_contents(batches: dict[str, list[dict[str, Any]]], tokens: str) -> None:
    net = tiny.net()
    keys = {name: [k for batch in group for k in sample_keys(batch, net, tokens)] for name, group in batches.items()}
    alone = keys["alone"]
    assert len(set(alone)) == 5
    assert keys["padded"] == alone == keys["backwards"][::-1]
    assert keys["packed"] == [alone[number] for number in (2, 0, 4, 1, 3)]
    batch = batches["padded"][0]
    for name in ("input_ids", "labels", "pixel_values"):
        changed = {**batch, name: batch[name].clone()}
        row = (0, 10) if name != "pixel_values" else (0, 3)
        changed[name][row] = 9 if name != "pixel_values" else 0.123
        assert [k != own for k, own in zip(sample_keys(changed, net, tokens), alone[:3], strict=True)] == [1, 0, 0]


@pytest.mark.parametrize(("kind", "tokens"), [("forward", "all"), ("reverse", "answers"), ("jensen_shannon", "all")])
def test_all_tokens_kept_are_the_teacher(
    kind: Any,
    tokens: Any,
    teacher: str,
    batches: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"divergence": kind, "tokens": tokens, "cross_entropy": 0.2}
    plain, first = module(teacher, None, **options), module(teacher, tmp_path / "kept", **options)
    for batch in batches["padded"]:
        pairs.silence(first, monkeypatch)
        first.training_step(batch, 0)
    first.teardown("fit")
    monkeypatch.setattr(logit_distillation, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    again = module(teacher, tmp_path / "kept", **options)
    assert again._teachers == []
    for group in batches.values():
        for batch in group:
            loss, found = pairs.gradients(plain, batch, monkeypatch)
            # The teacher is known in float32, the student in float64.
            for other in (first, again):
                kept, gradients = pairs.gradients(other, batch, monkeypatch)
                torch.testing.assert_close(kept, loss, rtol=1e-6, atol=1e-7)
                assert gradients.keys() == found.keys()
                for name, gradient in found.items():
                    near = 2e-6 * float(gradient.abs().max()) + 1e-9
                    torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=near, msg=name)


def test_a_teacher_comes_when_a_sample_is_new(
    teacher: str, batches: dict[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"top_k": 7, "freeze": ["vision", "embeddings"]}
    first, second = batches["padded"]
    whole = module(teacher, tmp_path / "whole", **options)
    expected = [pairs.gradients(whole, batch, monkeypatch)[0] for batch in (first, second)]
    start = module(teacher, tmp_path / "kept", **options)
    pairs.gradients(start, first, monkeypatch)
    start.teardown("fit")
    logged: dict[str, list[float]] = {}
    later = module(teacher, tmp_path / "kept", **options)
    monkeypatch.setattr(later, "log_lr", lambda: None)
    monkeypatch.setattr(later, "log", lambda name, value, **_: logged.setdefault(name, []).append(float(value)))
    losses = []
    for batch in (first, batches["backwards"][0], second):
        losses.append(later.training_step(batch, 0).detach())
        assert bool(later._teachers) is (batch is not first)
    torch.testing.assert_close(torch.stack([losses[0], losses[2]]), torch.stack(expected), rtol=1e-6, atol=1e-8)
    assert logged["train/cached"] == pytest.approx([1.0, 3 / 5, 1.0])
    shared = {p.data_ptr() for p in later.teacher.parameters()} & {p.data_ptr() for p in later.net.parameters()}
    assert {later.net.decoder.embed_tokens.weight.data_ptr(), later.net.visual.merger.ln_q.weight.data_ptr()} < shared
    assert later.teacher.lm_head_weight.dtype == torch.float64
    assert not any(p.requires_grad for p in later.teacher.parameters())


@pytest.mark.parametrize("top_k", [VOCABULARY, 16])
def test_fits_share_what_is_kept(top_k: int, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other batch sizes and packing of the same eight pages."""

    def fit(folder: Path | None, **options: Any) -> LogitDistillation:
        made = module(teacher, folder, top_k)
        data = tiny.data(**options)
        data.train_samples, data.epoch_batches = 8, 4
        trainer = tiny.trainer(tmp_path / "runs", 4, [], validate=4)
        trainer.fit(made, datamodule=data)
        return made

    plain, cold = fit(None), fit(tmp_path / "kept")
    if top_k == VOCABULARY:
        for name, weight in plain.net.state_dict().items():
            torch.testing.assert_close(cold.net.state_dict()[name], weight, rtol=0, atol=2e-6, msg=name)
    metrics = cold.trainer.callback_metrics
    # Fewer outcomes tell less of how far the distributions are apart.
    assert metrics["val/divergence"] <= plain.trainer.callback_metrics["val/divergence"] * (1 + 1e-3)
    monkeypatch.setattr(logit_distillation, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    for options in ({}, {"batch_size": 3}, {"packing": True}):
        warm = fit(tmp_path / "kept", **options)
        assert warm.trainer.callback_metrics["train/cached"] == 1
        if not options:
            for name, weight in cold.net.state_dict().items():
                torch.testing.assert_close(warm.net.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)


def test_mistakes_name_the_setting(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.teacher_logits.top_k: 2000; expected at most 1024, the size of the"):
        module(teacher, tmp_path, 2000)
    with pytest.raises(ConfigError, match=r"^model.teacher_logits.top_k: 0; expected a whole number of at least 1"):
        TeacherLogitsConfig("x", 0)
    (tmp_path / "file").touch()
    for folder in ("", str(tmp_path / "file")):
        with pytest.raises(ConfigError, match=rf"^model.teacher_logits.folder: '{folder}'; expected a folder"):
            TeacherLogitsConfig(folder)
