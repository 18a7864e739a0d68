"""The easy-VQA task: 5,000 drawn images and 48,248 questions about them, from the package of that name."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from hybridvl.data.images import open_image
from hybridvl.data.task import SPLITS, Sample, Source, Split, Task, require_split
from hybridvl.layers.errors import ConfigError

Question = tuple[str, str]
"""A question and its answer."""


class EasyVQA(Task):
    """Shapes in colours and what others asked about them, with the package's own training and test questions.

    A training sample is one image with several of its questions, drawn anew in every epoch; a validation or test
    sample is one question. Validation images are held out from the package's training images.

    Args:
        turns: questions asked about one training image at most, in one conversation; earlier questions may give away
            the answers of later ones ("what color is the circle?"), which validation and test questions never do.
        augment: mirror training images at random; no question asks about left or right.
        val_images: training images that are held out for validation.
        val_questions: validation questions at most, spread over those images; null takes all.
        test_questions: the same for the package's 9,673 test questions.
    """

    def __init__(
        self,
        turns: int = 8,
        augment: bool = True,
        val_images: int = 400,
        val_questions: int | None = 1_000,
        test_questions: int | None = None,
    ) -> None:
        limits = {"turns": turns, "val_images": val_images, "val_questions": val_questions}
        for name, value in {**limits, "test_questions": test_questions}.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.task.{name}: {value}; expected at least 1")
        self.turns = turns
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
        asked = self._questions[number]
        chosen = rng.permutation(len(asked))[: self.task.turns]
        picture = _picture(self._paths[number])
        if self.task.augment and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _conversation(picture, [asked[place] for place in chosen])

    def _spread(self) -> list[tuple[int, Question]]:
        every = [(number, question) for number in self.image_numbers for question in self._questions[number]]
        limit = self.task.limits[self.split]
        if limit is None or limit >= len(every):
            return every
        return [every[place] for place in np.linspace(0, len(every) - 1, limit).round().astype(int)]


def _conversation(picture: Image.Image, questions: list[Question]) -> Sample:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(questions):
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture}] if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "kinds": [_kind(answer) for _, answer in questions]}


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "presence"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


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
            "install it with: pip install 'hybridvl[demo]'"
        ) from error
    if part == "test":
        paths, columns = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    else:
        paths, columns = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    questions: dict[int, list[Question]] = {}
    for question, answer, number in zip(*columns, strict=True):
        questions.setdefault(number, []).append((question, answer))
    return paths, questions
