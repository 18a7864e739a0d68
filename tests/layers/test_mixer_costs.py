"""Declared costs over random configurations: FLOPs as torch counts them, bytes as states have them, parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridvl.layers import MIXERS, MixerConfig
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.testing.check import relative_error
from hybridvl.testing.costs import COSTS
from hybridvl.testing.subject import Subject

flags, few = st.booleans(), st.integers(1, 3)
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def attentions(draw: st.DrawFn, kind: type[FullAttentionConfig] | type[SlidingWindowConfig]) -> tuple[MixerConfig, int]:
    kv_heads = draw(few)
    options = {
        "heads": kv_heads * draw(few),
        "kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 9)),
        "qkv_bias": draw(flags),
        "out_bias": draw(flags),
        "qk_norm": draw(flags),
        "rope": draw(flags),
    }
    if kind is SlidingWindowConfig:
        options["window"] = draw(st.integers(1, 90))
    return kind(**options), draw(st.integers(1, 40))


@st.composite
def delta_nets(draw: st.DrawFn) -> tuple[MixerConfig, int]:
    heads, dim = draw(few), draw(st.integers(1, 12))
    config = GatedDeltaNetConfig(
        heads=heads,
        value_heads=draw(st.one_of(st.none(), few.map(lambda group: group * heads))),
        head_dim=dim,
        expand_v=draw(st.integers(1, 3 * dim)) / dim if draw(flags) else 2.0,
        conv_width=draw(st.integers(1, 5)),
        gate=draw(flags),
        negative_eigenvalues=draw(flags),
    )
    return config, draw(st.integers(1, 40))


@st.composite
def mambas(draw: st.DrawFn) -> tuple[MixerConfig, int]:
    groups, dim = draw(few), draw(st.integers(1, 9))
    width = dim * groups * draw(few)
    config = Mamba2Config(
        expand=draw(few),
        head_dim=dim,
        state_dim=draw(st.integers(1, 20)),
        groups=groups,
        conv_width=draw(st.integers(1, 5)),
        conv_bias=draw(flags),
        proj_bias=draw(flags),
    )
    return config, width


RANDOM = {
    "full": attentions(FullAttentionConfig),
    "swa": attentions(SlidingWindowConfig),
    "gdn": delta_nets(),
    "mamba2": mambas(),
}


def check(name: str, config: MixerConfig, width: int, tokens: int) -> None:
    subject = Subject(config, width, batch=2, tokens=tokens, seed=0, dtype=torch.float32)
    for what, found, expected in COSTS[name](subject):
        assert relative_error(found, expected) == 0, f"{config}, width {width}: {what}"


def test_every_mixer_is_drawn() -> None:
    assert {name for name, kind in MIXERS.items() if kind.__module__.startswith("hybridvl.layers.")} == set(RANDOM)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("kind", RANDOM)
def test_costs_of_random_configurations(kind: str, name: str) -> None:
    @quick
    @given(RANDOM[kind], st.integers(16, 120))
    def holds(drawn: tuple[MixerConfig, int], tokens: int) -> None:
        check(name, *drawn, tokens)

    holds()


@pytest.mark.parametrize("name", COSTS)
def test_costs_side_by_side(name: str) -> None:
    @settings(quick, max_examples=6)
    @given(RANDOM["swa"], RANDOM["gdn"], st.integers(16, 100))
    def holds(left: tuple[MixerConfig, int], right: tuple[MixerConfig, int], tokens: int) -> None:
        check(name, ParallelConfig(branches=(left[0], right[0])), left[1], tokens)

    holds()


@pytest.mark.parametrize("kind", RANDOM)
def test_flops_grow_with_tokens_and_never_with_the_context_of_a_recurrence(kind: str) -> None:
    @quick
    @given(RANDOM[kind], st.integers(1, 300), st.integers(1, 5000))
    def holds(drawn: tuple[MixerConfig, int], tokens: int, context: int) -> None:
        config, width = drawn
        assert 0 < config.flops(width, tokens) < config.flops(width, 2 * tokens + 64)
        far = 100 + context  # beyond every window
        later = [config.flops(width, 1, far), config.flops(width, 1, 2 * far)]
        assert (later[0] == later[1]) == (kind != "full")

    holds()
