"""The easy-VQA task: 5,000 drawn images and 48,248 questions about them, from the package of that name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from hybridvl.data.images import open_image
from hybridvl.data.task import SPLITS, Sample, Source, Split, Task, kind_weights, require_split
from hybridvl.layers.errors import ConfigError

DEFAULT_KINDS = {"shape": 1.0, "color": 1.0, "present": 2.0, "absent": 2.0}
"""Kinds of training questions and how often each is drawn: which shape, which color, and is there one that is (not)."""

WORDS = {
    "shape": frozenset({"circle", "rectangle", "triangle"}),
    "color": frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}),
}
"""What the questions are about, and the words for it."""

_NEGATIONS = frozenset({"not", "no"})


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    kind: one of DEFAULT_KINDS. about: "shape" or "color", what one must see to answer it. tells: what question and
    answer together give away of the two.
    """

    text: str
    answer: str
    kind: str
    about: str
    tells: frozenset[str]


class EasyVQA(Task):
    """Shapes in colors and what others asked about them, with the package's own training and test questions.

    A training sample is one image with several of its questions, drawn anew in every epoch. None of them is given away
    by an earlier one ("what color is the circle?"), so that every answer must be seen; and of the yes-or-no questions
    about as many ask for what is there as for what is not, since the package's own are guessed right four times in
    five from their words alone. A validation or test sample is one question as the package has it. Validation images
    are held out from the package's training images.

    Args:
        turns: questions drawn for one training image, in one conversation; fewer are asked where the image has no more
            of a kind.
        kinds: kinds of training questions and their weights: "shape", "color", "present", "absent".
        shapes_first: epochs in which training asks only for shapes, which are learned far more slowly when colors,
            which are easier to see, are asked for from the beginning.
        augment: mirror training images at random; no question asks about left or right.
        val_images: training images that are held out for validation.
        val_questions: validation questions at most, spread over those images; null takes all.
        test_questions: the same for the package's 9,673 test questions.
    """

    def __init__(
        self,
        turns: int = 4,
        kinds: dict[str, float] | None = None,
        shapes_first: int = 0,
        augment: bool = True,
        val_images: int = 400,
        val_questions: int | None = 1_000,
        test_questions: int | None = None,
    ) -> None:
        limits = {"turns": turns, "val_images": val_images, "val_questions": val_questions}
        for name, value in {**limits, "test_questions": test_questions}.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.task.{name}: {value}; expected at least 1")
        if shapes_first < 0:
            raise ConfigError(f"data.task.shapes_first: {shapes_first}; expected a number of epochs, at least 0")
        self.turns = turns
        self.kinds = kind_weights(DEFAULT_KINDS if kinds is None else kinds, DEFAULT_KINDS)
        self.shapes_first = shapes_first
        self.augment = augment
        self.val_images = val_images
        self.limits = {"val": val_questions, "test": test_questions}

    def source(self, split: Split, seed: int) -> EasyVQASource:
        """The samples of a split; raises ConfigError when the package is not installed."""
        require_split(split)
        return EasyVQASource(self, split, seed)


class EasyVQASource(Source):
    """The images and questions of one split."""

    def __init__(self, task: EasyVQA, split: Split, seed: int) -> None:
        self.task = task
        self.split = split
        self.seed = seed
        paths, questions = _load("test" if split == "test" else "train")
        numbers = sorted(questions)
        if split != "test":
            if task.val_images >= len(numbers):
                raise ConfigError(
                    f"data.task.val_images: {task.val_images}; expected fewer than the {len(numbers)} training images"
                )
            numbers = numbers[: task.val_images] if split == "val" else numbers[task.val_images :]
        self.image_numbers = numbers
        self._paths = paths
        self._questions = questions
        self._single = [] if split == "train" else self._spread()

    def __len__(self) -> int:
        return len(self.image_numbers) if self.split == "train" else len(self._single)

    def sample(self, index: int, epoch: int) -> Sample:
        """Training: image `index` with some of its questions. Otherwise: question `index` alone."""
        if self.split != "train":
            number, question = self._single[index]
            return _conversation(_picture(self._paths[number]), [question])
        rng = np.random.default_rng([self.seed, SPLITS.index("train"), epoch, index])
        number = self.image_numbers[index]
        chosen = self._draw(self._questions[number], epoch, rng)
        picture = _picture(self._paths[number])
        if self.task.augment and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _conversation(picture, chosen)

    def _draw(self, asked: list[Question], epoch: int, rng: np.random.Generator) -> list[Question]:
        """Questions of kinds drawn by weight, none of which the ones before give away; at least one."""
        kinds = {"shape": 1.0} if epoch < self.task.shapes_first else self.task.kinds
        weights = np.array(list(kinds.values()))
        chosen: list[Question] = []
        told: frozenset[str] = frozenset()
        for kind in rng.choice(list(kinds), size=self.task.turns, p=weights / weights.sum()):
            fitting = [q for q in asked if q.kind == kind and q.about not in told and q not in chosen]
            if fitting:
                chosen.append(fitting[rng.integers(len(fitting))])
                told |= chosen[-1].tells
        return chosen or [asked[rng.integers(len(asked))]]

    def _spread(self) -> list[tuple[int, Question]]:
        every = [(number, question) for number in self.image_numbers for question in self._questions[number]]
        limit = self.task.limits[self.split]
        if limit is None or limit >= len(every):
            return every
        return [every[place] for place in np.linspace(0, len(every) - 1, limit).round().astype(int)]


def read_question(text: str, answer: str) -> Question:
    """A question of the package with what it is about."""
    words = set(text.rstrip("?").split())
    named = frozenset(about for about, known in WORDS.items() if words & known)
    if answer not in ("yes", "no"):
        about = "shape" if answer in WORDS["shape"] else "color"
        return Question(text, answer, about, about, named | {about})
    (about,) = named
    there = (answer == "yes") != bool(words & _NEGATIONS)
    return Question(text, answer, "present" if there else "absent", about, named if there else frozenset())


def _conversation(picture: Image.Image, questions: list[Question]) -> Sample:
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture}] if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    return {"messages": messages, "kinds": [_scored(question.kind) for question in questions]}


def _scored(kind: str) -> str:
    """The kind under which a question is scored: yes-or-no questions together, as the package has them."""
    return "presence" if kind in ("present", "absent") else kind


@lru_cache(maxsize=4096)
def _picture(path: str) -> Image.Image:
    return open_image(path).convert("RGB")


@lru_cache(maxsize=2)
def _load(part: str) -> tuple[dict[int, str], dict[int, list[Question]]]:
    """The image files, and the questions of each image, by image number."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ConfigError(
            "data.task: EasyVQA needs the package easy-vqa, which is not installed; "
            'install it with: pip install -c constraints.txt -e ".[demo]"'
        ) from error
    if part == "test":
        paths, columns = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    else:
        paths, columns = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    questions: dict[int, list[Question]] = {}
    for question, answer, number in zip(*columns, strict=True):
        questions.setdefault(number, []).append(read_question(question, answer))
    return paths, questions
