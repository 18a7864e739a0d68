"""Options of the mixers: what is refused and how, and costs at the published sizes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.swa import SlidingWindowConfig

REFUSED = [
    (FullAttentionConfig, {"heads": 16, "kv_heads": 3}, "full.kv_heads = 3: expected a divisor of heads = 16"),
    (FullAttentionConfig, {"heads": 0}, "full.heads = 0: expected an integer of at least 1"),
    (FullAttentionConfig, {"head_dim": 7}, "full.head_dim = 7: expected an even number with rope"),
    (FullAttentionConfig, {"heads": 2.0}, "full.heads = 2.0: expected an integer"),
    (FullAttentionConfig, {"heads": True}, "full.heads = True: expected an integer"),
    (FullAttentionConfig, {"rope": "yes"}, "full.rope = 'yes': expected true or false"),
    (FullAttentionConfig, {"norm_eps": 0}, "full.norm_eps = 0: expected a number above 0"),
    (
        FullAttentionConfig,
        {"backend": "cuda"},
        "full.backend = 'cuda': expected one of auto, flash_attn, flex, reference,",
    ),
    (SlidingWindowConfig, {"window": 0}, "swa.window = 0: expected an integer of at least 1"),
    (SlidingWindowConfig, {"window": -8}, "swa.window = -8: expected an integer of at least 1"),
    (SlidingWindowConfig, {"window": "8"}, "swa.window = '8': expected an integer"),
    (SlidingWindowConfig, {"kv_heads": 5}, "swa.kv_heads = 5: expected a divisor of heads = 16"),
    (GatedDeltaNetConfig, {"value_heads": 24}, "gdn.value_heads = 24: expected a multiple of heads = 16, or null"),
    (GatedDeltaNetConfig, {"value_heads": 0}, "gdn.value_heads = 0: expected a multiple of heads = 16, or null"),
    (GatedDeltaNetConfig, {"value_heads": 1.5}, "gdn.value_heads = 1.5: expected an integer or null"),
    (GatedDeltaNetConfig, {"expand_v": -1.0}, "gdn.expand_v = -1.0: expected a number above 0"),
    (
        GatedDeltaNetConfig,
        {"head_dim": 5, "expand_v": 1.5},
        "gdn.expand_v = 1.5: expected a number that gives whole value dims with head_dim = 5",
    ),
    (
        GatedDeltaNetConfig,
        {"head_dim": 4, "expand_v": 0.1},
        "gdn.expand_v = 0.1: expected a number that gives whole value dims with head_dim = 4",
    ),
    (GatedDeltaNetConfig, {"conv_width": 0}, "gdn.conv_width = 0: expected an integer of at least 1"),
    (GatedDeltaNetConfig, {"norm_eps": float("nan")}, "gdn.norm_eps = nan: expected a number above 0"),
    (
        GatedDeltaNetConfig,
        {"backend": "sdpa"},
        "gdn.backend = 'sdpa': expected one of auto, fla, reference, torch, triton",
    ),
    (GatedDeltaNetConfig, {"dt_max": 1e-5}, "gdn.dt_max = 1e-05: expected at least dt_min = 0.001"),
    (GatedDeltaNetConfig, {"dt_min": 0.0}, "gdn.dt_min = 0.0: expected a number above 0"),
    (Mamba2Config, {"groups": -1}, "mamba2.groups = -1: expected an integer of at least 1"),
    (Mamba2Config, {"dt_max": 1e-5}, "mamba2.dt_max = 1e-05: expected at least dt_min = 0.001"),
    (Mamba2Config, {"A_max": 0.5}, "mamba2.A_max = 0.5: expected at least A_min = 1.0"),
    (Mamba2Config, {"A_min": 0.0}, "mamba2.A_min = 0.0: expected a number above 0"),
    (ParallelConfig, {"branches": (Mamba2Config(),)}, "expected two or more mixer configurations"),
    (ParallelConfig, {"branches": (Mamba2Config(), "swa")}, "expected tuple[hybridvl.layers.base.MixerConfig, ...]"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_bad_options_are_named(kind: type[MixerConfig], options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    assert message in str(caught.value)


def test_width_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"mamba2.head_dim = 64: expected a divisor of expand \* width = 2 \* 40"):
        Mamba2Config().build(40)
    with pytest.raises(ConfigError, match=r"mamba2.groups = 3: expected a divisor of the 2 heads"):
        Mamba2Config(groups=3).num_params(64)
    for config in (FullAttentionConfig(), GatedDeltaNetConfig(), Mamba2Config()):
        with pytest.raises(ConfigError, match=f"{config.name}: width = 0: expected"):
            config.build(0)


def test_configs_are_frozen_and_take_keywords_only() -> None:
    config = SlidingWindowConfig(window=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        SlidingWindowConfig(16)  # type: ignore[misc]
    assert dataclasses.replace(config, heads=2).window == 3


def test_published_sizes() -> None:
    """Qwen2.5-VL-3B's and InfiniteVL-4B's mixers, from the defaults."""
    assert FullAttentionConfig().num_params(2048) == SlidingWindowConfig().num_params(2048) == 9_439_744
    assert GatedDeltaNetConfig().num_params(2048) == 33_653_024
    token = 36 * (FullAttentionConfig().state_bytes(64, torch.bfloat16) - 8) / 64
    assert token == 36_864
    window = SlidingWindowConfig().state_bytes(10**6, torch.bfloat16)
    assert 9 * (window - 8) == 75_488_256 // 8191 * 8192


@pytest.mark.parametrize(
    "config",
    [FullAttentionConfig(), SlidingWindowConfig(), GatedDeltaNetConfig(), Mamba2Config()],
    ids=lambda config: config.name,
)
def test_costs_at_full_size_equal_the_module_on_the_meta_device(config: MixerConfig) -> None:
    with torch.device("meta"):
        mixer = config.build(2048)
        state = mixer.init_state(3, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == config.num_params(2048)
    assert state.nbytes == 3 * config.state_bytes(0, torch.bfloat16, 2048)
    assert {tensor.device.type for tensor in state.tensors().values()} == {"meta"}


def test_parallel_sums_its_branches() -> None:
    branches = (FullAttentionConfig(head_dim=64), SlidingWindowConfig(head_dim=32, rope=False), Mamba2Config())
    config = ParallelConfig(branches=branches)
    assert config.rotary_dims == {64}
    assert config.num_params(256) == sum(branch.num_params(256) for branch in branches) + 3 * 256
    assert config.flops(256, 10, 5) == sum(branch.flops(256, 10, 5) for branch in branches)
    one = sum(branch.state_bytes(100, torch.float32, 256) for branch in branches)
    assert config.state_bytes(100, torch.float32, 256) == one


def test_layers_need_torch_alone() -> None:
    code = (
        "import sys; import hybridvl.layers as layers; assert set(layers.MIXERS) == {'full', 'swa', 'gdn', 'mamba2'};"
        "heavy = {'lightning', 'transformers', 'datasets', 'triton', 'fla', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_ratio_of_whole_dims_is_taken() -> None:
    """Also where the quotient was rounded: 15 / 11 * 11 is a little less than 15."""
    for keys in range(1, 65):
        for values in range(1, 2 * keys + 1):
            assert GatedDeltaNetConfig(head_dim=keys, expand_v=values / keys).value_dim == values
