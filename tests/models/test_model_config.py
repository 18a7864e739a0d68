"""Model and vision configurations: round trip, and messages for values that cannot be."""

from __future__ import annotations

import json

import pytest

from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig


def test_round_trip_through_json() -> None:
    config = ModelConfig(
        pattern="(swa gdn*3)*2",
        mixers={"swa": {"window": 16}},
        rope_sections=(2, 3, 3),
        vision=VisionConfig(depth=2, full_attention_blocks=(1,)),
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_dict({}) == ModelConfig()


def test_derived_sizes() -> None:
    vision = VisionConfig()
    assert (vision.head_dim, vision.merged_patch_size, vision.patch_dim) == (80, 28, 1176)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width: 0; expected a whole number of at least 1"),
        ({"mlp_width": -1}, "mlp_width: -1; expected a whole number of at least 0"),
        ({"vocab_size": 3.5}, "vocab_size: 3.5; expected a whole number"),
        ({"vocab_size": True}, "vocab_size: True; expected a whole number"),
        ({"norm_eps": 0}, "norm_eps: 0; expected a finite number above 0"),
        ({"norm_eps": float("inf")}, "norm_eps: inf; expected a finite number above 0"),
        ({"mixers": ["swa"]}, r"mixers: \['swa'\]; expected a mapping"),
        ({"video_convention": "v1"}, r"video_convention: 'v1'; expected one of \('v457', 'v523'\)"),
        ({"rope_sections": [1, 2]}, r"rope_sections: \[1, 2\]; expected three numbers"),
        ({"rope_sections": [1, 2, -3]}, "rope_sections: -3; expected a whole number of at least 0"),
        ({"windw": 1}, "place: unknown key 'windw'; known are activation_checkpointing"),
        ({"vision": {"depht": 1}}, "place: vision: unknown key 'depht'"),
        ({"vision": {}, "vocab_size": 100}, "image_token_id: 151655; expected a token below vocab_size 100"),
        ({"vision": {}, "image_token_id": 7, "video_token_id": 7}, "both 7; expected two tokens"),
        (
            {"vision": {"depth": 4}},
            r"vision.full_attention_blocks: \[7, 15, 23, 31\]; expected block numbers from 0 to 3",
        ),
        ({"vision": {"heads": 7}}, "vision.heads: 7 heads for width 1280; width / heads must be a multiple of 4"),
        ({"vision": {"window_size": 100}}, "vision.window_size: 100; expected a multiple of .* = 28"),
        ({"vision": {"patch_size": 0}}, "vision.patch_size: 0; expected a whole number of at least 1"),
    ],
)
def test_mistakes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values, "place")
