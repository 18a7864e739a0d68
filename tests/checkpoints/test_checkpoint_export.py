"""Export: an imported folder comes out byte for byte; other models as transformers lays them out, or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from model_cases import DATA, VISION, small_config, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hybridvl
from hybridvl.checkpoints.tensor_writing import in_file_order, make_header, tensors_writer
from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

FOLDERS = {"qwen2_5_vl": "qwen2_5_vl_tiny", "infinitevl": "infinitevl_tiny_standard", "mamba2": "mamba2_tiny"}


def square(pattern: str) -> ModelConfig:
    """heads * head_dim = width, which Qwen2.5-VL insists on."""
    config = small_config(pattern)
    mixers = {
        **config.mixers,
        "full": {**config.mixers["full"], "heads": 2},
        "swa": {**config.mixers["swa"], "heads": 2},
    }
    return dataclasses.replace(config, mixers=mixers)


def source(format: str, folder: Path) -> Path:
    """A folder as somebody else would publish it."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DATA / FOLDERS[format] / name, folder / name)
    (folder / "tokenizer_config.json").write_text('{"a": 1}\n')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Spread model.safetensors over two files, every other tensor in the other, with an index of its own style."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{'ab'[number % 2]}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        held = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    text = json.dumps({"metadata": {"total_size": 1, "by": "somebody"}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def other_names(folder: Path) -> None:
    """The names of the modules inside transformers, or those of the first Mamba2 checkpoints."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        inner = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        inner = inner.replace(".embeddings.", ".embedding.")
        tensors[f"model.{inner}" if inner.startswith("visual.") else inner] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("format", FOLDERS)
@pytest.mark.parametrize("how", ["whole", "sharded", "bfloat16"])
def test_import_and_export_give_the_same_bytes(tmp_path: Path, format: str, how: str) -> None:
    folder = source(format, tmp_path / "in")
    if how != "whole":
        shard(folder, torch.bfloat16 if how == "bfloat16" else torch.float32)
    hybridvl.save(hybridvl.load(folder), tmp_path / "out", format=format)
    assert contents(tmp_path / "out") == contents(folder)
    # Cast to a wider dtype and not trained, the weights still are those of the files.
    hybridvl.save(hybridvl.load(folder, dtype=torch.float64), tmp_path / "wide", format=format)
    assert contents(tmp_path / "wide") == contents(folder)


@pytest.mark.parametrize("format", FOLDERS)
def test_names_come_out_as_they_were(tmp_path: Path, format: str) -> None:
    folder = source(format, tmp_path / "in")
    published = set(load_file(folder / "model.safetensors"))
    other_names(folder)
    assert published != set(load_file(folder / "model.safetensors"))
    hybridvl.save(hybridvl.load(folder), tmp_path / "out", format=format)
    assert contents(tmp_path / "out") == contents(folder)


@pytest.mark.parametrize("stored", ["config_hub_flat.json", "with a tied head"])
def test_unusual_files_come_out_as_they_were(tmp_path: Path, stored: str) -> None:
    """A flat configuration; a head that is stored though tied; metadata and a tensor order that nobody else has."""
    folder = source("qwen2_5_vl", tmp_path / "in")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    values = json.loads((DATA / FOLDERS["qwen2_5_vl"] / "config_hub_flat.json").read_text())
    if stored == "with a tied head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        values["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(values, indent=7))
    backwards = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    header = make_header(backwards, {"made": "by hand", "format": "pt"})
    tensors_writer(header, backwards.values(), [torch.float32] * len(backwards))(folder / "model.safetensors")
    hybridvl.save(hybridvl.load(folder), tmp_path / "out", format="qwen2_5_vl")
    assert contents(tmp_path / "out") == contents(folder)


def test_own_folders_come_out_as_they_were(tmp_path: Path) -> None:
    hybridvl.save(small_model("swa gdn"), tmp_path / "in", max_shard_size="40KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    hybridvl.save(hybridvl.load(tmp_path / "in"), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "in")


def test_saving_over_the_folder_that_the_model_is_mapped_from(tmp_path: Path) -> None:
    folder = source("qwen2_5_vl", tmp_path / "in")
    model = hybridvl.load(folder)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hybridvl.save(model, folder, format="qwen2_5_vl", max_shard_size="200KB")
    assert not (folder / "model.safetensors").exists()
    hybridvl.save(model, folder, format="qwen2_5_vl", max_shard_size="5GB")
    assert sorted(contents(folder)) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    again = hybridvl.load(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("cast", [False, True])
def test_trained_models_keep_names_and_shards(tmp_path: Path, cast: bool) -> None:
    folder = source("qwen2_5_vl", tmp_path / "in")
    shard(folder, torch.bfloat16 if cast else torch.float32)
    model = hybridvl.load(folder, dtype=torch.float32)
    with torch.no_grad():
        model.decoder.norm.weight += 1e-3
    hybridvl.save(model, tmp_path / "out", format="qwen2_5_vl")
    before, after = contents(folder), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    index = json.loads(after["model.safetensors.index.json"])
    assert index["weight_map"] == json.loads(before["model.safetensors.index.json"])["weight_map"]
    assert json.loads(after["config.json"])["dtype"] == "float32"
    again = hybridvl.load(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    if cast:  # the values no longer fit into the files' dtype
        assert index["metadata"] == {"total_size": 4 * sum(p.numel() for p in model.parameters()), "by": "somebody"}


def test_a_narrower_model_is_written_as_narrow_as_it_is(tmp_path: Path) -> None:
    model = hybridvl.load(source("mamba2", tmp_path / "in"), dtype=torch.bfloat16)
    hybridvl.save(model, tmp_path / "out", format="mamba2")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["backbone.norm_f.weight"].dtype == torch.bfloat16
    assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32


def test_files_are_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "é": torch.randn(()),
        "c": torch.zeros(0, 4, dtype=torch.float16),
        "d": torch.randn(2, 2).double(),
        "e": torch.arange(5),
        "f": torch.tensor([True]),
        "g": torch.randn(4, 4).t(),
    }
    for metadata in (None, {"format": "pt"}):
        ordered = in_file_order(tensors)
        write = tensors_writer(make_header(ordered, metadata), ordered.values(), [t.dtype for t in ordered.values()])
        write(tmp_path / "ours")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("format", FOLDERS)
def test_models_of_our_own_in_other_formats(tmp_path: Path, format: str) -> None:
    """A model without an origin: another folder, the same model, whatever the shards."""
    model = copy.deepcopy(hybridvl.load(DATA / FOLDERS[format]))
    for number, size in enumerate(("5GB", "100KB", 1000)):
        folder = tmp_path / str(number)
        hybridvl.save(model, folder, format=format, max_shard_size=size)
        assert (folder / "model.safetensors").exists() == (size == "5GB")
        again = hybridvl.load(folder)
        mixers, sections = model.config.mixers, model.config.rope_sections
        assert dataclasses.replace(again.config, pattern="", mixers=mixers, rope_sections=sections) == (
            dataclasses.replace(model.config, pattern="")
        )
        assert again.mixer_configs == model.mixer_configs
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
        index = folder / "model.safetensors.index.json"
        assert index.exists() == (size != "5GB")
        if index.exists():
            for name, file in json.loads(index.read_text())["weight_map"].items():
                with safe_open(folder / file, "pt") as reader:
                    assert name in reader.keys()  # noqa: SIM118 - not a mapping


def test_an_option_of_ours_survives_other_formats(tmp_path: Path) -> None:
    config = dataclasses.replace(square("full*2"), video_convention="v523")
    hybridvl.save(VisionLanguageModel(config), tmp_path, format="qwen2_5_vl")
    assert hybridvl.load(tmp_path).config.video_convention == "v523"


@pytest.mark.parametrize(
    ("format", "config", "message"),
    [
        ("qwen2_5_vl", small_config("full gdn"), r"'qwen2_5_vl': layer 1 is gdn, which it cannot express; it has Full"),
        ("qwen2_5_vl", small_config("full swa+gdn"), r"layer 1 is swa\+gdn, which it cannot express"),
        ("qwen2_5_vl", dataclasses.replace(square("full"), vision=None), "vision is null, which it cannot express"),
        ("qwen2_5_vl", square("full full(qkv_bias=false)"), r"layer 1, full\(qkv_bias=false\): qkv_bias False"),
        ("qwen2_5_vl", square("swa(window=4) swa"), r"layer 1, swa: window 8 \(4 there\)"),
        ("qwen2_5_vl", small_config("full"), r"head_dim 16, which it cannot express; expected width / heads = 32 / 4"),
        (
            "qwen2_5_vl",
            dataclasses.replace(square("full"), vision=dataclasses.replace(VISION, norm_eps=1e-5)),
            r"vision.norm_eps 1e-05 \(1e-06 there\)",
        ),
        ("qwen2_5_vl", dataclasses.replace(small_config("full"), mlp_width=0), "mlp_width is 0"),
        ("infinitevl", small_config("swa mamba2"), "'infinitevl': layer 1 is mamba2, which it cannot express"),
        ("infinitevl", small_config("swa gdn"), r"layer 1, gdn: value_heads 4 \(None there\)"),
        ("infinitevl", small_config("gdn(value_heads=2, gate=false)"), r"layer 0, .*: gate False \(True there\)"),
        ("infinitevl", small_config("gdn(value_heads=2, negative_eigenvalues=true)"), "negative_eigenvalues True"),
        ("mamba2", small_config("mamba2"), "the model has a vision tower, which it cannot express"),
        ("mamba2", small_config("mamba2 full", vision=None), "layer 1 is full, which it cannot express; it has Mamba2"),
        ("mamba2", small_config("mamba2", vision=None), "mlp_width 48 .0 there"),
        ("qwen3_next", small_config("gdn", vision=None), "'qwen3_next' is only read; expected one of hybridvl, qwen"),
        ("onnx", small_config("gdn"), "format: 'onnx'; expected one of hybridvl, qwen2_5_vl"),
    ],
)
def test_what_a_format_cannot_express(tmp_path: Path, format: str, config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hybridvl.save(VisionLanguageModel(config), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, -1, True, "5", "many GB", 1.5])
def test_shard_sizes_that_are_none(tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=r"max_shard_size: .*; expected a number of bytes of at least 1, or text"):
        hybridvl.save(small_model("swa"), tmp_path, max_shard_size=size)
