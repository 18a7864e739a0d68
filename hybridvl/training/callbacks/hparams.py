"""TensorBoard's HParams page: the few settings a person compares, beside metrics that are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from hybridvl.data.digits import DigitPages
from hybridvl.training.base import TrainingModule

_METRICS = ("val/loss", "val/token_accuracy", "val/exact", "test/exact")
_OF_PAGES = ("test/digit_accuracy",)  # answers of other tasks need not be digits that are read


class HParams(Callback):
    """Declares the run's settings, or its labels alone where it has some, and the tags of its metrics at the start.

    HParams reads a metric from the scalars of that tag, so the page shows the latest real value at any time, also of
    a run that was killed; no placeholder is ever written. A run counts as a success once its fit is through.

    Args:
        seed: of the run.
        labels: what tells the run from others; empty: the usual settings are shown.
        metrics: tags of the metrics' columns; empty: the usual ones.
    """

    def __init__(self, seed: object = "", labels: Mapping[str, str] | None = None, metrics: Sequence[str] = ()) -> None:
        self.seed = seed
        self.labels = dict(labels or {})
        self.metrics = tuple(metrics)
        self._end: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings, on the first process."""
        if not trainer.is_global_zero:
            return
        from torch.utils.tensorboard.summary import hparams

        # Labels stay texts: a column of numbers for some runs and texts for others can be neither sorted nor filtered.
        # The seed is one, too, as TensorBoard would show 1.0000.
        settings = {**(self.labels or settings_of(pl_module)), "seed": str(self.seed)}
        values = {name: _plain(value) for name, value in settings.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment._get_file_writer()
                *starts, self._end = hparams(values, dict.fromkeys(self.metrics or _usual_metrics(trainer), 0.0))
                for summary in starts:
                    writer.add_summary(summary)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the fit has come to its end, on the first process."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self._end is not None:
                logger.experiment._get_file_writer().add_summary(self._end)


def settings_of(module: LightningModule) -> dict[str, Any]:
    """What people usually tell runs apart by: stage, pattern, sizes and optimizer."""
    if not isinstance(module, TrainingModule):
        return {}
    net, optimizer = module.config, module.optimizer_config
    return {
        **module.compared_settings(),
        "pattern": module.net.pattern,
        "width": net.width,
        "mlp_width": net.mlp_width,
        "parameters": module.net.num_params,
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "warmup_steps": optimizer.warmup_steps,
    }


def _usual_metrics(trainer: Trainer) -> tuple[str, ...]:
    task = getattr(trainer.datamodule, "task", None)  # type: ignore[attr-defined]
    return (*_METRICS, *_OF_PAGES) if isinstance(task, DigitPages) else _METRICS


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
