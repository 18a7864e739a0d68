"""Inheritance: which rows and columns of attention each mixer takes, against constructions in numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.inherit import inherit_weights, inherited_pieces, same_weights
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.pieces import qkvo_rule
from hybridvl.layers.swa import SlidingWindowConfig

WIDTH = 12


def inherit(config: MixerConfig, source: MixerConfig, mode: str = "qkvo") -> tuple[dict, dict, dict]:
    """Tensors of the source, of a new mixer before and after it inherits, as arrays."""
    torch.manual_seed(0)
    teacher, mixer = source.build(WIDTH), config.build(WIDTH)
    before = arrays(mixer.state_dict())
    inherit_weights(mixer, inherited_pieces(config, source, WIDTH, mode), teacher.state_dict())
    return arrays(teacher.state_dict()), before, arrays(mixer.state_dict())


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def expanded(rows: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """(kv_heads * dim, ...) repeated in head order to (heads, dim, ...)."""
    grouped = rows.reshape(-1, dim, *rows.shape[1:])
    return np.repeat(grouped, heads // len(grouped), axis=0)


@st.composite
def attention_configs(draw: st.DrawFn) -> FullAttentionConfig | SlidingWindowConfig:
    kv_heads = draw(st.integers(1, 3))
    sizes = {"heads": kv_heads * draw(st.integers(1, 4)), "kv_heads": kv_heads, "head_dim": 2 * draw(st.integers(1, 3))}
    flags = {name: draw(st.booleans()) for name in ("qkv_bias", "out_bias", "qk_norm")}
    if draw(st.booleans()):
        return SlidingWindowConfig(**sizes, **flags, window=5)
    return FullAttentionConfig(**sizes, **flags)


@settings(max_examples=30, deadline=None)
@given(source=attention_configs(), expand=st.sampled_from([0.5, 1.0, 2.0]), gate=st.booleans())
def test_gated_delta_net_by_numpy(source: FullAttentionConfig, expand: float, gate: bool) -> None:
    heads, dim = source.heads, source.head_dim
    config = GatedDeltaNetConfig(heads=heads, head_dim=dim, expand_v=expand, gate=gate)
    taught, before, after = inherit(config, source)
    values, shared = config.value_dim, min(config.value_dim, dim)
    wanted = dict(before)
    wanted["q_proj.weight"] = taught["q_proj.weight"]
    wanted["k_proj.weight"] = expanded(taught["k_proj.weight"], heads, dim).reshape(heads * dim, WIDTH)
    rows = before["v_proj.weight"].reshape(heads, values, WIDTH).copy()
    rows[:, :shared] = expanded(taught["v_proj.weight"], heads, dim)[:, :shared]
    wanted["v_proj.weight"] = rows.reshape(heads * values, WIDTH)
    columns = before["o_proj.weight"].reshape(WIDTH, heads, values).copy()
    columns[:, :, :shared] = taught["o_proj.weight"].reshape(WIDTH, heads, dim)[:, :, :shared]
    wanted["o_proj.weight"] = columns.reshape(WIDTH, heads * values)
    assert after.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(source=attention_configs(), proj_bias=st.booleans(), state=st.sampled_from([2, 4, 8]))
def test_mamba2_by_numpy(source: FullAttentionConfig, proj_bias: bool, state: int) -> None:
    # One head of the source's dim for each of its query heads: width 12 has to be a divisor of all of them.
    heads, dim = source.heads, source.head_dim
    if heads * dim % WIDTH:
        source = dataclasses.replace(source, heads=6, kv_heads=2, head_dim=4)
        heads, dim = 6, 4
    expand = heads * dim // WIDTH
    options = {"expand": expand, "head_dim": dim, "state_dim": state, "groups": heads, "proj_bias": proj_bias}
    taught, before, after = inherit(Mamba2Config(**options), source)
    inner, shared = heads * dim, min(state, dim)
    for kind in ("weight", "bias"):
        name = f"in_proj.{kind}"
        if name not in after:
            continue
        given = kind == "weight" or source.qkv_bias
        z, x, b, c, dt = np.split(after[name], np.cumsum([inner, inner, heads * state, heads * state]))
        old = np.split(before[name], np.cumsum([inner, inner, heads * state, heads * state]))
        np.testing.assert_array_equal(z, old[0])
        np.testing.assert_array_equal(dt, old[4])
        for found, was, projection in ((x, old[1], "v_proj"), (b, old[2], "k_proj"), (c, old[3], "q_proj")):
            wide = len(found) // heads
            wanted = was.reshape(heads, wide, *was.shape[1:]).copy()
            rows = min(wide, dim) if found is x else shared
            if given:
                wanted[:, :rows] = expanded(taught[f"{projection}.{kind}"], heads, dim)[:, :rows]
            np.testing.assert_array_equal(found, wanted.reshape(was.shape))
    np.testing.assert_array_equal(after["out_proj.weight"], taught["o_proj.weight"])
    if proj_bias and source.out_bias:
        np.testing.assert_array_equal(after["out_proj.bias"], taught["o_proj.bias"])
    untouched = {"conv1d.weight", "conv1d.bias", "A_log", "dt_bias", "D", "norm.weight"}
    assert all((after[name] == before[name]).all() for name in untouched)


@settings(max_examples=20, deadline=None)
@given(source=attention_configs(), repeats=st.integers(1, 3), kv_repeats=st.integers(1, 2), window=st.booleans())
@torch.no_grad()
def test_attention_with_more_heads_computes_the_same(
    source: FullAttentionConfig, repeats: int, kv_repeats: int, window: bool
) -> None:
    """Query heads repeated with their columns divided, key/value heads repeated under them: the same function."""
    from hybridvl.layers import Sequence

    heads = source.heads * repeats
    sizes = {"heads": heads, "kv_heads": source.kv_heads, "head_dim": source.head_dim}
    if heads % (source.kv_heads * kv_repeats) == 0:
        sizes["kv_heads"] = source.kv_heads * kv_repeats
    source = FullAttentionConfig(**{**dataclasses.asdict(source_geometry(source)), "rope": False})
    flags = {"qkv_bias": True, "out_bias": source.out_bias, "qk_norm": source.qk_norm, "rope": False}
    config = SlidingWindowConfig(**sizes, **flags, window=9) if window else FullAttentionConfig(**sizes, **flags)
    torch.manual_seed(1)
    teacher, mixer = source.build(WIDTH), config.build(WIDTH)
    for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
        projection.bias.zero_()
    inherit_weights(mixer, inherited_pieces(config, source, WIDTH), teacher.state_dict())
    x = torch.randn(2, 9, WIDTH)
    torch.testing.assert_close(mixer(x, Sequence()), teacher(x, Sequence()), rtol=1e-5, atol=1e-6)


def source_geometry(source: FullAttentionConfig) -> FullAttentionConfig:
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(FullAttentionConfig)}
    return FullAttentionConfig(**fields)


SOURCE = FullAttentionConfig(heads=4, kv_heads=2, head_dim=4)


def test_fewer_and_more_heads() -> None:
    taught, _, after = inherit(GatedDeltaNetConfig(heads=2, value_heads=8, head_dim=6, expand_v=0.5), SOURCE)
    queries = taught["q_proj.weight"].reshape(4, 4, WIDTH)
    found = after["q_proj.weight"].reshape(2, 6, WIDTH)
    np.testing.assert_array_equal(found[:, :4], queries[[0, 2]])  # the first of every two, its four rows first
    columns = after["o_proj.weight"].reshape(WIDTH, 8, 3)
    wanted = taught["o_proj.weight"].reshape(WIDTH, 4, 4)[:, [0, 0, 1, 1, 2, 2, 3, 3], :3] / 2
    np.testing.assert_array_equal(columns, wanted)
    values = after["v_proj.weight"].reshape(8, 3, WIDTH)
    heads = taught["v_proj.weight"].reshape(2, 4, WIDTH)[[0, 0, 0, 0, 1, 1, 1, 1], :3]
    np.testing.assert_array_equal(values, heads)


@pytest.mark.parametrize("mode", ["none", "qkvo"])
def test_the_same_layer_is_copied_whatever_is_inherited(mode: str) -> None:
    wide = SlidingWindowConfig(heads=4, kv_heads=2, head_dim=4, window=7)
    for config, source in ((wide, SOURCE), (SOURCE, wide), (dataclasses.replace(wide, window=3), wide)):
        taught, _, after = inherit(config, source, mode)
        assert taught.keys() == after.keys()
        assert all((taught[name] == after[name]).all() for name in taught)
    gdn = GatedDeltaNetConfig(heads=2, head_dim=4)
    taught, _, after = inherit(dataclasses.replace(gdn, value_heads=2, negative_eigenvalues=True), gdn, mode)
    assert all((taught[name] == after[name]).all() for name in taught)


def test_what_is_the_same_layer() -> None:
    assert not same_weights(dataclasses.replace(SOURCE, heads=8, head_dim=2, kv_heads=4), SOURCE)  # the shapes agree
    assert not same_weights(dataclasses.replace(SOURCE, qk_norm=True), SOURCE)
    assert not same_weights(GatedDeltaNetConfig(), SOURCE)
    both = ParallelConfig(branches=(SOURCE, GatedDeltaNetConfig(heads=4, head_dim=4)))
    assert same_weights(both, dataclasses.replace(both, norm_eps=1e-3))
    assert not same_weights(both, SOURCE)


def test_none_leaves_other_mixers_alone() -> None:
    for config in (
        GatedDeltaNetConfig(heads=4, head_dim=4),
        Mamba2Config(head_dim=4),
        dataclasses.replace(SOURCE, heads=8),
    ):
        assert inherited_pieces(config, SOURCE, WIDTH, "none") == []
    assert inherited_pieces(SOURCE, GatedDeltaNetConfig(heads=4, head_dim=4), WIDTH) == []  # no rule this way


@pytest.mark.parametrize("mode", ["none", "qkvo"])
def test_branches_follow_their_own_rules(mode: str) -> None:
    window = SlidingWindowConfig(heads=4, kv_heads=2, head_dim=4, window=7)
    gdn = GatedDeltaNetConfig(heads=4, head_dim=4)
    taught, before, after = inherit(ParallelConfig(branches=(window, gdn)), SOURCE, mode)
    assert all((after[f"branches.0.{name}"] == taught[name]).all() for name in taught)
    inherits = (after["branches.1.q_proj.weight"] == taught["q_proj.weight"]).all()
    assert inherits == (mode == "qkvo")
    assert all((after[name] == before[name]).all() for name in after if name.startswith("norms."))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GatedDeltaNetConfig(heads=3, head_dim=4),
            r"^gdn.heads: 3 heads cannot inherit from 4 query heads; expected a mu",
        ),
        (GatedDeltaNetConfig(heads=2, value_heads=6, head_dim=4), "gdn.value_heads: 6 heads cannot inherit from 4"),
        (Mamba2Config(head_dim=4), r"mamba2.head_dim: 6 heads cannot inherit from 4 query heads"),
        (FullAttentionConfig(heads=6, kv_heads=2, head_dim=4), "full.heads: 6 heads cannot inherit from 4"),
    ],
)
def test_heads_that_do_not_divide(config: MixerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inherited_pieces(config, SOURCE, WIDTH)


def test_unknown_inheritance() -> None:
    with pytest.raises(ConfigError, match="inherit = 'qkv': expected one of none, qkvo"):
        inherited_pieces(SOURCE, SOURCE, WIDTH, "qkv")


def test_a_mixer_from_elsewhere_brings_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridvl.layers import pieces as module

    monkeypatch.setattr(module, "_RULES", dict(module._RULES))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(GatedDeltaNetConfig):
        """A subclass, which has its parent's rule until it has its own."""

    config = Other(heads=4, head_dim=4)
    parent = GatedDeltaNetConfig(heads=4, head_dim=4)
    assert inherited_pieces(config, SOURCE, WIDTH) == inherited_pieces(parent, SOURCE, WIDTH)

    @qkvo_rule(Other)
    def output_alone(config: Other, source: FullAttentionConfig, width: int) -> list[module.Piece]:
        return [module.head_piece("o_proj.weight", "o_proj.weight", range(4), (config.value_dim, 4), axis=1)]

    assert {piece.target for piece in inherited_pieces(config, SOURCE, WIDTH)} == {"o_proj.weight"}
    assert len(inherited_pieces(parent, SOURCE, WIDTH)) == 4
