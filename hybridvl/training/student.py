"""A teacher and its student: a conversion of the teacher's folder, with one copy in memory of all that both keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybridvl.checkpoints import Checkpoint, load, open_checkpoint
from hybridvl.checkpoints.comparison import check_same_sizes
from hybridvl.conversion import prepare
from hybridvl.conversion.account import same_layer
from hybridvl.conversion.target import target_config
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import PatternError, parse_pattern
from hybridvl.training.freezing import NEW_MIXERS, choose_trained

PLACE = "model.student"


@dataclass(frozen=True)
class StudentConfig:
    """What a student is made of.

    Attributes:
        teacher: folder or hub id of the teacher.
        pattern: the student's layer pattern, as many layers as the teacher has.
        mixers: named mixers and overrides; what they leave open is sized like the teacher's attention.
        inherit: what a new mixer takes over from the layer that it replaces, "none" or "qkvo".
        pass_convs: new short convolutions hand on the current token at first instead of being random.
        source: folder of an earlier stage's student, whose weights are gone on with; null: the teacher's. Its pattern
            may be another one: mixers that are the same in both are copied, the others are made as from a teacher.
        activation_checkpointing: recompute the student's layers in the backward pass, see `ModelConfig`.
    """

    teacher: str
    pattern: str
    mixers: dict[str, dict[str, Any]] | None = None
    inherit: Literal["none", "qkvo"] = "qkvo"
    pass_convs: bool = False
    source: str | None = None
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, on the CPU, in float32.

    Attributes:
        teacher: in eval mode, without gradients.
        student: in train mode; requires_grad is True for what is trained. Every frozen parameter that has the teacher's
            values is the teacher's own `Parameter`.
        replaced: numbers of the layers whose mixer is not the teacher's: another one, or with other options.
    """

    teacher: VisionLanguageModel
    student: VisionLanguageModel
    replaced: tuple[int, ...]


def build_pair(
    config: StudentConfig,
    seed: int,
    train_only: Sequence[str] | None = (NEW_MIXERS,),
    freeze: Sequence[str] = (),
) -> Pair:
    """The teacher and the student of a stage.

    Args:
        config: what they are.
        seed: of the student's new weights.
        train_only: what is trained, in the words of `hybridvl.training.freezing`; None: everything.
        freeze: what is not trained of that.

    Raises:
        ConfigError: a mistake in the configuration, a damaged folder, a pattern of another depth, a source whose sizes
            (width, vocabulary, vision tower) are not the teacher's, a name that means no parameter, or "mixers:new"
            where no layer differs.
    """
    student, replaced = build_student(config, seed, train_only, freeze)
    with within(f"{PLACE}.teacher"):
        teacher = load(config.teacher).requires_grad_(False)
    _share(teacher, student)
    # Master weights: what is trained moves by less than a step of bfloat16. Shared parameters are cast once, in place.
    student.float()
    teacher.float()
    return Pair(teacher.eval(), student.train(), replaced)


def build_student(
    config: StudentConfig,
    seed: int,
    train_only: Sequence[str] | None = (NEW_MIXERS,),
    freeze: Sequence[str] = (),
) -> tuple[VisionLanguageModel, tuple[int, ...]]:
    """The student of a stage in the dtype of its files, in train mode, and which of its layers are replaced.

    Arguments and errors are those of `build_pair`; of the teacher only what the student takes over is read.
    """
    with within(f"{PLACE}.teacher"):
        checkpoint = open_checkpoint(config.teacher)
    net, source = checkpoint.config, checkpoint
    if config.source is not None:
        with within(f"{PLACE}.source"):
            source = open_checkpoint(config.source)
        check_same_sizes(source.config, net, f"{PLACE}.source: {config.source} is no student of {config.teacher}")
    student = _student(config, net, source, seed)
    replaced = replaced_layers(student.config, net)
    if not replaced and NEW_MIXERS in (train_only or ()):
        raise ConfigError(
            f"{PLACE}.pattern: {student.pattern!r} has no layer that differs from the teacher's {net.pattern!r}; "
            "expected at least one"
        )
    choose_trained(student, train_only, freeze, replaced)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()  # it may be mapped from a file
    return student.train(), replaced


def load_teacher(config: StudentConfig, student: VisionLanguageModel) -> VisionLanguageModel:
    """The teacher of a student that was built without, where that is and in its dtype; both share what is equal."""
    with within(f"{PLACE}.teacher"):
        teacher = load(config.teacher).requires_grad_(False)
    like = student.lm_head_weight
    teacher.float().to(like.device, like.dtype)
    _share(student, teacher)
    return teacher.eval()


def student_net(config: StudentConfig, teacher: ModelConfig) -> ModelConfig:
    """The configuration of the student of a teacher, from configurations alone; ConfigError for what does not fit."""
    try:
        return target_config(teacher, config.pattern, config.mixers, f"{PLACE}.mixers")
    except PatternError as error:
        raise ConfigError(f"{PLACE}.pattern: {error}") from error


def replaced_layers(student: ModelConfig, teacher: ModelConfig) -> tuple[int, ...]:
    """Numbers of the layers whose mixers differ: in their weights or in what they compute, backends aside."""
    own, theirs = (parse_pattern(net.pattern, net.mixers).configs(net.mixers) for net in (student, teacher))
    return tuple(number for number, pair in enumerate(zip(own, theirs, strict=True)) if not same_layer(*pair))


def _student(config: StudentConfig, teacher: ModelConfig, source: Checkpoint, seed: int) -> VisionLanguageModel:
    # The teacher's sizes hold, even where no layer of the source is attention any more.
    net = student_net(config, teacher)
    with within(PLACE):
        conversion = prepare(source, net.pattern, config.inherit, net.mixers)
        made = dataclasses.replace(conversion.config, activation_checkpointing=config.activation_checkpointing)
        return dataclasses.replace(conversion, config=made).model(seed, pass_convs=config.pass_convs)


def _share(owner: VisionLanguageModel, other: VisionLanguageModel) -> None:
    """Put one model's parameters in the place of the other's where both are frozen and of equal numbers.

    Their dtypes may differ, as those of a teacher in bfloat16 and of a student that a stage has exported do: a cast of
    both models comes after this.
    """
    owned = dict(owner.named_parameters())
    for name, parameter in list(other.named_parameters()):
        module, _, leaf = name.rpartition(".")
        same = owned.get(name)
        if same is None or same.requires_grad or parameter.requires_grad:
            continue
        dtype = torch.promote_types(same.dtype, parameter.dtype)
        if torch.equal(same.to(dtype), parameter.to(dtype)):
            setattr(other.get_submodule(module), leaf, same)
