"""Folders of shards: written as a whole or not at all, read without pickled code."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvl.layers.errors import ConfigError
from hybridvl.training.checkpoints import shards
from hybridvl.training.checkpoints.files import AtomicCheckpointIO, read_checkpoint
from hybridvl.training.checkpoints.shards import META, is_sharded_checkpoint, read_into, read_meta, write_sharded


def _alone(failed: str | None) -> str | None:
    return failed


def _checkpoint(seed: int = 0, rows: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(rows, 2, generator=generator) for name in ("net.b", "net.a")}
    state = {name: {"step": torch.tensor(4.0), "exp_avg": weight * 2} for name, weight in weights.items()}
    groups: list[dict[str, Any]] = [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["net.b"]}]
    groups += [{"lr": 0.2, "betas": (0.0, 0.1), "params": ["net.a"]}]
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": groups}],
        "global_step": 4,
        "random": {"torch": torch.arange(3)},
    }


def _write(folder: Path, seed: int = 0, rows: int = 3) -> dict[str, Any]:
    write_sharded(_checkpoint(seed, rows), folder, True, _alone)
    return _checkpoint(seed, rows)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5))
def test_a_folder_reads_as_the_checkpoint_of_one_process(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int
) -> None:
    path = tmp_path_factory.mktemp("folder") / "last.ckpt"
    wanted = _write(path, seed, rows)
    assert is_sharded_checkpoint(path)
    # torch's optimizers number parameters in the order of their groups.
    names = {"net.b": 0, "net.a": 1}
    (state,) = wanted["optimizer_states"]
    for group in state["param_groups"]:
        group["params"] = [names[name] for name in group["params"]]
    state["state"] = {names[name]: entry for name, entry in state["state"].items()}
    assert tiny.same(read_checkpoint(path), wanted)
    del wanted["optimizer_states"]
    assert tiny.same(read_checkpoint(path, optimizers=False), wanted)
    assert read_meta(path).keys() == {"global_step", "random"}


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    wanted = _write(tmp_path / "last.ckpt")["state_dict"]
    mine = {name: torch.zeros_like(weight) for name, weight in wanted.items()}
    kept = dict(mine)
    read_into({"state_dict": mine}, tmp_path / "last.ckpt")
    assert tiny.same(kept, wanted)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    weights = _write(path)["state_dict"]
    with pytest.raises(ConfigError, match=r"state_dict\.net\.a is in it, but not in what is trained"):
        read_into({"state_dict": {"net.b": weights["net.b"]}}, path)
    with pytest.raises(ConfigError, match=r"last\.ckpt: damaged, or of another model"):
        read_into({"state_dict": {**weights, "net.a": torch.zeros(7, 2)}}, path)


@pytest.mark.parametrize("earlier", ["file", "folder"])
def test_a_new_one_takes_the_place_of_an_earlier_one(tmp_path: Path, earlier: str) -> None:
    path = tmp_path / "last.ckpt"
    if earlier == "file":
        AtomicCheckpointIO().save_checkpoint(_checkpoint(1), path)
    else:
        _write(path, 1)
    _write(path, 2)
    assert tiny.same(read_checkpoint(path)["state_dict"], _checkpoint(2)["state_dict"])
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


@pytest.mark.parametrize("step", ["_save", "_exchange"])
def test_a_failure_leaves_the_earlier_one(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    _write(path, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, step, full)
        with pytest.raises(ConfigError, match=r"No space left on device; the earlier .*last\.ckpt is untouched"):
            _write(path, 2)
    assert tiny.same(read_checkpoint(path)["state_dict"], _checkpoint(1)["state_dict"])
    _write(path, 3)  # whatever the failure left behind
    assert tiny.same(read_checkpoint(path)["state_dict"], _checkpoint(3)["state_dict"])
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


def test_without_the_call_that_exchanges_names_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.ctypes, "CDLL", lambda _: object())
    _write(tmp_path / "last.ckpt", 1)
    _write(tmp_path / "last.ckpt", 2)
    assert tiny.same(read_checkpoint(tmp_path / "last.ckpt")["state_dict"], _checkpoint(2)["state_dict"])
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent/never").touch, ())


@pytest.mark.parametrize("file", [".metadata", META])
def test_pickled_code_and_damage_are_refused(tmp_path: Path, file: str) -> None:
    path = tmp_path / "last.ckpt"
    _write(path)
    whole = (path / file).read_bytes()
    for content in (pickle.dumps(_Code()), whole[: len(whole) // 2], b""):
        (path / file).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{file}: damaged"):
            read_checkpoint(path)
    (path / file).unlink()
    with pytest.raises(ConfigError, match="a folder, but no checkpoint"):
        read_checkpoint(path)


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    _write(path)
    (shard,) = path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"last\.ckpt: damaged, or of another model"):
        read_checkpoint(path)
