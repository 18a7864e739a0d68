"""Folders of ours in transformers and back: names, values, dtypes, configurations, shards, missing tensors."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hf_cases import CASES, Case, Wrapped, reloaded
from model_cases import DATA
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, pipeline

import hybridvl
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.hf.configuration import HybridVLConfig
from hybridvl.inference.processor import Processor
from hybridvl.layers import ConfigError
from hybridvl.models import ModelConfig, VisionLanguageModel

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def assert_same(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    ours, theirs = wanted.state_dict(), found.state_dict()
    assert list(theirs) == list(ours)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    net = case.net().to(dtype)
    model = reloaded(net, tmp_path / "ours")
    assert_same(model, net)
    assert model.dtype == dtype
    assert not model.training
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    back = hybridvl.load(tmp_path / "theirs")
    assert_same(back, net)
    assert back.config == hybridvl.load(tmp_path / "ours").config
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), net)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_one_file_of_each_holds_the_same(case: Case, tmp_path: Path) -> None:
    net = case.net()
    hybridvl.save(net, tmp_path / "ours")
    Wrapped.wrap(net).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert written[1].pop("transformers_version")
    assert written[0] == written[1]


def test_dtype_asked_for(tmp_path: Path) -> None:
    net = CASES[5].net()
    hybridvl.save(net, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert_same(model, hybridvl.load(tmp_path, dtype=torch.bfloat16))
    kept = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    assert {name.rpartition(".")[2] for name in kept} == {"A_log", "dt_bias", "D"}


def test_configuration(tmp_path: Path) -> None:
    net = CASES[1].net()
    hybridvl.save(net, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HybridVLConfig)
    assert config.model_config() == hybridvl.load(tmp_path).config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 4, 96)
    assert config.tie_word_embeddings is False
    assert HybridVLConfig().model_config() == ModelConfig()
    assert HybridVLConfig(pattern="full", hidden_size=64).model_config() == ModelConfig(pattern="full", width=64)
    assert AutoConfig.for_model("hybridvl", pattern="gdn*3").num_hidden_layers == 3
    again = pickle.loads(pickle.dumps(config))
    assert again.model_config() == copy.deepcopy(config).model_config() == config.model_config()
    with pytest.raises(AttributeError, match="widht"):
        _ = config.widht
    with pytest.raises(ConfigError, match="width: 0; expected a whole number of at least 1"):
        Wrapped(HybridVLConfig(width=0))


def test_options_given_while_loading(tmp_path: Path) -> None:
    hybridvl.save(CASES[5].net(), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).use_cache
    given = {"activation_checkpointing": True, "attn_implementation": "sdpa", "use_cache": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert not model.config.use_cache
    assert model.net.decoder.activation_checkpointing
    assert model.is_activation_checkpointing
    model.save_pretrained(tmp_path / "again")
    assert hybridvl.load(tmp_path / "again").config == model.net.config


def test_a_fresh_model_is_ours() -> None:
    config = HybridVLConfig.from_model_config(CASES[4].net().config)
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config)
    torch.manual_seed(7)
    net = VisionLanguageModel(config.model_config())
    assert_same(model, net)
    torch.manual_seed(7)
    half = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert_same(half, net.to(torch.bfloat16))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("lost", ["decoder.layers.1.mixer.A_log", "decoder.layers.0.mlp_norm.weight", "lm_head.weight"])
def test_what_a_folder_lacks_begins_as_in_a_fresh_model(lost: str, tmp_path: Path) -> None:
    net = Case("full gdn", vision=False, tied=False, seed=8).net()
    hybridvl.save(net, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    held = tensors.pop(lost)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {lost}
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    new = found[lost]
    assert new.shape == held.shape
    if "norm" in lost:
        assert (new == 1).all()
    elif "A_log" in lost:
        assert ((new >= 0) & (new <= torch.tensor(16.0).log())).all()
    else:
        assert not torch.equal(new, held)
        assert 0.13 < float(new.std()) < 0.17  # init_std is 0.15


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_resized_vocabulary(case: Case, tmp_path: Path) -> None:
    net = case.net()
    before = net(IDS).logits
    model = Wrapped.wrap(net)
    model.resize_token_embeddings(112)
    assert model.config.vocab_size == net.config.vocab_size == 112
    logits = model(IDS).logits
    assert logits.shape[-1] == 112
    torch.testing.assert_close(logits[..., :96], before)
    assert torch.equal(net(IDS).logits, logits)
    model.save_pretrained(tmp_path)
    assert_same(hybridvl.load(tmp_path), net)


def test_both_are_one_model() -> None:
    net = CASES[3].net()
    model = Wrapped.wrap(net)
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    assert not other.net(IDS).logits.any()
    assert net(IDS).logits.any()
    model.set_output_embeddings(torch.nn.Linear(32, 7, bias=False))
    assert net(IDS).logits.shape == model(IDS).logits.shape == (1, 8, 7)
    model.set_input_embeddings(torch.nn.Embedding(200, 32))
    assert net(IDS + 150).logits.shape == (1, 8, 7)
    model.to(torch.float64)
    assert net.lm_head_weight.dtype == torch.float64


def test_hybridvl_save_takes_either(tmp_path: Path) -> None:
    net = CASES[1].net()
    model = Wrapped.wrap(net)
    hybridvl.save(net, tmp_path / "net")
    hybridvl.save(model, tmp_path / "wrapped")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()
    # Back into the bytes of another project's folder, too.
    qwen = hybridvl.load(DATA / "qwen2_5_vl_tiny")
    hybridvl.save(Wrapped.wrap(qwen), tmp_path / "qwen", format="qwen2_5_vl")
    for path in (tmp_path / "qwen").glob("*.safetensors"):
        assert path.read_bytes() == (DATA / "qwen2_5_vl_tiny" / path.name).read_bytes()
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for other in (tuned, torch.nn.Linear(2, 2), "model"):
        with pytest.raises(ConfigError, match=f"model: a {type(other).__name__}; expected a VisionLanguageModel"):
            hybridvl.save(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tokenizer_and_pipeline(tmp_path: Path) -> None:
    chat = ChatFormat(load_tokenizer())
    net = CASES[5].net()
    config = {**net.config.to_dict(), "vocab_size": len(chat.tokenizer)}
    net = VisionLanguageModel(ModelConfig.from_dict(config)).eval()
    hybridvl.save(net, tmp_path)
    Processor(chat, ImageProcessor(ImageConfig())).save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("What is 2 and 3?", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "What is 2 and 3?"
    answer = tokenizer.decode(net.generate(ids, 5)[0])
    speak = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert speak("What is 2 and 3?", max_new_tokens=5, do_sample=False)[0]["generated_text"] == answer
