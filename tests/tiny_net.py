"""The smallest model with every kind of layer and a vision tower, as recipes describe it; shared by several folders."""

from __future__ import annotations

from typing import Any

NET: dict[str, Any] = {
    "pattern": "(swa gdn)",
    "width": 32,
    "mlp_width": 64,
    "vocab_size": 1024,
    "image_token_id": 6,
    "video_token_id": 7,
    "vision_start_token_id": 3,
    "mixers": {
        "full": {"heads": 2, "kv_heads": 1, "head_dim": 16},
        "swa": {"heads": 2, "kv_heads": 1, "head_dim": 16, "window": 16},
        "gdn": {"heads": 2, "head_dim": 8},
        "mamba2": {"head_dim": 16, "state_dim": 16},
    },
    "vision": {
        "depth": 1,
        "width": 32,
        "heads": 2,
        "mlp_width": 32,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "window_size": 16,
        "full_attention_blocks": [0],
        "channels": 1,
    },
}
