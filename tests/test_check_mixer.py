"""check_mixer passes every built-in mixer and finds a fault planted for each property."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from faulty_mixers import CALL_FAULTS, GDN, PLANTED, FaultyConfig, NarrowableState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridvl.layers import ConfigError, Mixer, MixerConfig, Sequence, State
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.swa import SlidingWindowConfig
from hybridvl.testing import PROPERTIES, MixerCheckError, check_mixer

FULL = FullAttentionConfig(heads=4, kv_heads=2, head_dim=8)
SWA = SlidingWindowConfig(heads=2, kv_heads=1, head_dim=8, window=7)
MAMBA2 = Mamba2Config(head_dim=8, state_dim=8, groups=2)

VARIANTS = {
    "full": FULL,
    "full no rope, norms, biases": dataclasses.replace(FULL, rope=False, qk_norm=True, qkv_bias=False, out_bias=True),
    "swa": SWA,
    "swa window 1": dataclasses.replace(SWA, window=1),
    "swa window above the length": dataclasses.replace(SWA, window=100),
    "gdn": GDN,
    "gdn grouped": GatedDeltaNetConfig(heads=1, value_heads=3, head_dim=8, expand_v=1.5, negative_eigenvalues=True),
    "gdn plain": GatedDeltaNetConfig(heads=2, head_dim=4, gate=False, conv_width=1),
    "mamba2": MAMBA2,
    "mamba2 biases": Mamba2Config(head_dim=16, state_dim=4, conv_bias=False, proj_bias=True, conv_width=2),
    "parallel": ParallelConfig(branches=(SWA, MAMBA2, dataclasses.replace(FULL, head_dim=4))),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_mixer_keeps_every_promise(config: MixerConfig) -> None:
    tokens = 70 if config is FULL else 34  # beyond a block of its cache, or a chunk of the recurrences
    errors = check_mixer(config, width=16, tokens=tokens)
    grows = config.state_bytes(1, torch.float32, 16) != config.state_bytes(10_000, torch.float32, 16)
    assert errors.keys() == PROPERTIES.keys() - ({"fixed addresses"} if grows else set())
    assert max(errors.values()) < 2e-5


attention_options = st.fixed_dictionaries(
    {"head_dim": st.sampled_from([2, 6, 8]), "norm_eps": st.sampled_from([1e-6, 1e-3])}
    | {name: st.booleans() for name in ("qkv_bias", "out_bias", "qk_norm", "rope")}
)
configs = st.one_of(
    st.builds(
        lambda kv, repeats, options: FullAttentionConfig(heads=kv * repeats, kv_heads=kv, **options),
        *(st.integers(1, 2), st.integers(1, 3), attention_options),
    ),
    st.builds(
        lambda kv, window, options: SlidingWindowConfig(heads=2 * kv, kv_heads=kv, window=window, **options),
        *(st.integers(1, 2), st.integers(1, 40), attention_options),
    ),
    st.builds(
        lambda heads, repeats, options: GatedDeltaNetConfig(heads=heads, value_heads=heads * repeats, **options),
        st.integers(1, 2),
        st.integers(1, 3),
        st.fixed_dictionaries(
            {"head_dim": st.sampled_from([4, 8]), "expand_v": st.sampled_from([0.5, 1.0, 2.0])}
            | {"conv_width": st.integers(1, 5), "gate": st.booleans(), "negative_eigenvalues": st.booleans()}
        ),
    ),
    st.builds(
        lambda options: Mamba2Config(**options),
        st.fixed_dictionaries(
            {"expand": st.integers(1, 3), "head_dim": st.sampled_from([2, 4]), "state_dim": st.integers(1, 9)}
            | {"groups": st.sampled_from([1, 2, 4]), "conv_width": st.integers(1, 5)}
            | {"conv_bias": st.booleans(), "proj_bias": st.booleans()}
        ),
    ),
)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs, tokens=st.integers(16, 36), seed=st.integers(0, 10))
def test_any_options_keep_every_promise(config: MixerConfig, tokens: int, seed: int) -> None:
    assert check_mixer(config, width=16, tokens=tokens, seed=seed)


def test_a_fault_is_planted_for_every_property() -> None:
    assert {prop for _, prop in PLANTED} == PROPERTIES.keys()


@pytest.fixture
def working_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gated DeltaNet takes any state that has its tensors."""
    monkeypatch.setattr("hybridvl.layers.gdn.GatedDeltaNetState", NarrowableState)


@pytest.mark.usefixtures("working_mixer")
def test_the_mixer_around_the_faults_is_healthy() -> None:
    assert check_mixer(FaultyConfig(fault="none"), width=16, tokens=24)


@pytest.mark.usefixtures("working_mixer")
@pytest.mark.parametrize(("fault", "prop"), PLANTED)
def test_every_planted_fault_is_found(fault: str, prop: str) -> None:
    with pytest.raises(MixerCheckError) as caught:
        check_mixer(FaultyConfig(fault=fault), width=16, tokens=24, skip=PROPERTIES.keys() - {prop})
    assert caught.value.failures.keys() == {prop}
    error, what = caught.value.failures[prop]
    assert f"{prop}: worst error {error:.3g} ({what})" in str(caught.value)
    assert error > 1e-10


@pytest.mark.usefixtures("working_mixer")
@pytest.mark.parametrize(
    ("fault", "unharmed"),
    [
        ("forgets in steps", "padding gradients"),
        ("leaks gradients into padding", "left padding"),
        ("believes padding is outside", "left padding"),
        ("swaps segments", "final state"),
        ("num_params", "flops"),
    ],
)
def test_what_a_fault_does_not_touch_is_not_blamed(fault: str, unharmed: str) -> None:
    assert check_mixer(FaultyConfig(fault=fault), width=16, tokens=24, skip=PROPERTIES.keys() - {unharmed})


def test_off_by_one_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window of one pass and that of the cache are two pieces of code: they must not drift apart."""
    monkeypatch.setattr("hybridvl.layers.softmax_attention.attention", _one_token_too_many)
    with pytest.raises(MixerCheckError) as caught:
        check_mixer(SWA, width=16, tokens=24, skip=PROPERTIES.keys() - {"chunks", "steps", "rows"})
    assert caught.value.failures.keys() == {"chunks", "steps"}


def _one_token_too_many(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    from hybridvl.layers.ops import attention

    wider = None if window is None else window + 1
    return attention(q, k, v, window=wider, cu_seqlens=cu_seqlens, mask=mask, backend=backend)


def test_a_mixer_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(mixer: Mixer, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
        if sequence.cu_seqlens is not None:
            raise RuntimeError("no packing here")
        return mixer(x, sequence, state)

    monkeypatch.setitem(CALL_FAULTS, "stumbles", ("packing", stumble))
    with pytest.raises(MixerCheckError, match="raised RuntimeError: no packing here") as caught:
        check_mixer(FaultyConfig(fault="stumbles", inner=FULL), width=16, tokens=24)
    assert caught.value.failures.keys() == {"packing", "packing gradients", "packed state"}


def test_skip_leaves_a_property_out() -> None:
    errors = check_mixer(FaultyConfig(fault="flops", inner=SWA), width=16, tokens=16, skip=["flops"])
    assert "flops" not in errors


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="skip = \\['flop'\\]: expected some of output"):
        check_mixer(SWA, skip=["flop"])
    with pytest.raises(ConfigError, match="batch = 1, tokens = 70"):
        check_mixer(SWA, batch=1)
