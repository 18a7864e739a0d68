"""Our weights in Qwen3-Next's terms, and a whole model of transformers' with the same logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvl.bench.plain import modeling
from hybridvl.layers.base import Mixer, Sequence, State
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.layers.gdn import GatedDeltaNet, GatedDeltaNetConfig
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class GatedAttentionConfig(FullAttentionConfig):
    """Full attention with Qwen3-Next's output gate; options as in `AttentionConfig`, with its defaults."""

    qkv_bias: bool = False
    qk_norm: bool = True

    def build(self, width: int) -> GatedAttention:  # type: ignore[override]
        """The module for model width D."""
        return GatedAttention(self, width)

    def num_params(self, width: int) -> int:
        """Exact number of parameters."""
        return super().num_params(width) + width * self.heads * self.head_dim

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """See `MixerConfig.flops`."""
        return super().flops(width, tokens, context) + 2 * tokens * width * self.heads * self.head_dim


class GatedAttention(Mixer):
    """o_proj(attention(x) * sigmoid(gate_proj x)): our own attention with the gate before its last projection."""

    def __init__(self, config: GatedAttentionConfig, width: int) -> None:
        super().__init__()
        self.attention = FullAttentionConfig.build(config, width)
        self.o_proj = self.attention.o_proj
        self.attention.o_proj = nn.Identity()  # type: ignore[assignment]
        self.gate_proj = nn.Linear(width, config.heads * config.head_dim, bias=False)

    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """See `Mixer.forward`."""
        y: Tensor = self.o_proj(self.attention(x, sequence, state) * F.sigmoid(self.gate_proj(x)))
        return y

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """See `Mixer.init_state`."""
        return self.attention.init_state(batch, device, dtype)


def gated(config: ModelConfig) -> ModelConfig:
    """The same model with Qwen3-Next's attention in place of `full`, and one epsilon for all norms, as it has."""
    mixers: dict[str, dict[str, Any]] = {name: dict(options) for name, options in config.mixers.items()}
    full = {"type": f"{__name__}.{GatedAttentionConfig.__name__}", **mixers.get("full", {})}
    mixers["full"] = {**full, "norm_eps": config.norm_eps, "qkv_bias": False, "qk_norm": True}
    mixers["gdn"] = {**mixers.get("gdn", {}), "norm_eps": config.norm_eps}
    return dataclasses.replace(config, mixers=mixers)


def qwen3_next_peer(model: VisionLanguageModel) -> nn.Module:
    """transformers' Qwen3-Next with the model's sizes and weights, a plain SwiGLU in every layer.

    Raises ConfigError where the model has what Qwen3-Next has not.
    """
    module = modeling("qwen3_next")
    config = module.Qwen3NextConfig(**_values(model))
    config._attn_implementation = "sdpa"
    peer: nn.Module = module.Qwen3NextForCausalLM(config)
    missing, unexpected = peer.load_state_dict(peer_weights(model, dict(model.named_parameters())), strict=False)
    left = [name for name in missing if name != "lm_head.weight" or not model.config.tie_embeddings]
    if left or unexpected:
        raise ConfigError(f"peer qwen3-next: weights do not fit the installed transformers: {left}, {unexpected}")
    return peer.to(model.lm_head_weight.device, model.lm_head_weight.dtype)


@torch.no_grad()
def start_as_qwen3_next(model: VisionLanguageModel) -> None:
    """Give Gated DeltaNet layers Qwen3-Next's initial decays: A uniform from 0.01 to 16, step sizes about 1.3."""
    for layer in model.modules():
        if isinstance(layer, GatedDeltaNet):
            layer.A_log.uniform_(0.01, 16).log_()
            layer.dt_bias.fill_(1.0)


def peer_weights(model: VisionLanguageModel, ours: Weights, gradients: bool = False) -> dict[str, Tensor]:
    """Tensors by our parameters' names in Qwen3-Next's terms; their norms hold what is added to 1.

    gradients: the tensors are gradients, in which that 1 does not show.
    """
    centre = 0.0 if gradients else 1.0
    found = {"model.embed_tokens.weight": ours["decoder.embed_tokens.weight"]}
    found["model.norm.weight"] = ours["decoder.norm.weight"] - centre
    if not model.config.tie_embeddings:
        found["lm_head.weight"] = ours["lm_head.weight"]
    for index, mixer in enumerate(model.mixer_configs):
        here, there = f"decoder.layers.{index}.", f"model.layers.{index}."
        layer = {name.removeprefix(here): value for name, value in ours.items() if name.startswith(here)}
        own = {name.removeprefix("mixer."): value for name, value in layer.items() if name.startswith("mixer.")}
        if isinstance(mixer, GatedDeltaNetConfig):
            mixed = {f"linear_attn.{name}": value for name, value in delta_net_weights(own, mixer.heads).items()}
        else:
            assert isinstance(mixer, GatedAttentionConfig)
            mixed = {f"self_attn.{name}": value for name, value in _attention_weights(own, mixer, centre).items()}
        mixed |= {name: value for name, value in layer.items() if name.startswith("mlp.")}
        mixed["input_layernorm.weight"] = layer["mixer_norm.weight"] - centre
        mixed["post_attention_layernorm.weight"] = layer["mlp_norm.weight"] - centre
        found |= {there + name: value.detach() for name, value in mixed.items()}
    return found


def delta_net_weights(ours: Weights, heads: int) -> dict[str, Tensor]:
    """A Gated DeltaNet layer's weights, with their projections of each key head side by side."""
    qkvz = [ours[f"{name}_proj.weight"].unflatten(0, (heads, -1)) for name in "qkvg"]
    ba = [ours[f"{name}_proj.weight"].unflatten(0, (heads, -1)) for name in "ba"]
    return {
        "in_proj_qkvz.weight": torch.cat(qkvz, dim=1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(ba, dim=1).flatten(0, 1),
        "conv1d.weight": torch.cat([ours[f"{name}_conv1d.weight"] for name in "qkv"]),
        "A_log": ours["A_log"],
        "dt_bias": ours["dt_bias"],
        "norm.weight": ours["o_norm.weight"],
        "out_proj.weight": ours["o_proj.weight"],
    }


def _attention_weights(ours: Weights, mixer: GatedAttentionConfig, centre: float) -> dict[str, Tensor]:
    halves = [ours["attention.q_proj.weight"], ours["gate_proj.weight"]]
    fused = torch.cat([half.unflatten(0, (mixer.heads, -1)) for half in halves], dim=1).flatten(0, 1)
    return {
        "q_proj.weight": fused,
        "k_proj.weight": ours["attention.k_proj.weight"],
        "v_proj.weight": ours["attention.v_proj.weight"],
        "o_proj.weight": ours["o_proj.weight"],
        "q_norm.weight": ours["attention.q_norm.weight"] - centre,
        "k_norm.weight": ours["attention.k_norm.weight"] - centre,
    }


def _values(model: VisionLanguageModel) -> dict[str, Any]:
    config, kinds = model.config, model.mixer_configs
    attention = [mixer for mixer in kinds if isinstance(mixer, GatedAttentionConfig)]
    linear = [mixer for mixer in kinds if isinstance(mixer, GatedDeltaNetConfig)]
    place = f"peer qwen3-next: {model.pattern}"
    if len(attention) + len(linear) < len(kinds):
        raise ConfigError(f"{place}: expected layers of full and gdn alone; use --peer none or a pattern as the peer")
    if len(set(attention)) > 1 or len(set(linear)) > 1:
        raise ConfigError(f"{place}: expected the same options in all full, and in all gdn layers")
    if config.mlp_width == 0 or config.vision is not None:
        raise ConfigError(f"{place}: expected a text model with an MLP in every layer")
    full, delta = attention[0] if attention else GatedAttentionConfig(), linear[0] if linear else GatedDeltaNetConfig()
    if delta.negative_eigenvalues or not delta.gate or full.out_bias or not full.rope:
        raise ConfigError(f"{place}: expected gdn with its gate, without negative_eigenvalues, and full with rope")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": len(kinds),
        "layer_types": ["full_attention" if mixer in attention else "linear_attention" for mixer in kinds],
        **{"num_attention_heads": full.heads, "num_key_value_heads": full.kv_heads, "head_dim": full.head_dim},
        **{"linear_num_key_heads": delta.heads, "linear_num_value_heads": delta.value_head_count},
        **{"linear_key_head_dim": delta.head_dim, "linear_value_head_dim": delta.value_dim},
        "linear_conv_kernel_dim": delta.conv_width,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **{"num_experts": 0, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }
