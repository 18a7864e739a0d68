"""Checkpoint files: whole or absent, and nothing but tensors is read."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import tiny
import torch

from hybridvl.checkpoints.files import temporary_path
from hybridvl.layers.errors import ConfigError
from hybridvl.training.checkpoints.files import AtomicCheckpointIO, read_checkpoint

GOOD = {"state_dict": {"weight": torch.arange(5.0)}, "global_step": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "er" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    return path


def test_what_is_saved_is_read_back(saved: Path) -> None:
    assert tiny.same(AtomicCheckpointIO().load_checkpoint(saved), GOOD)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b))[1])
    AtomicCheckpointIO().save_checkpoint(GOOD, tmp_path / "a.ckpt")
    assert steps == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_earlier_file(saved: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def full(handle: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=f"{os.strerror(reason)}; the earlier .*last.ckpt is untouched"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved)
    assert tiny.same(read_checkpoint(saved), GOOD)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    temporary_path(path).symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left on device; the earlier"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(100_000)}}, path)
    assert tiny.same(read_checkpoint(path), GOOD)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot save the checkpoint .*file/last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint(GOOD, tmp_path / "file" / "last.ckpt")


def test_removing_what_is_not_there_is_no_error(saved: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(saved)
    AtomicCheckpointIO().remove_checkpoint(saved)
    assert not saved.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "damaged"), (b"not a checkpoint", "damaged|pickled"), (b"PK\x03\x04xx", "damaged")],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.ckpt: .*({message})"):
        read_checkpoint(path)


def test_tensors_alone_are_not_a_training_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="no 'state_dict'"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.filterwarnings("error")
def test_a_pickle_of_another_protocol_is_refused_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Path("x")}, protocol=4))
    with pytest.raises(ConfigError, match="pickled Python objects"):
        read_checkpoint(path)
