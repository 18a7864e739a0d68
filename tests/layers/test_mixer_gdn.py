"""Gated DeltaNet against its recurrence in float64, published arrays and its published initial values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hybridvl.layers import Sequence
from hybridvl.layers.gdn import GatedDeltaNet, GatedDeltaNetConfig
from hybridvl.layers.norms import RMSNorm

TINY = Path(__file__).parents[1] / "data" / "infinitevl_tiny_standard"


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.mT, (weight.shape[2] - 1, 0))
    return F.silu(F.conv1d(padded, weight, groups=x.shape[2])).mT


def recurrence(mixer: GatedDeltaNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, head by head, token by token, from the formulas of the paper."""
    config, p = mixer.config, dict(mixer.named_parameters())
    heads, key_dim, value_dim = config.value_head_count, config.head_dim, config.value_dim
    q, k, v = (convolved(x @ p[f"{n}_proj.weight"].T, p[f"{n}_conv1d.weight"]) for n in "qkv")
    q, k, v = q.unflatten(2, (-1, key_dim)), k.unflatten(2, (-1, key_dim)), v.unflatten(2, (-1, value_dim))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -p["A_log"].exp() * F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"])
    beta = torch.sigmoid(x @ p["b_proj.weight"].T) * (2 if config.negative_eigenvalues else 1)
    out, states = torch.zeros_like(v), torch.zeros(x.shape[0], heads, key_dim, value_dim, dtype=x.dtype)
    for b in range(x.shape[0]):
        for h in range(heads):
            shared, state = h // (heads // config.heads), states[b, h]
            for t in range(x.shape[1]):
                state *= g[b, t, h].exp()
                error = v[b, t, h] - state.T @ k[b, t, shared]
                state += torch.outer(k[b, t, shared], beta[b, t, h] * error)
                out[b, t, h] = state.T @ (q[b, t, shared] * key_dim**-0.5)
    out = out / (out.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * p["o_norm.weight"]
    if config.gate:
        out = out * F.silu(x @ p["g_proj.weight"].T).unflatten(2, (-1, value_dim))
    return out.flatten(2) @ p["o_proj.weight"].T, states


@pytest.mark.parametrize(
    "config",
    [
        GatedDeltaNetConfig(heads=2, head_dim=8),
        GatedDeltaNetConfig(heads=2, value_heads=6, head_dim=4, expand_v=1.5, negative_eigenvalues=True),
        GatedDeltaNetConfig(heads=3, head_dim=4, expand_v=0.5, gate=False, conv_width=2, norm_eps=1e-2),
    ],
    ids=["plain", "grouped", "no gate"],
)
@torch.no_grad()
def test_equals_the_recurrence(config: GatedDeltaNetConfig) -> None:
    torch.manual_seed(0)
    mixer = config.build(10).double()
    for parameter in mixer.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    x = torch.randn(2, 37, 10, dtype=torch.float64)
    expected, final = recurrence(mixer, x)
    state = mixer.init_state(2)
    for y in (mixer(x, Sequence()), mixer(x, Sequence(), state)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.recurrent, final, rtol=0, atol=1e-12)
    last = mixer.q_proj(x)[:, -config.conv_width :].mT
    torch.testing.assert_close(state.conv_q, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [1, 2, 7])
@torch.no_grad()
def test_state_equals_the_published_model(layer: int) -> None:
    weights, expected = load_file(TINY / "model.safetensors"), load_file(TINY / "expected.safetensors")
    prefix = f"model.layers.{layer}."
    mixer = GatedDeltaNetConfig(heads=2, head_dim=16).build(64)
    own = f"{prefix}self_attn."
    mixer.load_state_dict({name.removeprefix(own): x for name, x in weights.items() if name.startswith(own)})
    norm = RMSNorm(64, 1e-6)
    norm.load_state_dict({"weight": weights[f"{prefix}input_layernorm.weight"]})
    x = norm(expected["long.hidden_states"][layer])
    state = mixer.init_state(1)
    mixer(x, Sequence(), state)
    pairs = {"recurrent": "recurrent_state"} | {f"conv_{n}": f"conv_state_{n}" for n in "qkv"}
    for name, published in pairs.items():
        reference = expected[f"long.layer{layer}.{published}"]
        assert (getattr(state, name) - reference).abs().max() <= 1e-4 * reference.abs().max(), name


def test_initial_decays_lie_in_the_published_range() -> None:
    torch.manual_seed(0)
    mixer = GatedDeltaNetConfig(heads=500, head_dim=1, expand_v=1).build(2)
    rate, step = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 1.2
    assert 15.8 < rate.max() <= 16
    assert 0.000999 < step.min() < 0.00105
    assert 0.095 < step.max() < 0.1001
    assert abs(step.log().mean() - torch.tensor(0.01).log()) < 0.2  # log-uniform
    assert abs(rate.mean() - 8.5) < 0.6  # uniform


def test_initial_step_sizes_follow_the_options() -> None:
    torch.manual_seed(0)
    steps = F.softplus(GatedDeltaNetConfig(heads=200, head_dim=2, dt_min=0.01, dt_max=0.02).build(8).dt_bias)
    assert 0.00999 < steps.min() < steps.max() < 0.02001
    floor = GatedDeltaNetConfig(heads=100, head_dim=2, dt_floor=0.05).build(8)
    assert F.softplus(floor.dt_bias).min() > 0.0499


def test_decay_parameters_stay_float32_in_half_precision() -> None:
    mixer = GatedDeltaNetConfig(heads=2, head_dim=8).build(16)
    before = mixer.A_log.clone()
    mixer.to(torch.bfloat16)
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert torch.equal(mixer.A_log, before)
    assert mixer.q_proj.weight.dtype == mixer.o_norm.weight.dtype == torch.bfloat16
    assert mixer.half().dt_bias.dtype == torch.float32
    assert mixer.double().A_log.dtype == torch.float64
    assert mixer.to("meta").A_log.device.type == "meta"


@torch.no_grad()
def test_half_precision_follows_float32_for_long() -> None:
    """512 bfloat16 steps stay as near to float32 as one bfloat16 pass: the state does not drift."""
    torch.manual_seed(1)
    mixer = GatedDeltaNetConfig(heads=2, head_dim=16).build(32).to(torch.bfloat16)
    exact = GatedDeltaNetConfig(heads=2, head_dim=16).build(32)
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 512, 32).to(torch.bfloat16)
    expected = exact(x.float(), Sequence())
    state = mixer.init_state(1)
    assert state.recurrent.dtype == torch.float32
    assert state.conv_v.dtype == torch.bfloat16
    steps = torch.cat([mixer(x[:, t : t + 1], Sequence(), state) for t in range(512)], dim=1)
    error = (steps.float() - expected).norm(dim=2) / expected.norm(dim=2).mean()
    assert error[:, -64:].mean() < 0.02
    assert error[:, -64:].mean() < 1.5 * error[:, 64:128].mean()


def test_state_of_the_published_sizes() -> None:
    """InfiniteVL-4B: 27 layers hold 56,623,104 bytes of recurrent state in float32 and 1,769,472 of convolutions."""
    config = GatedDeltaNetConfig()
    assert 27 * config.state_bytes(0, torch.bfloat16) == 56_623_104 + 1_769_472
    assert config.num_params(2048) == 33_653_024
