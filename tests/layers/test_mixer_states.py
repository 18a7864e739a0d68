"""States of the mixers: rows, gradients, nesting, ragged batches, and what a mixer refuses."""

from __future__ import annotations

import pytest
import torch

from hybridvl.layers import ConfigError, Mixer, MixerConfig, Sequence
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.swa import SlidingWindowConfig

FULL = FullAttentionConfig(heads=2, kv_heads=1, head_dim=4, rope=False)
SWA = SlidingWindowConfig(heads=2, kv_heads=1, head_dim=4, window=5, rope=False)
GDN = GatedDeltaNetConfig(heads=2, head_dim=4)
MAMBA2 = Mamba2Config(head_dim=4, state_dim=3)
BOTH = ParallelConfig(branches=(FULL, GDN))
ALL = pytest.mark.parametrize(
    "config", [FULL, SWA, GDN, MAMBA2, BOTH], ids=["full", "swa", "gdn", "mamba2", "parallel"]
)


def build(config: MixerConfig) -> Mixer:
    torch.manual_seed(0)
    return config.build(8).double()


@ALL
def test_rows_must_agree(config: MixerConfig) -> None:
    mixer = build(config)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state has 3 rows .*, the input has 2 rows or segments"):
        mixer(x, Sequence(), mixer.init_state(3))
    packed = Sequence(cu_seqlens=torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match=r"state has 1 rows .*, the input has 2 rows or segments"):
        mixer(x[:1], packed, mixer.init_state(1))


@ALL
@pytest.mark.parametrize("bounds", [[0, 3], [0, 3, 9], [0, 5, 3, 7]])
def test_boundaries_must_rise_to_the_end_with_a_state(config: MixerConfig, bounds: list[int]) -> None:
    mixer, x = build(config), torch.randn(1, 7, 8, dtype=torch.float64)
    with pytest.raises(ConfigError, match="expected to rise from 0 to the 7 tokens of the row"):
        mixer(x, Sequence(cu_seqlens=torch.tensor(bounds)), mixer.init_state(len(bounds) - 1))


@ALL
def test_no_rows_give_no_rows_and_zero_gradients(config: MixerConfig) -> None:
    mixer = build(config)
    for state in (None, mixer.init_state(0)):
        x = torch.randn(0, 70, 8, dtype=torch.float64, requires_grad=True)
        y = mixer(x, Sequence(), state)
        assert y.shape == (0, 70, 8)
        y.sum().backward()
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in mixer.parameters())


@ALL
def test_detach_cuts_the_gradient(config: MixerConfig) -> None:
    mixer = build(config)
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    state = mixer.init_state(1)
    mixer(x[:, :3], Sequence(), state)
    whole = mixer(x[:, 3:], Sequence(), state.clone()).sum()
    assert torch.autograd.grad(whole, x, retain_graph=True)[0][:, :3].abs().max() > 0
    state.detach_()
    cut = mixer(x[:, 3:], Sequence(), state).sum()
    assert not torch.autograd.grad(cut, x)[0][:, :3].any()


@ALL
@torch.no_grad()
def test_a_row_that_is_all_padding_stays_finite_and_empty(config: MixerConfig) -> None:
    mixer = build(config)
    mask = torch.tensor([[True] * 4, [False] * 4])
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    x[1] = float("nan")
    state = mixer.init_state(2)
    for y in (mixer(x, Sequence(mask=mask)), mixer(x, Sequence(mask=mask), state)):
        assert torch.isfinite(y).all()
    assert not any(tensor[1].any() for tensor in state.tensors().values())
    assert all(tensor[0].any() for tensor in state.tensors().values())


@ALL
@torch.no_grad()
def test_no_tokens_change_nothing(config: MixerConfig) -> None:
    """An empty segment leaves its row's state as it was."""
    mixer = build(config)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    state = mixer.init_state(3)
    mixer(x, Sequence(cu_seqlens=torch.tensor([0, 3, 4, 7])), state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    y = mixer(x[:, :5], Sequence(cu_seqlens=torch.tensor([0, 2, 2, 5])), state)
    assert y.shape == (1, 5, 8)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert not torch.equal(tensor[0], before[name][0]), name


def test_mask_and_boundaries_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"either padded .* or packed"):
        Sequence(mask=torch.ones(1, 2, dtype=torch.bool), cu_seqlens=torch.tensor([0, 2]))


@torch.no_grad()
def test_parallel_state_is_named_by_branch_and_loads_a_grown_one() -> None:
    mixer = build(BOTH)
    state = mixer.init_state(1)
    assert {"0.k", "0.length", "1.recurrent", "1.conv_q"} < state.tensors().keys()
    mixer(torch.randn(1, 100, 8, dtype=torch.float64), Sequence(), state)
    fresh = mixer.init_state(1)
    fresh.load_state_dict(state.state_dict())
    assert fresh.nbytes == state.nbytes == BOTH.state_bytes(100, torch.float64, 8)
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    assert torch.equal(mixer(x, Sequence(), fresh), mixer(x, Sequence(), state))
    with pytest.raises(ValueError, match=r"state holds \['0\.k', .*saved state holds .*'2\.k'"):
        fresh.load_state_dict(state.state_dict() | {"2.k": torch.zeros(1)})
    with pytest.raises(ValueError, match="state holds"):
        fresh.load_state_dict({name: x for name, x in state.state_dict().items() if name != "1.conv_q"})


@torch.no_grad()
@pytest.mark.parametrize("name", ["0.k", "0.v", "1.recurrent", "1.conv_v"])
def test_a_state_that_does_not_fit_is_refused_whole(name: str) -> None:
    mixer = build(BOTH)
    state, fresh = mixer.init_state(1), mixer.init_state(1)
    mixer(torch.randn(1, 100, 8, dtype=torch.float64), Sequence(), state)
    saved = state.state_dict()
    before = fresh.clone().tensors()
    for wrong in (saved[name][:, :0], saved[name][..., :1], saved[name].float(), saved[name][:, :1].sum()):
        with pytest.raises(ValueError, match=r"^state tensor "):
            fresh.load_state_dict(saved | {name: wrong})
        assert all(torch.equal(before[key], tensor) for key, tensor in fresh.tensors().items())


@torch.no_grad()
def test_parallel_is_the_mean_of_normed_branches() -> None:
    mixer = build(BOTH)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    parts = [branch(x, Sequence()) for branch in mixer.branches]
    normed = [y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in parts]
    torch.testing.assert_close(mixer(x, Sequence()), (normed[0] + normed[1]) / 2)


@ALL
@torch.no_grad()
def test_bfloat16_model_and_autocast(config: MixerConfig) -> None:
    """Outputs and states keep their dtypes, near to float32."""
    mixer = build(config).float()
    x = torch.randn(2, 20, 8)
    expected = mixer(x, Sequence())
    state = mixer.init_state(2)
    kinds = {name: tensor.dtype for name, tensor in state.tensors().items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.cat([mixer(part, Sequence(), state) for part in x.split([12, 1, 7], dim=1)], dim=1)
    assert (y.float() - expected).abs().max() < 0.03 * expected.abs().max()
    assert {name: tensor.dtype for name, tensor in state.tensors().items()} == kinds
    mixer.to(torch.bfloat16)
    low = mixer(x.bfloat16(), Sequence(), mixer.init_state(2))
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.03 * expected.abs().max()
