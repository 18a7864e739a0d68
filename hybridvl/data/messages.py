"""Any data set of messages: a Hugging Face id, or a local folder or file, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridvl.data.rows import MessageColumns
from hybridvl.data.task import Sample, Source, Split, StreamSource, Task, require_split
from hybridvl.layers.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_EXPECTED = (
    "expected the id of a Hugging Face data set, a .parquet, .json or .jsonl file, or a folder of such files, "
    "of images with a metadata.jsonl, or made by save_to_disk"
)
VAL_NAMES = ("validation", "val", "valid", "dev")


class MessageData(Task):
    """Conversations from a data set with a column of messages and, usually, one of images.

    Args:
        path: the id of a Hugging Face data set, a .parquet, .json or .jsonl file, or a folder: of such files, of images
            with a metadata.jsonl, or saved with save_to_disk.
        name: configuration of a Hugging Face data set that has several.
        train_split: split to train on.
        val_split: split to validate on; null takes "validation" where there is one, and otherwise holds out the first
            val_samples of the training split.
        test_split: split to test on; null takes "test" where there is one, and the validation samples otherwise.
        val_samples: samples held out for validation where there is no split for it.
        streaming: read in order while training, without downloading or preparing the whole data set first.
        columns: which columns hold messages, images and kinds.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_samples: int = 256,
        streaming: bool = False,
        columns: MessageColumns = MessageColumns(),  # noqa: B008 - frozen
    ) -> None:
        if val_samples < 1:
            raise ConfigError(f"data.task.val_samples: {val_samples}; expected at least 1")
        self.path = path
        self.name = name
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_samples = val_samples
        self.streaming = streaming
        self.columns = columns
        self._loaded: Mapping[str, Any] | None = None

    def source(self, split: Split, seed: int) -> TableSource | RowStream:
        """The samples of a split; raises ConfigError when it is missing, unreadable or empty."""
        require_split(split)
        rows, label, first = self._rows(split)
        local = Path(self.path)
        folder = local.parent if local.is_file() else local
        if not self.streaming and not len(rows):
            raise _empty(label)
        rows = self.columns.prepare(rows, f"data.task.path: {label}")
        if self.streaming:
            return RowStream(rows, self.columns, folder, label)
        return TableSource(rows, self.columns, folder, label, first)

    def _rows(self, split: Split) -> tuple[Any, str, int]:
        """The rows of a split, what to call them, and the number of the first one."""
        if self._loaded is None:
            self._loaded = load_splits(self.path, self.name, self.streaming)
        wanted = {"train": self.train_split, "val": self.val_split, "test": self.test_split}[split]
        if split == "val" and wanted is None:
            wanted = next((name for name in VAL_NAMES if name in self._loaded), None)
        if split == "test" and wanted is None:
            if "test" not in self._loaded:
                return self._rows("val")
            wanted = "test"
        name = wanted or self.train_split
        if name not in self._loaded:
            raise ConfigError(
                f"data.task.{split}_split: {self.path} has no split {name!r}; it has {', '.join(self._loaded)}"
            )
        rows = self._loaded[name]
        held_out = self.val_split is None and not any(name in self._loaded for name in VAL_NAMES)
        if name == self.train_split and held_out:
            rows = self._hold_out(rows, split)
        first = self.val_samples if held_out and split == "train" else 0
        return rows, f"{self.path} ({name})", first

    def _hold_out(self, rows: Any, split: Split) -> Any:
        if self.streaming:
            return rows.skip(self.val_samples) if split == "train" else rows.take(self.val_samples)
        if not len(rows):
            return rows
        if len(rows) <= self.val_samples:
            raise ConfigError(
                f"data.task.val_samples: {self.val_samples} of the {len(rows)} samples of {self.path}; "
                "expected fewer, or a val_split"
            )
        chosen = range(self.val_samples, len(rows)) if split == "train" else range(self.val_samples)
        return rows.select(chosen)


class TableSource(Source):
    """Samples of a data set with random access; `first` is the number of the first row in its file."""

    def __init__(self, rows: Dataset, columns: MessageColumns, folder: Path, label: str, first: int = 0) -> None:
        self._rows = rows
        self._columns = columns
        self._folder = folder
        self._label = label
        self._first = first

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        """See `Source.place`."""
        return f"{self._label} row {self._first + index}"

    def sample(self, index: int, epoch: int) -> Sample:
        """Row `index`; the same in every epoch."""
        return self._columns.sample(self._rows[index], self._folder, self.place(index))


class RowStream(StreamSource):
    """Samples of a streamed data set."""

    def __init__(self, rows: IterableDataset, columns: MessageColumns, folder: Path, label: str) -> None:
        self._rows = rows
        self._columns = columns
        self._folder = folder
        self._label = label
        self._start: dict[str, Any] = rows.state_dict()

    def rows(self, epoch: int, state: dict[str, Any] | None) -> Iterator[Any]:
        """The rows from a state on, or all of them; every epoch reads them in the same order."""
        self._rows.load_state_dict(self._start if state is None else state)
        empty = state is None
        for row in self._rows:
            empty = False
            yield row
        if empty:
            raise _empty(self._label)

    def state_dict(self) -> dict[str, Any]:
        """Where reading stands."""
        return self._rows.state_dict()

    def decode(self, row: Any) -> Sample:
        """The sample of one row."""
        return self._columns.sample(row, self._folder, self._label)


def load_splits(path: str, name: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """The splits of a data set by name, from a Hugging Face id or from a local file or folder.

    Raises:
        ConfigError: it does not exist, cannot be read, or has no rows at all.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    local = Path(path)
    if not local.exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1 or local.suffix in BUILDERS):
        raise ConfigError(f"data.task.path: {path} does not exist; {_EXPECTED}")
    if local.is_file() and local.suffix not in BUILDERS:
        raise ConfigError(f"data.task.path: {path} is no data set; {_EXPECTED}")
    if local.is_file() and not local.stat().st_size:
        raise _empty(path)
    files = _table_files(local)
    try:
        if files:
            suffix = local.suffix if local.is_file() else Path(next(iter(files.values()))[0]).suffix
            return load_dataset(BUILDERS[suffix], data_files=files, streaming=streaming)
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return _saved(local, streaming)
        return load_dataset(path, name, streaming=streaming)
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise _empty(path) from error
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        first = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise ConfigError(f"data.task.path: {path} cannot be read: {first}; {_EXPECTED}") from error


def _table_files(local: Path) -> dict[str, list[str]]:
    """The files of a local data set by split, which a file's or folder's name says; {} when it is of another kind."""
    if local.is_file():
        return {"train": [str(local)]}
    found = [file for file in sorted(local.rglob("*")) if file.suffix in BUILDERS] if local.is_dir() else []
    saved = any(file.name in ("metadata.jsonl", "dataset_dict.json", "state.json") for file in found)
    if saved or len({BUILDERS[file.suffix] for file in found}) != 1:
        return {}
    files: dict[str, list[str]] = {}
    for file in found:
        words = re.split("[^a-z]+", str(file.relative_to(local).with_suffix("")).lower())
        split = next((word for word in words if word in ("train", "test", *VAL_NAMES)), "train")
        files.setdefault(split, []).append(str(file))
    return files


def _saved(folder: Path, streaming: bool) -> Mapping[str, Any]:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except IndexError as error:
        # Saving no rows writes no table, and reading then trips over the missing first one.
        raise _empty(str(folder)) from error
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    if not streaming:
        return splits
    return {key: part.to_iterable_dataset() for key, part in splits.items() if isinstance(part, Dataset)}


def _empty(label: str) -> ConfigError:
    return ConfigError(f"data.task.path: {label} is empty; expected at least one sample")
