"""Checkpoints: what is saved comes back, atomically; foreign spellings; every kind of broken folder is told apart."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from model_cases import DATA, IMAGE, prompts, relative_error, small_config, small_model
from safetensors.torch import load_file, save_file

import hybridvl
from hybridvl.checkpoints import check_same_model, load_weights, read_config
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

QWEN = DATA / "qwen2_5_vl_tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hybridvl.save(small_model("swa gdn"), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("pattern", ["swa(window=4) gdn*2", "(swa+mamba2) full"])
@torch.no_grad()
def test_saved_models_come_back(tmp_path: Path, pattern: str) -> None:
    model, row = small_model(pattern), prompts()[0]
    hybridvl.save(model, tmp_path / "a" / "b")
    again = hybridvl.load(tmp_path / "a" / "b")
    assert not again.training
    assert again.pattern == model.pattern == json.loads((tmp_path / "a" / "b" / "config.json").read_text())["pattern"]
    assert dataclasses.replace(again.config, pattern=pattern) == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    images = {"pixel_values": row.pixel_values, "image_grid_thw": row.image_grid_thw}
    assert torch.equal(again(row.input_ids, **images).logits, model(row.input_ids, **images).logits)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    fresh = small_model(pattern, seed=1)
    load_weights(fresh, tmp_path / "a" / "b")
    assert torch.equal(fresh(row.input_ids, **images).logits, model(row.input_ids, **images).logits)
    assert read_config(tmp_path / "a" / "b") == again.config


def test_dtype(folder: Path) -> None:
    model = hybridvl.load(folder, dtype=torch.bfloat16)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.bfloat16}
    assert {name.split(".")[-1] for name in wide} == {"A_log", "dt_bias"}
    assert {parameter.dtype for parameter in hybridvl.load(folder, dtype=torch.float64).parameters()} == {torch.float64}
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_module_spelling_shards_and_flat_config(tmp_path: Path) -> None:
    """transformers' own module names, in two shards beside the flat published config, are the same model."""
    wanted = hybridvl.load(QWEN).state_dict()
    tensors = {}
    for name, tensor in load_file(QWEN / "model.safetensors").items():
        spelled = name.replace("visual.", "model.visual.").replace("model.layers.", "model.language_model.layers.")
        for outer in ("embed_tokens", "norm.weight"):
            spelled = spelled.replace(f"model.{outer}", f"model.language_model.{outer}")
        tensors[spelled] = tensor
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(QWEN / "config_hub_flat.json", tmp_path / "config.json")
    found = hybridvl.load(tmp_path)
    assert found.config == hybridvl.load(QWEN).config
    assert wanted.keys() == found.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-2.safetensors: no such file, though the index lists it"):
        hybridvl.load(tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_may_be_saved_as_well(tmp_path: Path, equal: bool) -> None:
    tensors = load_file(QWEN / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((QWEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    if equal:
        model = hybridvl.load(tmp_path)
        assert model.lm_head is None
        assert torch.equal(model.lm_head_weight, embedding)
    else:
        with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the embedding"):
            hybridvl.load(tmp_path)


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    weights, trace = folder / "model.safetensors", tmp_path / "trace"
    torch.save({"bomb": Bomb(trace)}, weights)
    with pytest.raises(ConfigError, match=r"model.safetensors: is a pickle, and pickles are never loaded"):
        hybridvl.load(folder)
    weights.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ConfigError, match=r"model.safetensors: is a pickle"):
        hybridvl.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"holds pytorch_model.bin but no model.safetensors; pickles can run any code"
    ):
        hybridvl.load(folder)
    with pytest.raises(ConfigError, match=r"last.ckpt: pickles are never loaded"):
        hybridvl.load(folder / "last.ckpt")
    assert not trace.exists()


def test_a_header_that_begins_like_a_pickle_is_fine(tmp_path: Path) -> None:
    """safetensors begin with the length of their header, which may be 640 = bytes 80 02."""
    from hybridvl.checkpoints.tensor_files import TensorFiles

    file = tmp_path / "model.safetensors"
    for length in range(400, 640):
        save_file({"x" * length: torch.zeros(1)}, file)
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no name gave a header of 640 bytes")
    assert len(TensorFiles(tmp_path).stored) == 1


def test_broken_folders(folder: Path, tmp_path: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    good, text = weights.read_bytes(), config.read_text()
    values = json.loads(text)

    def refuses(message: str, path: Path = folder) -> None:
        with pytest.raises(ConfigError, match=message):
            hybridvl.load(path)

    refuses("missing: no such folder; expected a checkpoint folder or a hub id", tmp_path / "missing")
    refuses("config.json: is a file; expected a folder", config)
    for size in (0, 5, 100, len(good) // 2, len(good) - 1):
        weights.write_bytes(good[:size])
        refuses("model.safetensors: damaged or not safetensors")
    weights.unlink()
    refuses(r"saved: holds no weights; expected model.safetensors")
    weights.write_bytes(good)
    for broken, message in (
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: holds a list; expected an object"),
        (json.dumps({**values, "format_version": 2}), "format_version 2; expected 1"),
        (json.dumps({**values, "widht": 2}), "config.json: unknown key 'widht'"),
        (json.dumps({**values, "width": 48}), "weights do not fit the configuration beside them: .*has shape"),
        (json.dumps({**values, "pattern": "swa"}), r"left over: decoder.layers.1.mixer.A_log, .* and \d+ more"),
        (json.dumps({**values, "pattern": "swa gdn swa"}), r"missing: decoder.layers.2"),
    ):
        config.write_text(broken)
        refuses(message)
    config.unlink()
    refuses("saved: holds no config.json")
    config.write_text(text)
    hybridvl.load(folder)


def test_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(hub_id)
        assert all(pattern in ("*.json", "*.safetensors", "*.txt", "*.jinja") for pattern in allow_patterns)
        if hub_id.endswith("none"):
            raise LocalEntryNotFoundError("offline\nlong explanation")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hybridvl.load("some-org/some.model").pattern == "swa gdn"
    with pytest.raises(
        ConfigError,
        match=r"^some-org/none: no such folder, .* hub: offline; .* `hf download some-org/none --local-dir none`",
    ):
        hybridvl.load("some-org/none")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConfigError, match="saved/none: no such folder; expected"):
        hybridvl.load("saved/none")  # a folder "saved" is here, so no hub id is meant
    assert asked == ["some-org/some.model", "some-org/none"]


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        ("swa*2", {}, r"layer 1 is gdn there, swa here$"),
        ("swa gdn*3", {}, r"'swa gdn' does not fit a model of pattern 'swa gdn\*3': 2 layers there, 4 here$"),
        ("swa(window=4) gdn", {}, r"layer 0 is swa there, swa\(window=4\) here$"),
        ("swa gdn", {"mixers": {"gdn": {"head_dim": 16}}}, r"layer 1 is .*head_dim=8.* there, .*head_dim=16.* here"),
        ("swa gdn", {"width": 64}, "width is 32 there, 64 here"),
        ("swa+gdn gdn", {}, r"layer 0 is swa there, swa\+gdn here"),
    ],
)
def test_checkpoints_of_another_pattern(folder: Path, pattern: str, change: dict[str, object], message: str) -> None:
    model = VisionLanguageModel(dataclasses.replace(small_config(pattern), **merged(pattern, change)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        load_weights(model, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def merged(pattern: str, change: dict[str, object]) -> dict[str, object]:
    mixers = change.get("mixers")
    return {**change, "mixers": {**small_config(pattern).mixers, **mixers}} if isinstance(mixers, dict) else change


def test_what_does_not_change_the_weights_is_free() -> None:
    own = small_config("swa*2")
    backend = {**own.mixers, "swa": {**own.mixers["swa"], "backend": "reference"}}
    named = {**own.mixers, "narrow": {"type": "swa", **own.mixers["swa"]}}
    for saved in (
        dataclasses.replace(own, pattern="swa swa", activation_checkpointing=True, init_std=1.0),
        dataclasses.replace(own, mixers=backend),
        dataclasses.replace(own, mixers=named, pattern="narrow*2"),
    ):
        check_same_model(saved, own, "place")


def test_long_differences_are_cut_short() -> None:
    with pytest.raises(ConfigError, match=r"layer 7 is .*; and 12 more$"):
        check_same_model(small_config("swa*20"), small_config("gdn*20"), "place")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"model.safetensors: cannot be written: Not a directory"):
        hybridvl.save(small_model("full"), tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="format: 'onnx'; expected one of hybridvl"):
        hybridvl.save(small_model("full"), tmp_path, format="onnx")


FILL_THE_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import hybridvl
from hybridvl.layers import ConfigError
from model_cases import small_model
model = small_model("swa gdn", seed=5)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    hybridvl.save(model, sys.argv[1])
except ConfigError as error:
    print(error)
"""


def test_the_last_good_checkpoint_survives_a_full_disk(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size > 20_000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", FILL_THE_DISK, str(folder), str(here)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parent, check=True)
    assert "model.safetensors: cannot be written: " in done.stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    row = prompts()[0]
    wanted = small_model("swa gdn")
    ids = row.input_ids[:, row.input_ids[0] != IMAGE]
    assert relative_error(hybridvl.load(folder)(ids).logits, wanted(ids).logits) < 1e-6
