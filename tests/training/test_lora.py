"""LoRA: which projections get adapters, what is trained, what checkpoints hold, and merged and exported models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import hybridvl
from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.answers import model_inputs
from hybridvl.training.lora import LoraSettings
from hybridvl.training.supervised import SupervisedTuning

PATTERN = "gdn swa+mamba2 full"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GDN = ATTENTION | {"a_proj", "b_proj", "g_proj"}
LAYER = "decoder.layers.{}.mixer."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("source")
    hybridvl.save(VisionLanguageModel(tiny.net(PATTERN)), folder)
    return folder


def adapted(source: Path, lora: LoraSettings, train_only: Sequence[str] | None = None, **more: Any) -> SupervisedTuning:
    torch.manual_seed(2)
    return SupervisedTuning(tiny.net(PATTERN), source=str(source), lora=lora, train_only=train_only, **more)


def moved(module: SupervisedTuning, seed: int = 3) -> SupervisedTuning:
    """The same with adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.net.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def layers(*names: str) -> set[str]:
    """Names of modules from "0:q_proj", "1.branches.0:o_proj" and so on."""
    return {
        LAYER.format(int(place[0])) + f"{place[2:]}.{leaf}".lstrip(".") for place, leaf in (n.split(":") for n in names)
    }


TARGETS = [
    ({"targets": ["mixers:gdn"]}, layers(*(f"0:{leaf}" for leaf in GDN))),
    ({"targets": ["mixers:gdn"], "projections": ["q_proj", "o_proj"]}, layers("0:q_proj", "0:o_proj")),
    ({"targets": ["mixers:mamba2"]}, layers("1.branches.1:in_proj", "1.branches.1:out_proj")),
    (
        {"targets": ["mixers:full", "mixers:swa"]},
        layers(*(f"{place}:{leaf}" for place in ("2", "1.branches.0") for leaf in ATTENTION)),
    ),
    ({"targets": ["decoder.layers.2.mixer.k_proj"]}, layers("2:k_proj")),
    (
        {"targets": ["layers:2"], "projections": ["k_proj", "up_proj"]},
        {"decoder.layers.2.mixer.k_proj", "decoder.layers.2.mlp.up_proj"},
    ),
]


@pytest.mark.parametrize(("options", "expected"), TARGETS)
def test_targets_get_adapters_and_nothing_else_is_trained(
    source: Path, options: dict[str, Any], expected: set[str]
) -> None:
    net = adapted(source, LoraSettings(rank=3, **options)).net
    trained = {name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{name}.lora_{part}.default.weight" for name in expected for part in "AB"}
    plain = dict(hybridvl.load(source).named_parameters())
    for name in expected:
        out, width = plain[f"{name}.weight"].shape
        assert trained[f"{name}.lora_A.default.weight"] == (3, width)
        assert trained[f"{name}.lora_B.default.weight"] == (out, 3)


def test_train_only_is_trained_beside_the_adapters(source: Path) -> None:
    module = adapted(source, LoraSettings(targets=["mixers:full"]), ["norms", "layers:0"], freeze=["layers:0-1"])
    trained = {name for name, p in module.net.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"decoder.norm.weight", *(f"decoder.layers.2.{norm}_norm.weight" for norm in ("mixer", "mlp"))}


def test_adapters_begin_with_the_model_as_it_was(source: Path) -> None:
    batch = model_inputs(tiny.batch())
    with torch.no_grad():
        logits = adapted(source, LoraSettings()).net(**batch).logits
        assert torch.equal(logits, hybridvl.load(source)(**batch).logits)


@given(  # in float64, where the two can be compared closely
    rank=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    stabilized=st.booleans(),
    target=st.sampled_from(["mixers", "mixers:gdn", "mixers:mamba2", "layers:1-2"]),
)
@settings(deadline=None, max_examples=6)
def test_an_adapted_projection_is_the_sum_of_two_maps(
    source: Path, rank: int, alpha: float, stabilized: bool, target: str
) -> None:
    """Every merged weight is W + s B A, and the merged model's logits are the adapted model's."""
    lora = LoraSettings(rank, alpha, targets=[target], rank_stabilized=stabilized)
    module = moved(adapted(source, lora)).double()
    net = module.net.eval()
    assert module.adapters is not None
    merged = module.adapters.merged()
    scale = alpha / (rank**0.5 if stabilized else rank)
    plain = hybridvl.load(source, dtype=torch.float64)
    own, before = dict(net.named_parameters()), dict(plain.named_parameters())
    weights = dict(merged.named_parameters())
    assert weights.keys() == before.keys()
    changed = 0
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        expected: torch.Tensor = before[name]
        if f"{base}.lora_A.default.weight" in own and name.endswith(".weight"):
            expected = expected + scale * own[f"{base}.lora_B.default.weight"] @ own[f"{base}.lora_A.default.weight"]
            changed += 1
        torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=1e-12 * float(expected.detach().abs().max()))
    assert changed == sum("lora_A" in name for name in own)
    batch = model_inputs(tiny.batch())
    with torch.no_grad():
        logits = net(**batch).logits
        assert float((logits - plain(**batch).logits).abs().max()) > 1e-3 * float(logits.abs().max())
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=0, atol=1e-9 * float(logits.abs().max()))


def test_merging_leaves_the_adapted_model_as_it_was(source: Path) -> None:
    module = moved(adapted(source, LoraSettings()))
    before = {name: parameter.clone() for name, parameter in module.net.named_parameters()}
    assert module.adapters is not None
    merged = module.adapters.merged()
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.net.named_parameters())
    # What is not adapted is in memory once.
    assert merged.decoder.embed_tokens.weight.data_ptr() == module.net.decoder.embed_tokens.weight.data_ptr()


def test_adapted_models_decode_as_they_read(source: Path) -> None:
    """Token by token from a state, that is, by the mixers' own steps, the adapters are used, too."""
    net = moved(adapted(source, LoraSettings(rank=4))).net.eval()
    tokens = torch.randint(10, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = net(tokens).logits
        state = net.init_state(2)
        steps = torch.cat([net(tokens[:, t : t + 1], state=state).logits for t in range(12)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_peft_takes_the_adapters_alone(source: Path, tmp_path: Path) -> None:
    module = moved(adapted(source, LoraSettings(rank=4, alpha=6.0, targets=["mixers:gdn", "mixers:mamba2"])))
    assert module.adapters is not None
    module.adapters.save(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    taken = PeftModel.from_pretrained(hybridvl.load(source), tmp_path / "adapter").eval()
    config = taken.peft_config["default"].to_dict()
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, str(source))
    batch = model_inputs(tiny.batch())
    with torch.no_grad():
        logits = module.net.eval()(**batch).logits
        assert torch.equal(taken(**batch).logits, logits)
        hybridvl.save(taken.merge_and_unload(), tmp_path / "merged")
        again = hybridvl.load(tmp_path / "merged")(**batch).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_a_state_holds_what_is_trained_and_goes_back(source: Path) -> None:
    module = moved(adapted(source, LoraSettings(targets=["mixers:full"]), ["norms"]))
    state = module.state_dict()
    assert set(state) == {f"net.{name}" for name, p in module.net.named_parameters() if p.requires_grad}
    fresh = adapted(source, LoraSettings(targets=["mixers:full"]), ["norms"])
    fresh.load_state_dict(state)
    assert tiny.same(dict(fresh.net.named_parameters()), dict(module.net.named_parameters()))
    missing = dict(state)
    del missing["net.decoder.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*decoder\.norm\.weight"):
        fresh.load_state_dict(missing)


def test_only_adapters_receive_gradients_and_they_are_right(source: Path) -> None:
    """dL/dB = s dL/dW A^T: the gradient of the full projection, seen through A, at B = 0."""
    name = "decoder.layers.0.mixer.o_proj"
    module = adapted(source, LoraSettings(rank=5, alpha=10.0, targets=["mixers:gdn"]))
    batch = tiny.batch()
    module.token_loss(batch).loss.backward()
    own = dict(module.net.named_parameters())
    assert {name for name, p in own.items() if p.grad is not None} == {n for n, p in own.items() if p.requires_grad}
    plain = SupervisedTuning(tiny.net(PATTERN), source=str(source))
    logits = plain.net(**model_inputs(batch)).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).backward()
    full = plain.net.get_parameter(f"{name}.weight").grad
    assert full is not None
    found = own[f"{name}.lora_B.default.weight"].grad
    expected = 2.0 * full @ own[f"{name}.lora_A.default.weight"].detach().T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"model\.lora\.rank: 0; expected at least 1"),
        ({"alpha": 0.0}, r"model\.lora\.alpha: 0\.0; expected a finite number above 0"),
        ({"dropout": 1.0}, r"model\.lora\.dropout: 1\.0; expected a share"),
        ({"targets": []}, r"model\.lora\.targets: \[\]; expected a list of names"),
        ({"targets": None}, r"model\.lora\.targets: None; expected a list of names"),
        ({"alpha": float("inf")}, r"model\.lora\.alpha: inf; expected a finite number above 0"),
        ({"targets": "mixers"}, r"model\.lora\.targets: 'mixers'; expected a list of names"),
        ({"projections": []}, r"model\.lora\.projections: \[\]"),
        ({"targets": ["mixers:lstm"]}, r"model\.lora\.targets: no parameter.*'mixers:lstm'.*mixers:gdn"),
        ({"targets": ["mixers:new"]}, r"model\.lora\.targets: 'mixers:new' needs a teacher"),
        ({"targets": ["norms"]}, r"model\.lora\.targets: \['norms'\]: no linear map"),
        ({"projections": ["q_proj", "w_proj"]}, r"model\.lora\.projections: 'w_proj'; expected some of .*q_proj"),
    ],
)
def test_bad_settings_are_named(source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(source, LoraSettings(**options))


def test_adapters_need_weights() -> None:
    with pytest.raises(ConfigError, match=r"model\.source: null; model\.lora needs"):
        SupervisedTuning(tiny.net(PATTERN), lora=LoraSettings())


def test_an_untied_head_takes_no_adapters(tmp_path: Path) -> None:
    net = dataclasses.replace(tiny.net(PATTERN), tie_embeddings=False)
    hybridvl.save(VisionLanguageModel(net), tmp_path / "untied")
    lora = LoraSettings(targets=["mixers", "head"])
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: .*the head takes no adapters.*model\.train_only"):
        SupervisedTuning(net, source=str(tmp_path / "untied"), lora=lora)
