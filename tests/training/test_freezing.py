"""What the names of `model.freeze` and `model.train_only` stand for."""

from __future__ import annotations

import dataclasses
import re

import pytest
import tiny
import torch

from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.freezing import choose_trained, select_parameters
from hybridvl.training.supervised import SupervisedTuning

PATTERN = "full gdn+swa wide mamba2"


def net(tied: bool = True, vision: bool = True) -> VisionLanguageModel:
    config = tiny.net(PATTERN.replace("wide", "swa"))
    mixers = {**config.mixers, "wide": {"type": "swa", "heads": 2, "kv_heads": 1, "head_dim": 16, "window": 64}}
    config = dataclasses.replace(config, pattern=PATTERN, mixers=mixers, tie_embeddings=tied)
    with torch.device("meta"):
        return VisionLanguageModel(config if vision else dataclasses.replace(config, vision=None))


IN_LAYER = r"decoder\.layers\.({})\."
NAMES = {
    "vision": r"visual\..*",
    "visual": r"visual\..*",
    "embeddings": r"decoder\.embed_tokens\.weight",
    "norms": r"decoder\.norm\.weight|decoder\.layers\.\d\.(mixer|mlp)_norm\.weight",
    "mlps": IN_LAYER.format(".") + r"mlp\..*",
    "mixers": IN_LAYER.format(".") + r"mixer\..*",
    "mixers:full": IN_LAYER.format("0") + r"mixer\..*",
    "mixers:gdn": IN_LAYER.format("1") + r"mixer\.branches\.0\..*",
    "mixers:swa": IN_LAYER.format("1") + r"mixer\.branches\.1\..*|" + IN_LAYER.format("2") + r"mixer\..*",
    "mixers:wide": IN_LAYER.format("2") + r"mixer\..*",
    "mixers:mamba2": IN_LAYER.format("3") + r"mixer\..*",
    "mixers:new": IN_LAYER.format("1|3") + r"mixer\..*",
    "layers:0": IN_LAYER.format("0") + ".*",
    "layers:0-1,3": IN_LAYER.format("0|1|3") + ".*",
    "layers:2, 3": IN_LAYER.format("2|3") + ".*",
    "decoder.layers.1": IN_LAYER.format("1") + ".*",
    "decoder.norm.weight": r"decoder\.norm\.weight",
}


@pytest.mark.parametrize(("name", "pattern"), NAMES.items())
def test_names_stand_for(name: str, pattern: str) -> None:
    model = net()
    expected = {full for full, _ in model.named_parameters() if re.fullmatch(pattern, full)}
    assert expected
    assert select_parameters(model, name, replaced=(1, 3)) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_embedding_where_they_are_tied(tied: bool) -> None:
    found = select_parameters(net(tied), "head")
    assert found == {"decoder.embed_tokens.weight" if tied else "lm_head.weight"}
    assert select_parameters(net(tied), "embeddings") == {"decoder.embed_tokens.weight"}


def test_the_parts_are_everything() -> None:
    model = net(tied=False)
    parts = [select_parameters(model, name) for name in ("vision", "embeddings", "head", "norms", "mlps", "mixers")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(list(model.named_parameters()))


def test_what_is_frozen_is_taken_from_what_is_trained() -> None:
    model = net()
    choose_trained(model, ["layers:1-2", "norms"], ["mlps", "mixers:swa"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == select_parameters(model, "norms") | {
        name for name in select_parameters(model, "decoder.layers.1.mixer") if ".branches.1." not in name
    }
    choose_trained(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vison", "model.freeze: no parameter is called 'vison'.*vision, .*mixers:wide.*visual, decoder"),
        ("decoder.lay", "no parameter is called 'decoder.lay'"),
        ("mixers:rwkv", "'mixers:rwkv'.*mixers:full, mixers:gdn, mixers:mamba2, mixers:swa, mixers:wide"),
        ("mixers:new", "model.freeze: 'mixers:new' needs a teacher"),
        ("layers:4", "'layers:4': '4' is not a layer or a range of layers from 0 to 3"),
        ("layers:2-1", "'2-1' is not a layer or a range"),
        ("layers:0,,1", "'' is not a layer or a range"),
        ("layers:-1", "'-1' is not a layer or a range"),
        ("layers:", "expected for example 'layers:0-3,7'"),
        ("", "no parameter is called ''"),
    ],
)
def test_names_of_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_trained(net(), None, [name])


def test_a_text_model_has_no_vision_to_freeze() -> None:
    with pytest.raises(ConfigError, match=r"'vision'.*expected embeddings.*top level: decoder\)"):
        choose_trained(net(vision=False), None, ["vision"])


def test_a_name_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.train_only: 'mixers'; expected a list"):
        choose_trained(net(), "mixers")


def test_supervised_tuning_takes_the_names() -> None:
    module = SupervisedTuning(tiny.net("(swa gdn)"), freeze=["mixers:swa"], train_only=["mixers", "head"])
    trained = {name for name, p in module.net.named_parameters() if p.requires_grad}
    assert trained == select_parameters(module.net, "mixers:gdn") | {"decoder.embed_tokens.weight"}
