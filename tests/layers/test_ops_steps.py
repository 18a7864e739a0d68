"""Decode steps of Gated DeltaNet and Mamba2 against their definitions in float64, token by token, and in place."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops import gated_delta_rule
from hybridvl.layers.ops.delta_step import delta_rule_step, delta_rule_step_reference
from hybridvl.layers.ops.gdn_step import gated_delta_net_step
from hybridvl.layers.ops.mamba2_step import mamba2_step

Inputs = dict[str, Tensor]
Make = Callable[..., Tensor]


def _source(seed: int) -> Make:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def gdn_inputs(
    rows: int, key_heads: int, heads: int, key_dim: int, value_dim: int, width: int = 4, gate: bool = True
) -> tuple[Inputs, Inputs, Inputs]:
    """Projections of one token, states, parameters."""
    make = _source(rows + heads + value_dim)
    keys, values = key_heads * key_dim, heads * value_dim
    token = {"q": make(rows, keys), "k": make(rows, keys), "v": make(rows, values)}
    token |= {"a": make(rows, heads), "b": make(rows, heads)} | ({"gate": make(rows, values)} if gate else {})
    sizes = {"q": keys, "k": keys, "v": values}
    states = {f"conv_{name}": make(rows, size, width) for name, size in sizes.items()}
    states["recurrent"] = make(rows, heads, key_dim, value_dim)
    fixed = {f"{name}_weight": make(size, width) for name, size in sizes.items()}
    fixed |= {"A_log": make(heads), "dt_bias": make(heads), "norm_weight": make(value_dim)}
    return token, states, fixed


def mamba2_inputs(rows: int, heads: int, head_dim: int, state_dim: int, groups: int) -> tuple[Inputs, Inputs, Inputs]:
    """Projections of one token, states, parameters."""
    make = _source(rows + heads + state_dim)
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state_dim
    token = {"z": make(rows, inner), "channels": make(rows, channels), "dt": make(rows, heads)}
    states = {"recurrent": make(rows, heads, head_dim, state_dim), "conv": make(rows, channels, 4)}
    fixed = {"conv_weight": make(channels, 4), "conv_bias": make(channels), "norm_weight": make(inner)}
    return token, states, fixed | {"A_log": make(heads), "dt_bias": make(heads), "D": make(heads)}


def cast(tensors: Inputs, dtype: torch.dtype, keep: tuple[str, ...] = ()) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(wide if name in keep else dtype, copy=True) for name, x in tensors.items()}


def run(step: Callable[..., Tensor], inputs: tuple[Inputs, Inputs, Inputs], dtype: torch.dtype, **options: object):
    """y and the states after three tokens, the second and third of which are the first one's rows turned."""
    token, states, fixed = inputs
    narrow = cast(token, dtype), cast(fixed, dtype, ("A_log", "dt_bias", "D"))
    own = cast(states, dtype, ("recurrent",))
    addresses = {name: x.data_ptr() for name, x in own.items()}
    outputs = []
    for turn in range(3):
        turned = {name: x.roll(turn, dims=-1) for name, x in narrow[0].items()}
        outputs.append(step(**(turned if "z" in turned else {"gate": None, **turned}), **own, **narrow[1], **options))
    assert {name: x.data_ptr() for name, x in own.items()} == addresses
    return {"y": torch.stack(outputs)} | own


GDN = {
    "plain": (2, 2, 2, 8, 16),
    "grouped": (2, 2, 6, 8, 4),
    "one row, wide state": (1, 4, 8, 128, 256),
    "rows, grouped, wide state": (3, 2, 4, 96, 250),
    "key dim of no whole parts": (3, 4, 4, 100, 256),
    "no gate": (2, 3, 3, 4, 2, 2, False),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("sizes", GDN.values(), ids=GDN)
def test_gated_delta_net(sizes: tuple[int, ...], negative: bool, dtype: torch.dtype, tolerance: float) -> None:
    inputs = gdn_inputs(*sizes)
    expected = run(gated_delta_net_step, inputs, torch.float64, negative_eigenvalues=negative, backend="reference")
    got = run(gated_delta_net_step, inputs, dtype, negative_eigenvalues=negative)
    assert got["y"].dtype == dtype
    for name, value in expected.items():
        assert (got[name].double() - value).abs().max() <= tolerance * value.abs().max(), name


MAMBA2 = {"plain": (2, 2, 4, 8, 1), "groups": (3, 6, 4, 8, 3), "paper": (1, 32, 64, 128, 1)}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("sizes", MAMBA2.values(), ids=MAMBA2)
def test_mamba2(sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    inputs = mamba2_inputs(*sizes)
    expected = run(mamba2_step, inputs, torch.float64, groups=sizes[-1], backend="reference")
    got = run(mamba2_step, inputs, dtype, groups=sizes[-1])
    assert got["y"].dtype == dtype
    for name, value in expected.items():
        assert (got[name].double() - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("step", [delta_rule_step, delta_rule_step_reference])
def test_delta_rule_step_is_the_rule_at_one_token(step: Callable[..., Tensor]) -> None:
    make = _source(5)
    q, k, v = make(2, 1, 2, 5), make(2, 1, 2, 5), make(2, 1, 4, 3)
    g, beta, state = -make(2, 1, 4).abs(), make(2, 1, 4).sigmoid(), make(2, 4, 5, 3)
    o, final = gated_delta_rule(q, k, v, g, beta, initial_state=state, scale=0.3, backend="reference")
    pair = torch.stack((k[:, 0], 0.3 * q[:, 0]), dim=2)
    got = step(pair, v[:, 0], g[:, 0], beta[:, 0], state)
    torch.testing.assert_close(got, o[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 8, 8), (1, 4, 8, 128, 256)], ids=["small", "wide"])
@pytest.mark.parametrize("decay", [-60.0, -1e4, -float("inf")])
def test_a_decay_that_forgets_all_leaves_no_denormals(sizes: tuple[int, ...], decay: float) -> None:
    make = _source(0)
    rows, _, heads, key_dim, value_dim = sizes
    state, pair = make(rows, heads, key_dim, value_dim).float(), make(rows, heads, 2, key_dim).float()
    v, beta = make(rows, heads, value_dim).float(), torch.zeros(rows, heads)
    o = delta_rule_step(pair, v, torch.full((rows, heads), decay), beta, state)
    assert torch.equal(state, torch.zeros_like(state))
    assert torch.equal(o, torch.zeros_like(o))


@torch.no_grad()
def test_wide_states_stay_as_exact_as_sums_in_pairs() -> None:
    """The output's error over 40 tokens against the elementwise recurrence with `Tensor.sum`, both in float32."""
    make = _source(3)
    exact = 0.1 * make(1, 8, 128, 256)
    own, other = exact.float(), exact.float()
    errors = []
    for _ in range(40):
        pair, v, g, beta = make(1, 8, 2, 128), make(1, 8, 256), -0.1 * make(1, 8).abs(), make(1, 8).sigmoid()
        pair = pair / pair.norm(dim=-1, keepdim=True)
        expected = delta_rule_step_reference(pair, v, g, beta, exact)
        got = delta_rule_step(pair.float(), v.float(), g.float(), beta.float(), own)
        key, query = (x.float().unsqueeze(-1) for x in pair.unbind(2))  # (1, 8, 128, 1)
        other = other * g.float().exp()[..., None, None]
        change = (v.float() - (other * key).sum(2)) * beta.float().unsqueeze(-1)
        other = other + key * change.unsqueeze(2)
        errors.append([(y - expected).norm() / expected.norm() for y in (got, (other * query).sum(2))])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours <= 1.1 * theirs < 1e-6


def test_steps_record_no_gradients() -> None:
    token, states, fixed = gdn_inputs(1, 1, 1, 2, 2)
    leaves = {name: x.requires_grad_() for name, x in token.items()}
    assert not gated_delta_net_step(**leaves, **states, **fixed).requires_grad
    token, states, fixed = mamba2_inputs(1, 1, 2, 2, 1)
    assert not mamba2_step(**token, **states, **{name: x.requires_grad_() for name, x in fixed.items()}).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "a has shape (2, 3), expected (B, H) = (2, 2)"),
        ({"conv_v": torch.zeros(2, 4, 4)}, "conv_v has shape (2, 4, 4), expected (B, channels, W) = (2, 6, 4)"),
        (
            {"q": torch.zeros(2, 12), "k": torch.zeros(2, 12)},
            "q has 12 channels, expected K = 4 times a divisor of the 2",
        ),
        ({"v": torch.zeros(2, 6, dtype=torch.int64)}, "v has dtype torch.int64"),
    ],
)
def test_misshapen_arguments(change: Inputs, message: str) -> None:
    token, states, fixed = gdn_inputs(2, 1, 2, 4, 3)
    with pytest.raises(ConfigError, match=re.escape(message)):
        gated_delta_net_step(**(token | states | fixed | change))


def test_misshapen_arguments_of_mamba2() -> None:
    token, states, fixed = mamba2_inputs(2, 4, 2, 3, 2)
    with pytest.raises(ConfigError, match=re.escape("groups is 3, expected a divisor of the 4 heads")):
        mamba2_step(**token, **states, **fixed, groups=3)
    with pytest.raises(ConfigError, match=re.escape("expected (B, H * P + 2 * G * N) = (2, 14)")):
        mamba2_step(**token, **states, **fixed, groups=1)
