"""LayerDistillation: losses and gradients against autograd through everything, what they do not depend on, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridvl.layers.errors import ConfigError
from hybridvl.training.layer_distillation import LayerDistillation
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.student import StudentConfig

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("teacher"), tiny.net("full*4"))


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("text"), pairs.text_net("full*3"))


def module(teacher: str, pattern: str, **options: Any) -> LayerDistillation:
    torch.manual_seed(1)
    made = LayerDistillation(StudentConfig(teacher, pattern, {"swa": {"window": 5}}), **options)
    return made.double()


@pytest.mark.parametrize("match", ["layer", "mixer"])
@pytest.mark.parametrize("kind", ["mse", "relative_mse", "cosine"])
@pytest.mark.parametrize("packing", [False, True])
def test_gradients_are_those_of_autograd_through_everything(
    teacher: str, kind: Any, match: Any, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch = module(teacher, "swa gdn full mamba2", loss=kind, match=match), pairs.batch64(packing=packing)
    loss, found = pairs.gradients(made, batch, monkeypatch)
    made.zero_grad()
    reference = pairs.naive_layer_loss(made, batch, kind, match)
    reference.backward()
    expected = {name: p.grad for name, p in made.net.named_parameters() if p.grad is not None}
    assert made.replaced == (0, 1, 3)
    assert float(reference.detach()) > 1e-4
    torch.testing.assert_close(loss, reference.detach(), **CLOSE)
    assert found.keys() == expected.keys()
    assert {name.split(".mixer.")[0] for name in found} == {f"decoder.layers.{layer}" for layer in (0, 1, 3)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_no_gradient_reaches_a_frozen_weight(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(teacher, "(full gdn)*2", freeze=["decoder.layers.1.mixer.q_proj", "layers:3"])
    _, found = pairs.gradients(made, pairs.batch64(), monkeypatch)
    trained = {name for name, p in made.net.named_parameters() if p.requires_grad}
    assert made.replaced == (1,)
    assert set(found) == trained == {name for name in trained if name.startswith("decoder.layers.1.mixer.")}
    assert not any(".q_proj." in name for name in trained)
    assert all(bool(gradient.any()) for gradient in found.values())
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), extra=st.integers(0, 7), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_alone_padded_or_packed_is_the_same(
    text_teacher: str, monkeypatch: pytest.MonkeyPatch, lengths: list[int], extra: int, seed: int
) -> None:
    made = module(text_teacher, "gdn swa mamba2", loss="relative_mse")
    rows = pairs.text_batch(lengths, seed)
    loss, found = pairs.gradients(made, rows, monkeypatch)
    padded = pairs.text_batch(lengths, seed, padded_to=max(lengths) + extra)
    padded["input_ids"][~padded["attention_mask"]] = 5
    alone = [pairs.gradients(made, pairs.text_batch([n], seed + row), monkeypatch) for row, n in enumerate(lengths)]
    weights = [n / sum(lengths) for n in lengths]
    mean = sum(w * own[0] for w, own in zip(weights, alone, strict=True))
    means = {name: sum(w * own[1][name] for w, own in zip(weights, alone, strict=True)) for name in found}
    for other in (
        pairs.gradients(made, padded, monkeypatch),
        pairs.gradients(made, pairs.packed(rows), monkeypatch),
        (mean, means),
    ):
        torch.testing.assert_close(other[0], loss, **CLOSE)
        assert other[1].keys() == found.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(other[1][name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_eight_times_the_tokens_leave_the_loss_where_it_is(
    text_teacher: str, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rows = module(text_teacher, "gdn swa mamba2"), pairs.text_batch([7, 11])
    loss, found = pairs.gradients(made, pairs.packed(rows) if packing else rows, monkeypatch)
    longer = {name: torch.cat([value] * 8, dim=int(name == "position_ids")) for name, value in rows.items()}
    more, eight = pairs.gradients(made, pairs.packed(longer) if packing else longer, monkeypatch)
    torch.testing.assert_close(more, loss, **CLOSE)
    for name, gradient in found.items():
        torch.testing.assert_close(eight[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_gradients_accumulate_and_take_the_factor(text_teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs.text_batch([9, 4])
    loss, once = pairs.gradients(module(text_teacher, "gdn*3"), rows, monkeypatch)
    made = module(text_teacher, "gdn*3", loss_factor=1000.0)
    large, _ = pairs.gradients(made, rows, monkeypatch)
    made.training_step(rows, 1).backward()
    torch.testing.assert_close(large, 1000 * loss, **CLOSE)
    for name, parameter in made.net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, 2000 * once[name], **CLOSE, msg=name)


def test_a_second_backward_is_refused(text_teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(text_teacher, "gdn*3")
    pairs.gradients(made, pairs.text_batch([3]), monkeypatch)
    loss = made.training_step(pairs.text_batch([3]), 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_one_layer_has_a_graph_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pairs.text_batch([96])
    step, together = [], []
    for depth in (9, 36):
        made = module(pairs.folder(tmp_path / str(depth), pairs.text_net(f"full*{depth}")), f"gdn*{depth}").float()
        pairs.silence(made, monkeypatch)
        with pairs.LiveBytes() as live:
            made.training_step(batch, 0).backward()
        # There are as many gradients as parameters, whatever is done.
        step.append(live.peak - sum(p.nbytes for p in made.net.parameters() if p.requires_grad))
        made.zero_grad()
        with pairs.LiveBytes() as live:
            pairs.naive_layer_loss(made, batch, "rms", "mixer").detach()
        together.append(live.peak)
    assert 0 < step[1] <= 1.05 * step[0]
    assert together[1] > 3 * together[0]


def test_trains_towards_the_teacher(teacher: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = LayerDistillation(
        StudentConfig(teacher, "(swa gdn)*2", {"swa": {"window": 8}}),
        loss="relative_mse",
        match="mixer",
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
    )
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    trainer = tiny.trainer(tmp_path, 24, [], validate=8)
    first = trainer.validate(made, datamodule=tiny.data(), verbose=False)[0]
    trainer.fit(made, datamodule=tiny.data())
    last = {name: float(value) for name, value in trainer.callback_metrics.items()}
    layers = [f"layer_{layer}" for layer in range(4)]
    assert {name for name in last if name.startswith("val/")} == {"val/loss", *(f"val/{layer}" for layer in layers)}
    assert last["val/loss"] < 0.5 * first["val/loss"]
    for layer in layers:
        assert last[f"val/{layer}"] < first[f"val/{layer}"]
    assert last["val/loss"] == pytest.approx(sum(last[f"val/{layer}"] for layer in layers) / 4, rel=1e-5)
    assert tiny.same(before, dict(made.teacher.state_dict()))


def test_bfloat16_autocast_gives_gradients_in_float32(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = module(teacher, "(swa gdn)*2", loss="relative_mse").float(), tiny.batch()
    loss, plain = pairs.gradients(made, batch, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, found = pairs.gradients(made, batch, monkeypatch)
    assert float(mixed) == pytest.approx(float(loss), rel=2e-2)
    for name, gradient in plain.items():
        assert found[name].dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), found[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mae"}, "model.loss: 'mae'; expected one of mse, relative_mse, cosine"),
        ({"match": "block"}, "model.match: 'block'; expected one of layer, mixer"),
        ({"loss_factor": 0.0}, "model.loss_factor: 0.0"),
        ({"freeze": ["mixers"]}, "model.freeze: every parameter is frozen"),
        ({"freeze": ["mixers:mamba2"]}, "model.freeze: .*'mixers:mamba2'.*mixers:gdn"),
    ],
)
def test_mistakes_are_refused(text_teacher: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module(text_teacher, "gdn*3", **options)


def test_a_student_like_its_teacher_has_nothing_to_learn(text_teacher: str) -> None:
    with pytest.raises(ConfigError, match=r"model.student.pattern: 'full\*3' has no layer that differs"):
        module(text_teacher, "full*3")
