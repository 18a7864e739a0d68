"""Mamba2 against transformers and published arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as PeerConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hybridvl.layers import ConfigError, Sequence
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.norms import RMSNorm

TINY = Path(__file__).parents[1] / "data" / "mamba2_tiny"


@pytest.mark.parametrize(("groups", "bias", "conv_bias"), [(1, False, True), (2, True, True), (4, False, False)])
@torch.no_grad()
def test_equals_transformers_with_its_weights(groups: int, bias: bool, conv_bias: bool) -> None:
    torch.manual_seed(0)
    peer = Mamba2Mixer(
        PeerConfig(
            hidden_size=24,
            num_heads=12,
            head_dim=4,
            state_size=6,
            n_groups=groups,
            use_bias=bias,
            use_conv_bias=conv_bias,
            chunk_size=8,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    ).eval()
    for parameter in peer.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    config = Mamba2Config(head_dim=4, state_dim=6, groups=groups, proj_bias=bias, conv_bias=conv_bias)
    mixer = config.build(24)
    mixer.load_state_dict(peer.state_dict())
    x = torch.randn(2, 29, 24)
    expected = peer(x)
    y = mixer(x, Sequence())
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_outputs_and_states_equal_the_published_arrays(layer: int) -> None:
    weights, expected = load_file(TINY / "model.safetensors"), load_file(TINY / "expected.safetensors")
    prefix = f"backbone.layers.{layer}."
    mixer = Mamba2Config(head_dim=16, state_dim=16, groups=2).build(48)
    own = f"{prefix}mixer."
    mixer.load_state_dict({name.removeprefix(own): x for name, x in weights.items() if name.startswith(own)})
    norm = RMSNorm(48, 1e-5)
    norm.load_state_dict({"weight": weights[f"{prefix}norm.weight"]})
    # The peer collects hidden states after each layer: entry 0 is the first layer's output.
    embedded = weights["backbone.embeddings.weight"][load_file(TINY / "inputs.safetensors")["input_ids"]]
    before, after = [embedded, *expected["hidden_states"]][layer : layer + 2]
    x = norm(before)
    state = mixer.init_state(2)
    outputs = [mixer(part, Sequence(), state) for part in x.split([20, 4, 1, 1, 1], dim=1)]
    # The stored states "after 20" and "after 24" hold the numbers after all 27 tokens: the peer's cache lives on.
    for seen in (20, 24, 27):
        for name, tensor in (("recurrent_state", state.recurrent), ("conv_state", state.conv)):
            reference = expected[f"after{seen}.layer{layer}.{name}"]
            assert (tensor - reference).abs().max() <= 1e-4 * reference.abs().max(), (seen, name)
    assert (before + torch.cat(outputs, dim=1) - after).abs().max() <= 1e-4 * after.abs().max()


def test_initial_values_follow_the_options() -> None:
    torch.manual_seed(0)
    config = Mamba2Config(head_dim=1, dt_min=0.01, dt_max=0.02, A_min=2.0, A_max=3.0, state_dim=4)
    mixer = config.build(200)
    step, rate = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 0.00999 < step.min() < step.max() < 0.02001
    assert 2 <= rate.min() < rate.max() <= 3
    assert torch.equal(mixer.D, torch.ones(400))
    floor = Mamba2Config(head_dim=1, dt_floor=0.05).build(100)
    assert F.softplus(floor.dt_bias).min() > 0.0499


def test_state_needs_the_width() -> None:
    with pytest.raises(ConfigError, match="mamba2: the bytes of its state depend on the width"):
        Mamba2Config().state_bytes(0, torch.float32)
    # 64 heads of (64, 128) in float32, 4352 channels of 4 in bfloat16
    assert Mamba2Config().state_bytes(0, torch.bfloat16, 2048) == 64 * 64 * 128 * 4 + 4352 * 4 * 2
