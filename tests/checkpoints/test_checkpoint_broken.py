"""Damaged folders of other projects: every kind of damage has its own message, and nothing is half loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import DATA
from safetensors.torch import load_file, save_file
from torch import Tensor

import hybridvl
from hybridvl.checkpoints import load_weights, open_checkpoint
from hybridvl.layers import ConfigError

QWEN = DATA / "qwen2_5_vl_tiny"
NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Qwen2.5-VL in two shards."""
    shutil.copy(QWEN / "config.json", tmp_path / "config.json")
    tensors = load_file(QWEN / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hybridvl.load(tmp_path)
    return tmp_path


def change(folder: Path, name: str, make: Callable[[Tensors], object], index: bool = True) -> None:
    """Change the shard that holds a tensor, and the index with it."""
    place = folder / "model.safetensors.index.json"
    values = json.loads(place.read_text())
    file = values["weight_map"][name]
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / file).items()}
    make(tensors)
    save_file(tensors, folder / file)
    if index:
        others = {key: other for key, other in values["weight_map"].items() if other != file}
        place.write_text(json.dumps({**values, "weight_map": {**others, **dict.fromkeys(tensors, file)}}))


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    """Put one number into the middle of a tensor."""
    return lambda tensors: tensors[name].view(-1).__setitem__(17, value)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (NORM, lambda tensors: tensors.pop(NORM), f"beside them: missing: {NORM}$"),
        (NORM, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), "beside them: left over: model.extra$"),
        (
            GATE,
            lambda tensors: tensors.update({GATE: tensors[GATE][:, 1:].contiguous()}),
            rf"beside them: {GATE} has shape \(80, 63\), expected \(80, 64\)$",
        ),
        (
            GATE,
            lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)}),
            f"beside them: {GATE} has dtype torch.int8, expected a floating-point one$",
        ),
        (GATE, fill(GATE, float("nan")), f"{GATE} holds NaN or infinite numbers; expected finite weights$"),
        (GATE, fill(GATE, float("-inf")), f"{GATE} holds NaN or infinite numbers; expected finite weights$"),
        (
            NORM,
            lambda tensors: tensors.update({"model.language_model.norm.weight": tensors[NORM].clone()}),
            "model.language_model.norm.weight and model.norm.weight are the same tensor$",
        ),
        (
            NORM,
            lambda tensors: (tensors.pop(NORM), tensors.update({"a": torch.ones(1), "b": torch.ones(1)})),
            f"missing: {NORM}; left over: a, b$",
        ),
    ],
)
def test_tensors_that_are_wrong(folder: Path, name: str, make: Callable[[Tensors], object], message: str) -> None:
    model = hybridvl.load(folder)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    change(folder, name, make)
    with pytest.raises(ConfigError, match=message):
        hybridvl.load(folder)
    with pytest.raises(ConfigError, match=message):
        hybridvl.load(folder, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=message):
        load_weights(model, folder)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_nan_anywhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype, in the first and last number of tensors longer than what is looked at together."""
    monkeypatch.setattr("hybridvl.checkpoints.loading._PIECE", 1000)
    hybridvl.save(hybridvl.load(DATA / "mamba2_tiny"), tmp_path)
    whole = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    name = "decoder.embed_tokens.weight"
    assert len(whole[name].view(-1)) > 10_000
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for place in (0, 5000, -1):
            tensors = {key: tensor.to(dtype, copy=True) for key, tensor in whole.items()}
            tensors[name].view(-1)[place] = float("nan")
            save_file(tensors, tmp_path / "model.safetensors")
            with pytest.raises(ConfigError, match=f"{name} holds NaN"):
                hybridvl.load(tmp_path)


def test_files_that_are_wrong(folder: Path) -> None:
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00002.safetensors"
    text, good = index.read_text(), shard.read_bytes()
    values = json.loads(text)

    def refuses(message: str) -> None:
        for call in (open_checkpoint, hybridvl.load):
            with pytest.raises(ConfigError, match=message):
                call(folder)

    for size in (0, 7, 100, len(good) - 1):
        shard.write_bytes(good[:size])
        refuses("model-00002-of-00002.safetensors: damaged or not safetensors; expected safetensors")
    shard.write_bytes(good + b"more")
    refuses("model-00002-of-00002.safetensors: damaged or not safetensors")
    shard.unlink()
    refuses("model-00002-of-00002.safetensors: no such file, though the index lists it")
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")
    refuses("model-00002-of-00002.safetensors: no such file, though the index lists it")
    torch.save({"weight": torch.ones(1)}, shard)
    refuses("model-00002-of-00002.safetensors: is a pickle, and pickles are never loaded")
    shard.write_bytes(good)
    (folder / "pytorch_model.bin").unlink()
    for broken, message in (
        ("{", "index.json: not valid JSON"),
        ("{}", "index.json: expected 'weight_map', an object of tensor names to file names"),
        (json.dumps({"weight_map": {"a": "../a.safetensors"}}), "index.json: expected 'weight_map'"),
    ):
        index.write_text(broken)
        refuses(message)
    index.unlink()
    refuses("holds no weights; expected model.safetensors or model.safetensors.index.json")
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], "other": shard.name}}))
    refuses(f"index.json: lists other in {shard.name}, which does not hold it$")
    index.write_text(text)
    hybridvl.load(folder)


def test_an_index_that_disagrees_with_its_shards(folder: Path) -> None:
    place = folder / "model.safetensors.index.json"
    values = json.loads(place.read_text())
    names = values["weight_map"]
    other = next(file for file in names.values() if file != names[NORM])
    for weight_map, message in (
        ({**names, NORM: other}, f"index.json: lists {NORM} in {other}, but {names[NORM]} holds it$"),
        (
            {k: v for k, v in names.items() if k != NORM},
            f"index.json: does not list {NORM}, which {names[NORM]} holds$",
        ),
    ):
        place.write_text(json.dumps({**values, "weight_map": weight_map}))
        with pytest.raises(ConfigError, match=message):
            hybridvl.load(folder)
    change(folder, names_in(names, other), lambda tensors: tensors.update({NORM: torch.ones(64)}), index=False)
    with pytest.raises(ConfigError, match=rf"safetensors: holds {NORM}, which model-0000\d-of-00002.* holds as well$"):
        hybridvl.load(folder)


def names_in(names: dict[str, str], file: str) -> str:
    return next(name for name, held in names.items() if held == file)
