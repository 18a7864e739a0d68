"""Example images in TensorBoard: what the model sees, what it is asked, what it answers and what is right."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from hybridvl.data.images import ImageConfig
from hybridvl.data.module import ChatDataModule
from hybridvl.training.answers import Question
from hybridvl.training.base import TrainingModule

INCHES, DPI = (4.0, 4.4), 100


class ExampleImages(Callback):
    """Draws a few questions of the first validation batch with generated replies after each validation.

    Args:
        count: how many; 0 draws none. They are of different samples where there are enough.
    """

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw for the first batch."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if batch_idx or trainer.sanity_checking or not self.count or not loggers or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, TrainingModule):
            return
        questions = spread(pl_module.questions(batch), self.count)
        datamodule = getattr(trainer, "datamodule", None)
        config = datamodule.images.config if isinstance(datamodule, ChatDataModule) else None
        for number, (question, reply) in enumerate(zip(questions, pl_module.replies(questions), strict=True)):
            image = None if question.pixel_values is None or config is None else last_image(question, config)
            picture = draw(image, pl_module.last_turn(question), reply, pl_module.text(question.answer))
            for logger in loggers:
                logger.experiment.add_image(f"examples/{number}", picture, trainer.global_step, dataformats="HWC")


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions: the n-th one of the n-th sample as far as there are so many, then others."""
    rows: dict[int, list[Question]] = {}
    for question in questions:
        rows.setdefault(question.row, []).append(question)
    chosen = [own[number % len(own)] for number, own in enumerate(rows.values())]
    rest = [question for question in questions if all(question is not other for other in chosen)]
    return (chosen + rest)[:count]


def last_image(question: Question, config: ImageConfig) -> NDArray[np.uint8]:
    """The last image of a question as (H, W, C) uint8, put together from its patches."""
    assert question.pixel_values is not None
    assert question.image_grid_thw is not None
    _, high, wide = (int(n) for n in question.image_grid_thw[-1])
    merge, patch = config.merge_size, config.patch_size
    rows = question.pixel_values[-high * wide :].float().cpu()
    shape = (high // merge, wide // merge, merge, merge, config.channels, config.temporal_patch_size, patch, patch)
    first = rows.reshape(shape)[..., 0, :, :]  # (h, w, merge, merge, C, patch, patch), the first of the equal frames
    pixels = first.permute(0, 2, 5, 1, 3, 6, 4).reshape(high * patch, wide * patch, config.channels)
    pixels = pixels * torch.tensor(config.std) + torch.tensor(config.mean)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def draw(image: NDArray[np.uint8] | None, question: str, reply: str, answer: str) -> NDArray[np.uint8]:
    """A picture (H, W, 3) uint8 of an image above the question, the reply and the right answer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from hybridvl.pictures import default_style, plain

    right = reply.strip() == answer.strip()
    lines = [
        (f"Q: {question}", "black"),
        (f"model: {reply}", "darkgreen" if right else "firebrick"),
        (f"right: {answer}", "black"),
    ]
    with default_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
        figure = Figure(figsize=INCHES, dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.02, 0.34, 0.96, 0.64))
        axes.set_axis_off()
        if image is not None:
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        height = 0.32
        for text, colour in lines:
            printable = "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
            wrapped = textwrap.wrap(plain(printable), 52)[:3]
            figure.text(0.03, height, "\n".join(wrapped), color=colour, fontsize=8, va="top", family="monospace")
            height -= 0.035 * len(wrapped) + 0.01
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
