"""What a run came to: metrics.json in its folder, and a few lines for the person who started it."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hybridvl.checkpoints.files import read_record, write_json
from hybridvl.training.base import TrainingModule
from hybridvl.training.callbacks.checkpoints import BEST, LAST, Checkpoints, checkpoint_folder
from hybridvl.training.callbacks.skipped import SkippedSamples
from hybridvl.training.callbacks.throughput import Throughput
from hybridvl.training.trainer import callback_of, is_dry_run, run_folder
from hybridvl.training.versions import versions

FILE = "metrics.json"


class RunSummary(Callback):
    """Writes metrics.json when a fit, a validation or a test ends.

    Keys: metrics (the latest value of each), pattern, parameters, trainable_parameters, steps, tokens, samples,
    seconds (of training steps), skipped (samples that were too long, by split), checkpoint, versions; and ended, the
    time at which a fit was through with its test, too: whoever waits for a run looks for that. What a validation or a
    test finds after that is not the fit's, and has a key of its own, later.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._facts: dict[str, Any] = {}
        self._fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember what runs: only a fit goes on with the metrics of its checkpoint."""
        self._fitting = stage == "fit"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect."""
        if not trainer.sanity_checking:
            self._collect(trainer)
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect and write."""
        self._collect(trainer)
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect and write."""
        self._collect(trainer)
        throughput = callback_of(trainer, Throughput)
        if throughput is not None:
            self._facts |= {
                "tokens": throughput.tokens,
                "samples": throughput.samples,
                "seconds": round(throughput.seconds, 3),
            }
        self._facts |= {"steps": trainer.global_step, "checkpoint": _checkpoint(trainer)}
        self._write(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take back that it has ended, and how it did in tests, if this is a run that is gone on with."""
        path = run_folder(trainer) / FILE
        if trainer.is_global_zero and not is_dry_run(trainer) and path.exists():
            facts = {name: value for name, value in read_record(path).items() if name != "ended"}
            metrics = facts.get("metrics") or {}
            facts["metrics"] = {tag: value for tag, value in metrics.items() if not tag.startswith("test/")}
            write_json(path, facts)

    def finish(self, trainer: Trainer) -> None:
        """Say in metrics.json that nothing of the fit is left to do."""
        path = run_folder(trainer) / FILE
        if trainer.is_global_zero and not is_dry_run(trainer) and path.exists():
            write_json(path, {**read_record(path), "ended": datetime.now(UTC).isoformat(timespec="seconds")})

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back for a fit; a validation or a test has only metrics of its own."""
        if self._fitting:
            self.metrics = dict(state_dict["metrics"])

    def lines(self, trainer: Trainer) -> list[str]:
        """What a person wants to know at the end: folder, checkpoint, scores, how to look at it."""
        folder = run_folder(trainer)
        shown = [f"{name} {value:.4f}" for name, value in sorted(self.metrics.items()) if name.startswith("test/")]
        shown = shown or [f"{name} {value:.4f}" for name, value in sorted(self.metrics.items()) if "val/" in name]
        lines = [f"run folder   {folder}"]
        if self._facts.get("checkpoint"):
            lines.append(f"checkpoint   {self._facts['checkpoint']}")
        if (folder / "model").is_dir():
            lines.append(f"model        {folder / 'model'}")
        lines += [f"skipped      {n} {split} samples, too long" for split, n in _skipped(trainer).items()]
        lines += [f"score        {line}" for line in shown]
        lines.append(f"watch        tensorboard --logdir {shlex.quote(str(folder.parent))}")
        return lines

    def _collect(self, trainer: Trainer) -> None:
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        parameters = list(module.parameters())
        path = run_folder(trainer) / FILE
        earlier = read_record(path)
        if "ended" in earlier:
            write_json(path, {**earlier, "later": {**earlier.get("later", {}), **self.metrics}})
            return
        facts = {
            **earlier,
            "metrics": {**earlier.get("metrics", {}), **self.metrics},
            "pattern": module.net.pattern if isinstance(module, TrainingModule) else None,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            **self._facts,
            **({"skipped": _skipped(trainer)} if _skipped(trainer) else {}),
            "versions": versions(),
        }
        write_json(path, facts)


def _skipped(trainer: Trainer) -> dict[str, int]:
    skipped = callback_of(trainer, SkippedSamples)
    return {} if skipped is None else skipped.counts


def _checkpoint(trainer: Trainer) -> str | None:
    keeper = callback_of(trainer, Checkpoints)
    name = BEST if keeper is not None and keeper.best is not None else LAST
    path = checkpoint_folder(trainer) / name
    return str(path) if path.exists() else None
