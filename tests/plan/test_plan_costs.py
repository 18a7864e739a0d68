"""Planned costs against built models: parameters on the meta device, counted FLOPs, allocated state."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.plan import Plan, plan_model

MIXERS = {
    "full": {"heads": 4, "kv_heads": 2, "head_dim": 16},
    "swa": {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 24},
    "gdn": {"heads": 2, "head_dim": 16},
    "mamba2": {"head_dim": 16, "state_dim": 8},
}
SMALL = ModelConfig(mixers=MIXERS, width=64, mlp_width=96, vocab_size=50)
VISION = VisionConfig(depth=2, width=32, heads=2, mlp_width=40, full_attention_blocks=(1,))
PATTERNS = ["full*2", "swa*2", "gdn*2", "mamba2*2", "swa+mamba2 gdn", "swa gdn*3 swa(window=8, kv_heads=4) full"]


def small(pattern: str, **changes: object) -> ModelConfig:
    return dataclasses.replace(SMALL, pattern=pattern, **changes)  # type: ignore[arg-type]


def test_the_published_sizes() -> None:
    config = ModelConfig(vision=VisionConfig())
    plan = plan_model(config, contexts=[8192])
    assert plan.total_params == 4_408_381_536
    assert plan.params == {
        "vision": 668_684_288,
        "embeddings": 311_164_928,
        "head": 0,
        "mixers": 9 * 9_439_744 + 27 * 33_653_024,
        "mlps": 36 * 67_633_152,
        "norms": 36 * 2 * 2048 + 2048,
    }
    assert [layer.params for layer in plan.layers] == [77_076_992, *[101_290_272] * 3] * 9
    assert {layer.mlp_params for layer in plan.layers} == {67_633_152}
    # Keys and values of 8,192 slots, recurrent state in float32, the convolutions' last 4 inputs; lengths of int64.
    window = 9 * (8192 * 2 * 2 * 128 * 2 + 8)
    assert plan.state_bytes(8192) == window + 56_623_104 + 1_769_472 + 2 * 8
    teacher = plan_model(dataclasses.replace(config, pattern="full*36"), contexts=[1024, 65536])
    assert teacher.total_params == 3_754_622_976
    assert teacher.state_bytes(65536) - teacher.state_bytes(1024) == 36_864 * (65536 - 1024)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "changes", [{}, {"mlp_width": 0}, {"tie_embeddings": False}, {"vision": VISION, "image_token_id": 1}], ids=str
)
def test_parameters_of_the_built_model(pattern: str, changes: dict[str, object]) -> None:
    if "vision" in changes:
        changes = {**changes, "video_token_id": 2}
    config = small(pattern, **changes)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    plan = plan_model(config, contexts=[16])
    assert plan.total_params == model.num_params
    assert plan.pattern == model.pattern
    blocks = list(model.decoder.layers)
    assert [layer.params for layer in plan.layers] == [sum(p.numel() for p in block.parameters()) for block in blocks]
    if model.visual is not None:
        assert plan.params["vision"] == sum(p.numel() for p in model.visual.parameters())


def counted_flops(model: VisionLanguageModel, tokens: int, context: int) -> int:
    """FLOPs of `tokens` that follow `context` others."""
    state = model.init_state(1) if context else None
    # The CPU's fused attention is not in the counter's table; the mathematical form has the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        if context:
            model(torch.zeros(1, context, dtype=torch.int64), state=state)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.int64), state=state)
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"mlp_width": 0, "tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flops_as_counted(pattern: str, changes: dict[str, object]) -> None:
    config = small(pattern, **changes)
    plan = plan_model(config, (16, 64, 130))
    model = VisionLanguageModel(config)
    for context in plan.contexts:
        assert plan.prefill_flops(context) * context == pytest.approx(counted_flops(model, context, 0), rel=1e-12)
        assert plan.decode_flops(context) == counted_flops(model, 1, context)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_as_allocated(pattern: str, dtype: torch.dtype) -> None:
    config = small(pattern)
    plan = plan_model(config, (16, 100), dtype)
    model = VisionLanguageModel(config).to(dtype)
    for context in plan.contexts:
        state = model.init_state(1)
        with torch.no_grad():
            model(torch.zeros(1, context, dtype=torch.int64), state=state)
        assert plan.state_bytes(context) == state.nbytes
        assert [layer.state_bytes[context] for layer in plan.layers] == [layer.nbytes for layer in state.layers]


def test_kinds_and_json() -> None:
    plan = plan_model(small("swa+mamba2 gdn*2"), (64, 16, 64))
    assert plan.contexts == (16, 64)
    assert plan.kinds() == {"swa+mamba2": [0], "gdn": [1, 2]}
    assert plan.layers[0].mixers == (("swa", "swa"), ("mamba2", "mamba2"))
    values = plan.to_dict()
    assert values["pattern"] == "swa+mamba2 gdn*2"
    assert values["dtype"] == "bfloat16"
    assert values["params"]["total"] == sum(size for part, size in values["params"].items() if part != "total")
    assert values["state_bytes"] == {"16": plan.state_bytes(16), "64": plan.state_bytes(64)}
    assert [layer["params"]["total"] for layer in values["layers"]] == [layer.params for layer in plan.layers]
    rest = sum(layer["flops_per_token"]["decode"]["64"] for layer in values["layers"])
    assert values["flops_per_token"]["decode"]["64"] == rest + 2 * 50 * 64


def mistakes(config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_model(config, path="net.mixers")
    return str(caught.value)


def test_mistakes() -> None:
    assert "column 1: unknown mixer 'gdm', did you mean 'gdn'" in mistakes(small("gdm*2"))
    assert mistakes(small("swa", mixers={"swa": {"window": 0}})).startswith("net.mixers.swa.window = 0: expected")
    assert "head_dim = 48" in mistakes(small("mamba2", mixers={"mamba2": {"head_dim": 48}}))
    assert "rope_sections: [4, 4, 4] add up to 12; expected" in mistakes(small("swa", rope_sections=(4, 4, 4)))
    with pytest.raises(ConfigError, match="context: 0; expected at least 1 token"):
        plan_model(SMALL, [0])


def test_thousands_of_layers_are_planned_at_once() -> None:
    plan: Plan = plan_model(small("(swa gdn*3)*1024"), [1024])
    assert len(plan.layers) == 4096
    assert len({id(layer) for layer in plan.layers}) == 2
