"""A progress bar over the optimizer steps of a whole fit, with the newest metrics beside it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class StepProgress(ProgressBar):
    """One line for the fit, from the first step to the last, and one for each evaluation while it runs.

    Where the output is not a terminal (a log file), it prints a plain line at each validation instead.

    Args:
        console: where to draw; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._fit: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._enabled = True

    def enable(self) -> None:
        """Draw (on the first process)."""
        self._enabled = True

    def disable(self) -> None:
        """Draw nothing (on the other processes)."""
        self._enabled = False

    def print(self, *args: Any) -> None:
        """Print above the bar."""
        self._console.print(*args)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the fit's line."""
        total = trainer.estimated_stepping_batches
        finite = None if total == float("inf") else int(total)
        self._fit = self._add("train", finite, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        self._update(self._fit, trainer.global_step, self._shown(trainer, "train/loss", "val/exact"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the line as it is."""
        self._update(self._fit, trainer.global_step, self._shown(trainer, "train/loss", "val/exact"))
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a line for the validation."""
        self._evaluation = self._add("validate", _finite(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        self._update(self._evaluation, batch_idx + 1, "")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the validation's line away; in a log file, say where the fit stands."""
        self._remove()
        if trainer.state.fn != "fit":
            self._stop()
        elif self._enabled and not self._console.is_terminal and not trainer.sanity_checking:
            shown = self._shown(trainer, "train/loss", "val/loss", "val/exact")
            self._console.print(f"step {trainer.global_step}  {shown}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a line for the test."""
        self._evaluation = self._add("test", _finite(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        self._update(self._evaluation, batch_idx + 1, "")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the line as it is."""
        self._stop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a line for the predictions."""
        self._evaluation = self._add("predict", _finite(trainer.num_predict_batches))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        self._update(self._evaluation, batch_idx + 1, "")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the line as it is."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _add(self, label: str, total: int | None, completed: int = 0) -> TaskID | None:
        if not self._enabled or not self._console.is_terminal:
            return None
        if self._progress is None:
            columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=self._console
            )
            self._progress.start()
        return self._progress.add_task(label, total=total, completed=completed, shown="")

    def _update(self, task: TaskID | None, completed: int, shown: str) -> None:
        if self._progress is not None and task is not None:
            self._progress.update(task, completed=completed, shown=shown)

    def _remove(self) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
        self._evaluation = None

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._fit = self._evaluation = None

    def _shown(self, trainer: Trainer, *names: str) -> str:
        metrics = trainer.callback_metrics
        return "  ".join(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics)


def _finite(batches: Any) -> int | None:
    """The number of batches of one or several loaders; None when it is not known."""
    total = sum(batches) if isinstance(batches, list) else batches
    return None if total == float("inf") else int(total)
