"""Random number generators that go on, after a resume, exactly where the checkpoint left them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ExactResume(Callback):
    """Gives training steps a random stream of their own, and saves it in checkpoints.

    The state of Python's, numpy's and torch's generators is kept at the end of each training step and put back at the
    start of the next. What happens between (validation, drawn examples, new loader iterators, a kill and a resume)
    therefore never changes the training.
    """

    def __init__(self) -> None:
        self._after_step: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put back what the previous training step left."""
        if self._after_step is not None:
            set_random_state(self._after_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what this step leaves."""
        self._after_step = random_state()

    def state_dict(self) -> dict[str, Any]:
        """The generators' states, as plain values and tensors."""
        return {} if self._after_step is None else dict(self._after_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back; they are set when the next training step begins."""
        self._after_step = dict(state_dict) or None


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and every GPU's generator; loads with `weights_only=True`."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
