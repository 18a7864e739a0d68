"""Files and names of checkpoint folders: dtypes too narrow, links, folders in the way, old shards, impossible paths."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import small_model
from safetensors.torch import load_file, save_file

import hybridvl
from hybridvl.checkpoints import load_weights, open_checkpoint, read_config
from hybridvl.checkpoints.files import (
    parse_json,
    read_record,
    read_text,
    temporary_path,
    text_writer,
    write_files,
    write_json,
)
from hybridvl.layers import ConfigError

GATE = "decoder.layers.1.mlp.gate_proj.weight"
TOO_LARGE = f"{GATE} holds -70000, too large for float16; expected at most 65504"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with one number that float16 lacks."""
    hybridvl.save(small_model("full gdn"), tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    tensors[GATE][3, 5] = -70000.0
    save_file(tensors, tmp_path / "saved" / "model.safetensors")
    return tmp_path / "saved"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_numbers_that_a_dtype_cannot_hold(folder: Path) -> None:
    with pytest.raises(ConfigError, match=TOO_LARGE):
        hybridvl.load(folder, dtype=torch.float16)
    for wide in (torch.bfloat16, torch.float64):
        assert hybridvl.load(folder, dtype=wide).state_dict()[GATE][3, 5].item() == pytest.approx(-70000, rel=0.01)
    model = small_model("full gdn", torch.float16, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=TOO_LARGE):
        load_weights(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_dtypes_that_weights_do_not_have(folder: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"dtype: {dtype}; expected one of torch.bfloat16, torch.float16"):
        hybridvl.load(folder, dtype=dtype)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model-00009-of-00009.safetensors"])
def test_a_folder_that_has_the_name_of_a_file(tmp_path: Path, name: str) -> None:
    """Also of a file that would be removed."""
    hybridvl.save(small_model("full"), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"{name}: is a folder; expected a file, or nothing there"):
        hybridvl.save(small_model("gdn"), tmp_path)
    assert contents(tmp_path) == before


def test_links_become_files_of_their_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    hybridvl.save(small_model("full"), first)
    before = contents(first)
    second.mkdir()
    for name in before:
        (second / name).symlink_to(first / name)
    hybridvl.save(small_model("gdn"), second)
    assert contents(first) == before
    assert hybridvl.load(second).pattern == "gdn"


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyError("not an error of the disk")

    with pytest.raises(KeyError):
        write_files(tmp_path, {"a": text_writer("whole"), "b": fail})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("durable", "flushes"), [(True, 2), (False, 0)])
def test_json_is_replaced_as_a_whole(
    durable: bool, flushes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    path = tmp_path / "new" / "metrics.json"
    for content in ({"a": 1}, {"b": [0.5, None, "é"], "folder": Path("x")}):
        flushed.clear()
        write_json(path, content, durable)
        assert len(flushed) == flushes  # the file and the folder
    assert parse_json(read_text(path), path) == {"b": [0.5, None, "é"], "folder": "x"}
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(ConfigError, match=r"metrics\.json: cannot be written: No space left"):
        write_json(path, {"c": 2}, durable)
    assert "b" in parse_json(read_text(path), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"key": "a', b"[1]", b"\xff"])
def test_of_a_record_that_is_not_whole_nothing_is_known(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"key": "a"})
    assert read_record(path) == {"key": "a"}
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert read_record(path) == {}


def _full(*given: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_killed_process_has_left_goes(tmp_path: Path) -> None:
    """The next save removes it, also of files that it does not write itself; those of running processes stay."""
    kill = f"""
import os
from pathlib import Path
from hybridvl.checkpoints.files import write_files
def write(path):
    path.write_text("half")
    os.kill(os.getpid(), {int(signal.SIGKILL)})
write_files(Path({str(tmp_path)!r}), {{"model-00007-of-00009.safetensors": write}})
"""
    with subprocess.Popen([sys.executable, "-c", kill]) as killed:
        assert killed.wait(100) == -signal.SIGKILL
    left = temporary_path(tmp_path / "model-00007-of-00009.safetensors", process=killed.pid)
    assert list(tmp_path.iterdir()) == [left]
    config = tmp_path / "config.json"
    others = {temporary_path(config, process=os.getppid()).name, ".notes.tmp", ".config.json.x.tmp", "config.json.tmp"}
    # No process of this host says whether it is still written.
    others.add(temporary_path(config, "another-host", 999_999_999).name)
    for name in others:
        (tmp_path / name).write_text("another's")
    hybridvl.save(small_model("full"), tmp_path)
    assert set(contents(tmp_path)) == {"config.json", "model.safetensors", *others}


def test_old_shards_go_whatever_their_names(tmp_path: Path) -> None:
    """An index tells of them; it is not believed about what are no weights."""
    hybridvl.save(small_model("full"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "language.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "language.safetensors"), "language.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    index = {"metadata": {}, "weight_map": {**names, "other": "notes.txt"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    hybridvl.save(small_model("gdn"), tmp_path)
    assert set(contents(tmp_path)) == {"config.json", "model.safetensors", "notes.txt"}


@pytest.mark.parametrize("size", [0, "", -1, 1.5, True, "5", "5 apples"])
def test_shard_sizes_that_are_none_for_a_model_with_an_origin(tmp_path: Path, size: int) -> None:
    hybridvl.save(small_model("full"), tmp_path / "saved")
    with pytest.raises(
        ConfigError, match=r"max_shard_size: .*; expected a number of bytes of at least 1, or text like"
    ):
        hybridvl.save(hybridvl.load(tmp_path / "saved"), tmp_path / "again", max_shard_size=size)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b.safetensors", "a\0.safetensors", 3])
def test_an_index_that_points_elsewhere(tmp_path: Path, name: str) -> None:
    hybridvl.save(small_model("full"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(
        ConfigError, match=r"index.json: expected 'weight_map', an object of tensor names to file names"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("call", [hybridvl.load, open_checkpoint, read_config])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 5000, r"^x{120}\.\.\. \(5000 characters\): File name too long; expected a path"),
        ("a\0b", r"^'a\\x00b': embedded null byte; expected a path"),
        ("\ud800", r"^'\\ud800': .*; expected a path"),
    ],
    ids=["long", "nul", "surrogate"],
)
def test_paths_that_nothing_can_have(tmp_path: Path, call: Callable[[str], object], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(path)
    with pytest.raises(ConfigError, match=message):
        hybridvl.save(small_model("full"), path)


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config.json: lists or objects are nested too deeply"):
        read_config(tmp_path)
