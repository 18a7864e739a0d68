"""Pairs of teacher and student: what they share in memory, what is new, and which mistakes are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pairs
import pytest
import tiny
import torch

import hybridvl
from hybridvl.conversion import convert
from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.layer_distillation import LayerDistillation
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.student import Pair, StudentConfig, build_pair, replaced_layers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder(tmp_path_factory.mktemp("teacher"), tiny.net("full*4"))


def shared(pair: Pair) -> set[str]:
    """Parameters that are one object, or lie in the same memory."""
    theirs = dict(pair.teacher.named_parameters())
    memory = {name: p.untyped_storage().data_ptr() for name, p in theirs.items()}
    found = {name for name, p in pair.student.named_parameters() if theirs.get(name) is p}
    for name, p in pair.student.named_parameters():
        assert (p.untyped_storage().data_ptr() == memory.get(name)) == (name in found), name
    return found


def test_what_is_frozen_and_equal_is_one_tensor(teacher: str) -> None:
    pair = build_pair(StudentConfig(teacher, "(full gdn)*2"), 0)
    trained = {name for name, p in pair.student.named_parameters() if p.requires_grad}
    names = {name for name, _ in pair.student.named_parameters()}
    assert pair.replaced == (1, 3)
    assert trained == {
        name for name in names if name.startswith(("decoder.layers.1.mixer.", "decoder.layers.3.mixer."))
    }
    assert shared(pair) == names - trained
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert pair.student.training
    assert not pair.teacher.training
    assert {p.dtype for net in (pair.student, pair.teacher) for p in net.parameters()} == {torch.float32}


def test_what_is_trained_is_never_the_teachers(teacher: str) -> None:
    pair = build_pair(StudentConfig(teacher, "(swa gdn)*2", {"swa": {"window": 4}}), 0, None, ["vision", "layers:0"])
    frozen = {name for name, p in pair.student.named_parameters() if not p.requires_grad}
    assert shared(pair) == frozen == {name for name in frozen if name.startswith(("visual.", "decoder.layers.0."))}
    before = {name: value.clone() for name, value in pair.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in pair.student.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert tiny.same(before, dict(pair.teacher.state_dict()))
    assert tiny.same(before, dict(hybridvl.load(teacher).state_dict()))


def test_sharing_survives_every_move_of_the_module(teacher: str) -> None:
    module = LayerDistillation(StudentConfig(teacher, "(full gdn)*2"))
    count = len(shared(Pair(module.teacher, module.net, ())))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        module.to(dtype=dtype)
        assert len(shared(Pair(module.teacher, module.net, ()))) == count
        assert module.teacher.lm_head_weight.dtype == dtype
        assert {p.dtype for p in module.teacher.parameters()} == {dtype}
    module.to("meta")
    assert {p.device.type for net in (module.teacher, module.net) for p in net.parameters()} == {"meta"}


def test_the_teacher_is_no_part_of_the_module(teacher: str) -> None:
    module = LayerDistillation(StudentConfig(teacher, "gdn*4"))
    assert set(module.state_dict()) == {f"net.{name}" for name in module.net.state_dict()}
    own = {id(p) for p in module.net.parameters()}
    assert {id(p) for p in module.parameters()} == own
    module.train()
    assert not module.teacher.training
    only = [p for p in module.teacher.parameters() if id(p) not in own]
    assert len(only) == sum(".mixer." in name for name, _ in module.teacher.named_parameters())


@pytest.mark.parametrize("inherit", ["none", "qkvo"])
def test_the_student_is_the_conversion(teacher: str, inherit: Any) -> None:
    pair = build_pair(StudentConfig(teacher, "(swa gdn)*2", inherit=inherit, pass_convs=True), 7)
    expected, _ = convert(teacher, "(swa gdn)*2", inherit, seed=7, pass_convs=True)
    assert tiny.same(dict(pair.student.state_dict()), dict(expected.state_dict()))
    assert pair.student.pattern == "(swa gdn)*2"


def test_a_source_gives_the_weights_and_the_teacher_the_sizes(teacher: str, tmp_path: Path) -> None:
    earlier = build_pair(StudentConfig(teacher, "full gdn full*2", {"gdn": {"expand_v": 1.0}}), 0).student
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.mul_(1.5).add_(0.1)
    hybridvl.save(earlier, tmp_path)
    pair = build_pair(StudentConfig(teacher, "swa gdn gdn full", source=str(tmp_path)), 0)
    old, new = earlier.state_dict(), pair.student.state_dict()
    assert pair.replaced == (0, 1, 2)
    # Of the source: everything outside the mixers, the mixer that is the same, and attention that gains a window.
    kept = [name for name in new if not name.startswith("decoder.layers.2.mixer.")]
    assert all(torch.equal(new[name], old[name]) for name in kept)
    expected, _ = convert(tmp_path, "swa gdn gdn full", mixers=pair.student.config.mixers)
    assert tiny.same(dict(new), dict(expected.state_dict()))
    assert shared(pair) == set()  # frozen, but not the teacher's any more
    plain = build_pair(StudentConfig(teacher, "gdn*4"), 0).student
    hybridvl.save(plain, tmp_path / "plain")
    again = build_pair(StudentConfig(teacher, "(swa gdn)*2", source=str(tmp_path / "plain")), 0).student
    assert (again.mixer_configs[0].heads, again.mixer_configs[0].head_dim) == (2, 16)
    assert again.config == build_pair(StudentConfig(teacher, "(swa gdn)*2"), 0).student.config


def test_a_bfloat16_teacher_is_trained_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hybridvl.save(VisionLanguageModel(tiny.net("full*2")).bfloat16(), tmp_path)
    pair = build_pair(StudentConfig(str(tmp_path), "full gdn"), 0)
    assert {p.dtype for net in (pair.student, pair.teacher) for p in net.parameters()} == {torch.float32}
    assert len(shared(pair)) == sum(not p.requires_grad for p in pair.student.parameters()) > 10


def test_a_bfloat16_teacher_and_an_exported_student_share(tmp_path: Path) -> None:
    hybridvl.save(VisionLanguageModel(tiny.net("full*2")).bfloat16(), tmp_path / "teacher")
    first = build_pair(StudentConfig(str(tmp_path / "teacher"), "full gdn"), 0)
    hybridvl.save(first.student, tmp_path / "student")
    source = StudentConfig(str(tmp_path / "teacher"), "full gdn", source=str(tmp_path / "student"))
    pair = build_pair(source, 0)
    assert shared(pair) == shared(first) == {name for name, p in pair.student.named_parameters() if not p.requires_grad}
    assert {p.dtype for net in (pair.student, pair.teacher) for p in net.parameters()} == {torch.float32}
    assert tiny.same(dict(pair.student.state_dict()), dict(first.student.state_dict()))


def test_replaced_layers_are_those_that_compute_something_else() -> None:
    mixers = {**tiny.net().mixers, "wide": {"type": "swa", "heads": 2, "kv_heads": 1, "head_dim": 16, "window": 99}}
    one, other = (
        dataclasses.replace(tiny.net(), pattern=pattern, mixers=mixers)
        for pattern in ("full swa gdn swa+gdn full", "full(backend=reference) wide gdn(expand_v=1) swa+gdn swa")
    )
    assert replaced_layers(other, one) == (1, 2, 4)


def test_activation_checkpointing_is_the_students(teacher: str) -> None:
    pair = build_pair(StudentConfig(teacher, "gdn*4", activation_checkpointing=True), 0)
    assert pair.student.decoder.activation_checkpointing
    assert pair.student.config.activation_checkpointing
    assert not pair.teacher.decoder.activation_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "nowhere"}, "model.student.teacher: nowhere: no such folder"),
        ({"source": "nowhere"}, "model.student.source: nowhere: no such folder"),
        ({"pattern": "gdn*3"}, "model.student: pattern 'gdn.3' has 3 layers; expected 4"),
        ({"pattern": "gdm*4"}, r"model.student.pattern: .*unknown mixer 'gdm'"),
        ({"pattern": "gdn*4", "mixers": {"gdn": {"haeds": 3}}}, "model.student.mixers.gdn.*haeds"),
        ({"pattern": "gdn*4", "inherit": "all"}, "model.student: layer 0: inherit = 'all'"),
    ],
)
def test_mistakes_name_their_place(teacher: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pair(StudentConfig(**{"teacher": teacher, "pattern": "gdn*4", **options}), 0)


def test_a_source_of_other_sizes_is_refused_with_both_numbers(teacher: str, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny.net("full*4"), width=48, vocab_size=2048)
    folder = pairs.folder(tmp_path, other)
    with pytest.raises(ConfigError, match="width is 48 there, 32 here; vocab_size is 2048 there, 1024 here"):
        build_pair(StudentConfig(teacher, "gdn*4", source=folder), 0)


def test_a_checkpoint_of_another_teachers_student_is_refused(teacher: str, tmp_path: Path) -> None:
    def fit(folder: str, steps: int, ckpt: Path | None = None) -> Any:
        module = LayerDistillation(StudentConfig(folder, "(full gdn)*2"), optimizer=OptimizerConfig(warmup_steps=1))
        trainer = tiny.trainer(tmp_path / "runs", steps, [])
        trainer.fit(module, datamodule=tiny.data(), ckpt_path=ckpt)
        return trainer

    last = tmp_path / "last.ckpt"
    fit(teacher, 1).save_checkpoint(last, weights_only=False)
    assert fit(teacher, 2, last).global_step == 2
    other = pairs.folder(tmp_path / "other", tiny.net("full*4"), seed=1)
    with pytest.raises(ConfigError, match=r"ckpt_path: a checkpoint of another teacher's student: .* and \d+ more"):
        fit(other, 2, last)
