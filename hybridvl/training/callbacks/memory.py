"""Memory of the training process and of the GPU."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.resident import resident_bytes
from hybridvl.training.trainer import logs_now

MIB = 2**20


class MemoryMonitor(Callback):
    """Logs memory/rss_mib and memory/peak_rss_mib of this process (workers aside), and memory/cuda_peak_mib."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when the trainer logs."""
        if not logs_now(trainer):
            return
        for logger in trainer.loggers:
            logger.log_metrics(memory_usage(), step=trainer.global_step)


def memory_usage() -> dict[str, float]:
    """Metric names and MiB."""
    # ru_maxrss counts KiB, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    usage = {"memory/peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB}
    resident = resident_bytes()
    if resident is not None:
        usage["memory/rss_mib"] = resident / MIB
    if torch.cuda.is_available():
        usage["memory/cuda_peak_mib"] = torch.cuda.max_memory_allocated() / MIB
    return usage
