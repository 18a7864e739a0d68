"""What stands on disk about the runs of a stage: what each was started with, and whether it is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridvl.checkpoints.files import read_record, read_text, write_json
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.description import Stage
from hybridvl.pipeline.mappings import read_mapping

DONE = "done.json"
_RECORD = re.compile(r"version_(?P<number>[0-9]{1,9})(\.json)?")


@dataclass(frozen=True)
class StageRun:
    """One run of a stage: a run folder of `hybridvl fit`, a record of its start beside it and a mark of its end."""

    folder: Path

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.folder / "model"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to go on from."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def record(self) -> Path:
        """What the run was started with; beside the folder, which a refused fit removes."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def key(self) -> str | None:
        """What it was started with, see `stage_key`; None when there is no record."""
        return read_record(self.record).get("key")

    @property
    def is_done(self) -> bool:
        """Whether the stage ended well here: the mark is written last, and the model is there."""
        return self._has_model and self.key is not None and read_record(self.folder / DONE).get("key") == self.key

    @property
    def mark(self) -> str:
        """A digest of this very run; another run of the same stage has another one."""
        return hashlib.sha256(read_text(self.folder / DONE).encode()).hexdigest()

    def begin(self, stage: Stage, key: str, arguments: list[str]) -> None:
        """Write what the run is started with."""
        recipes = [str(path) for path in stage.recipes]
        facts = {"stage": stage.name, "recipes": recipes, "overrides": dict(stage.overrides), "arguments": arguments}
        write_json(self.record, {"key": key, **facts})

    def finish(self, finished: str) -> None:
        """Mark it as done at a time; a run that left no model is refused."""
        if not self._has_model:
            raise ConfigError(f"{self.model}: no model, though the fit ended well; expected one (was it a dry run?)")
        write_json(self.folder / DONE, {"key": self.key, "finished": finished})

    def forget_refused(self) -> None:
        """Remove the record if the fit was refused, so that there is no folder."""
        if not self.folder.exists():
            self.record.unlink(missing_ok=True)

    @property
    def _has_model(self) -> bool:
        return (self.model / "config.json").is_file()


def stage_key(stage: Stage, marks: Mapping[str, str]) -> str:
    """A digest of all that decides what a stage does: its recipes, its overrides, and the runs that it starts from.

    marks: `StageRun.mark` of every stage in `stage.needs`.
    """
    recipes = [read_mapping(path) for path in stage.recipes]
    parts = [recipes, dict(stage.overrides), {name: marks[name] for name in stage.needs}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def find_run(folder: Path, key: str) -> StageRun | None:
    """The newest run in a stage's folder that was started with this key."""
    runs = [StageRun(folder / f"version_{number}") for number in sorted(_numbers(folder), reverse=True)]
    return next((run for run in runs if run.key == key), None)


def new_run(folder: Path) -> StageRun:
    """A run that is not there yet, numbered after those that are."""
    return StageRun(folder / f"version_{max(_numbers(folder), default=-1) + 1}")


def _numbers(folder: Path) -> set[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {int(match["number"]) for match in map(_RECORD.fullmatch, names) if match is not None}
