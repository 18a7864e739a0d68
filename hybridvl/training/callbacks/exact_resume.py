"""Random number generators that go on, after a resume, exactly where the checkpoint left them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.layers.errors import ConfigError
from hybridvl.training.processes.sums import gathered, process_rank, processes

FROZEN_KEY = "hybridvl_frozen"
"""Where a checkpoint keeps the names of the parameters that were not trained."""


class ExactResume(Callback):
    """Gives training steps a random stream of their own, and saves it in checkpoints.

    The state of Python's, numpy's and torch's generators is kept at the end of each training step and put back at the
    start of the next. What happens between (validation, drawn examples, new loader iterators, a kill and a resume)
    therefore never changes the training. A checkpoint that trained other parameters is refused, and a validation or a
    test of a checkpoint logs at the checkpoint's step.
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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what was not trained."""
        checkpoint[FROZEN_KEY] = _frozen(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on only with the parameters that were trained; take the step for what is not a fit."""
        if trainer.state.fn == "fit":
            changed = set(checkpoint.get(FROZEN_KEY, _frozen(pl_module))) ^ set(_frozen(pl_module))
            if changed:
                first = min(changed)
                state = "frozen" if first in _frozen(pl_module) else "trained"
                raise ConfigError(
                    f"model.freeze: {len(changed)} parameters are frozen in only one of the checkpoint and the recipe "
                    f"({first} is {state} here); a resume needs the freeze of the checkpoint"
                )
        elif trainer.global_step == 0 and "loops" in checkpoint:
            progress = checkpoint["loops"]["fit_loop"]
            # A checkpoint is saved before the loop counts the last step for its loggers.
            progress["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
            trainer.fit_loop.load_state_dict(progress)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states of every process, as plain values and tensors; all of them must call this."""
        return {} if self._after_step is None else {"processes": gathered(self._after_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back; they are set when the next training step begins."""
        states = state_dict.get("processes", [])
        # Another number of processes goes on with states of its own.
        self._after_step = states[process_rank()] if len(states) == processes() else None


def _frozen(module: LightningModule) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


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
