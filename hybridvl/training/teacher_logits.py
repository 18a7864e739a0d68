"""A teacher's most likely next tokens kept in parquet files, found again by what a sample consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hybridvl.checkpoints import open_checkpoint
from hybridvl.checkpoints.files import parse_json, read_text, write_files
from hybridvl.data.chat import IGNORED
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.training.answers import sample_parts
from hybridvl.training.base import Batch, visual_tokens
from hybridvl.training.losses.top_divergence import TopTokens

FACTS = "teacher_logits.json"
"""The file of a folder that says what its parquet files are of."""

_PLACE = "model.teacher_logits"
_PENDING = 2**26  # bytes in memory before a file is written
_ROW_GROUP = 2**20  # bytes that are read for one sample, about
_FLOATS = pa.list_(pa.float32())
_SCHEMA = pa.schema({"key": pa.string(), "tokens": pa.list_(pa.int32()), "log_probs": _FLOATS, "rest": _FLOATS})


@dataclass(frozen=True)
class TeacherLogitsConfig:
    """Where a teacher's next tokens are kept, and how many of them.

    Attributes:
        folder: of the files; several runs may share it, at the same time too.
        top_k: tokens that are kept of each distribution, the most likely ones.
    """

    folder: str
    top_k: int = 64

    def __post_init__(self) -> None:
        if not self.folder or (Path(self.folder).exists() and not Path(self.folder).is_dir()):
            raise ConfigError(f"{_PLACE}.folder: {self.folder!r}; expected a folder, which need not be there yet")
        if self.top_k < 1:
            raise ConfigError(f"{_PLACE}.top_k: {self.top_k!r}; expected a whole number of at least 1")


class TeacherLogits:
    """What is known of one teacher's distributions, by the key of a sample; see `sample_keys`.

    What is added is found at once; it is written when there is enough of it and by `flush`. Files never change, and
    each process writes its own.

    Args:
        folder: of the files; it need not be there yet.
        facts: what must be the same for an entry to be of use.

    Raises:
        ConfigError: the folder was made with other facts, or something in it cannot be read.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.facts = dict(facts)
        self.top_k = int(facts["top_k"])
        self._check_facts()
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, row group, row in it
        self._pending: dict[str, TopTokens] = {}
        self._bytes = 0
        for path in sorted(self.folder.glob("*.parquet")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def find(self, key: str, tokens: int) -> TopTokens | None:
        """What is known of a sample at so many tokens, on the CPU; None if nothing is."""
        if key in self._pending:
            return self._pending[key]
        if key not in self._places:
            return None
        path, group, row = self._places[key]
        columns = _row_group(path, group)
        ids, log_probs, rest = (
            torch.from_numpy(np.array(columns[name][row].values)) for name in ("tokens", "log_probs", "rest")
        )
        shape = tokens, self.top_k
        if len(rest) != tokens or not len(ids) == len(log_probs) == shape[0] * shape[1]:
            raise ConfigError(f"{_PLACE}.folder: {path}: damaged, an entry is not of {tokens} tokens")
        return TopTokens(ids.view(shape), log_probs.view(shape), rest)

    def add(self, key: str, top: TopTokens) -> None:
        """Keep what has been found out about a sample."""
        if key in self._places or key in self._pending:
            return
        self._pending[key] = TopTokens(*(value.cpu().clone() for value in top))
        self._bytes += sum(value.nbytes for value in top)
        if self._bytes >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if not self._pending:
            return
        columns = [
            [value.flatten().numpy() for value in column] for column in zip(*self._pending.values(), strict=True)
        ]
        table = pa.table([list(self._pending), *columns], schema=_SCHEMA)
        group = max(1, _ROW_GROUP * len(self._pending) // max(1, self._bytes))
        name = f"part-{uuid4().hex}.parquet"
        facts = {FACTS: lambda path: path.write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")}
        files = {name: partial(pq.write_table, table, row_group_size=group, compression="zstd")}
        with within(f"{_PLACE}.folder"):
            self._check_facts()  # somebody else's first file may have come in between
            write_files(self.folder, files if (self.folder / FACTS).exists() else {**files, **facts})
        self._index(self.folder / name)
        self._pending.clear()
        self._bytes = 0

    def _check_facts(self) -> None:
        path = self.folder / FACTS
        if not path.exists():
            return
        with within(f"{_PLACE}.folder"):
            found = parse_json(read_text(path), path)
        for name in sorted({*found, *self.facts}):
            if found.get(name) != self.facts.get(name):
                raise ConfigError(
                    f"{_PLACE}.folder: {self.folder} was made with {name} = {found.get(name)!r}; here it is "
                    f"{self.facts.get(name)!r}; expected the same, or another folder"
                )

    def _index(self, path: Path) -> None:
        for group in range(_opened(path).num_row_groups):
            for row, key in enumerate(_read(path, group, ["key"])["key"].to_pylist()):
                self._places[key] = path, group, row


def open_teacher_logits(config: TeacherLogitsConfig, teacher: str, temperature: float, tokens: str) -> TeacherLogits:
    """What is kept of a teacher, at a temperature, at `tokens` ("all" or "answers"); nothing in a new folder.

    Raises:
        ConfigError: the folder is of another teacher or of other settings, or top_k exceeds the vocabulary.
    """
    with within("model.student.teacher"):
        checkpoint = open_checkpoint(teacher)
    vocabulary = checkpoint.config.vocab_size
    if config.top_k > vocabulary:
        raise ConfigError(f"{_PLACE}.top_k: {config.top_k}; expected at most {vocabulary}, the size of the vocabulary")
    facts = {"format": 1, "teacher": teacher_digest(teacher), "vocabulary": vocabulary, "top_k": config.top_k}
    return TeacherLogits(config.folder, {**facts, "temperature": temperature, "tokens": tokens})


def teacher_digest(teacher: str) -> str:
    """A digest of all that decides what a model folder computes: its configuration and its weights, not their files."""
    checkpoint = open_checkpoint(teacher)
    digest = hashlib.sha256(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode())
    for name in sorted(checkpoint.names):
        _add(digest, name, checkpoint.tensor(name))
    return digest.hexdigest()


def sample_keys(batch: Batch, net: ModelConfig, tokens: str) -> list[tuple[str, int]]:
    """For each sample of a batch a digest of all that it consists of, and at how many tokens distributions are kept.

    Order, epoch and batch do not matter, nor whether a batch is padded or packed. tokens: "all" or "answers".
    """
    keys = []
    for parts in sample_parts(batch, *visual_tokens(net)):
        digest = hashlib.sha256()
        for number, part in enumerate(parts):
            if part is not None:
                _add(digest, str(number), part.float() if part.is_floating_point() else part)
        ids, labels = parts[:2]
        assert ids is not None
        assert labels is not None
        count = int((labels[1:] != IGNORED).sum()) if tokens == "answers" else len(ids)
        keys.append((digest.hexdigest()[:40], count))
    return keys


def _add(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@lru_cache(maxsize=32)
def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{_PLACE}.folder: {path}: damaged or no parquet file") from error


@lru_cache(maxsize=8)
def _row_group(path: Path, group: int) -> pa.Table:
    """A row group of a file, which never changes."""
    return _read(path, group, None)


def _read(path: Path, group: int, columns: list[str] | None) -> pa.Table:
    try:
        return _opened(path).read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{_PLACE}.folder: {path}: damaged or no parquet file") from error
