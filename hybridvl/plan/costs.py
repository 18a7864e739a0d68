"""Costs of a model by its configuration: exact parameters and state bytes, matrix-product FLOPs per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.models.block import SwiGLU
from hybridvl.models.config import ModelConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.vision import VisionTower
from hybridvl.models.vlm import sections_by_dim
from hybridvl.pattern import parse_pattern
from hybridvl.pattern.syntax import LayerSpec

CONTEXTS = (1024, 8192, 65536)


@dataclass(frozen=True)
class LayerCost:
    """What one layer of the decoder costs.

    Attributes:
        text: the layer as the pattern writes it.
        mixers: its mixers, several where they stand side by side, each as written and by registered name.
        mixer_params, mlp_params, norm_params: parameters; a parallel layer's inner norms belong to its mixer.
        prefill_flops: by number of tokens C, forward FLOPs of one pass over C tokens, divided by C.
        decode_flops: by number of tokens C, forward FLOPs of one more token after C.
        state_bytes: by number of tokens C, bytes of the state of one row after C tokens.
    """

    text: str
    mixers: tuple[tuple[str, str], ...]
    mixer_params: int
    mlp_params: int
    norm_params: int
    prefill_flops: dict[int, float]
    decode_flops: dict[int, int]
    state_bytes: dict[int, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Registered names of its mixers."""
        return tuple(kind for _, kind in self.mixers)

    @property
    def params(self) -> int:
        """All parameters of the layer."""
        return self.mixer_params + self.mlp_params + self.norm_params


@dataclass(frozen=True)
class Plan:
    """What a model costs.

    Attributes:
        pattern: in canonical form.
        dtype: of the model, which its state has too, recurrent parts aside.
        contexts: numbers of tokens C for which FLOPs and state are given.
        layers: the decoder's layers.
        params: by part: vision, embeddings, head (0 when tied), mixers, mlps, norms.
        head_flops: of the output head, per token.
        counter_bytes: what the state keeps beside the layers' states.
    """

    pattern: str
    dtype: str
    contexts: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    params: dict[str, int]
    head_flops: int
    counter_bytes: int

    @property
    def total_params(self) -> int:
        """All parameters; tied embeddings count once."""
        return sum(self.params.values())

    def prefill_flops(self, context: int) -> float:
        """Mean forward FLOPs per token of the decoder and its head in one pass over `context` tokens."""
        return sum(layer.prefill_flops[context] for layer in self.layers) + self.head_flops

    def decode_flops(self, context: int) -> int:
        """Forward FLOPs of the decoder and its head for one more token after `context` tokens."""
        return sum(layer.decode_flops[context] for layer in self.layers) + self.head_flops

    def state_bytes(self, context: int) -> int:
        """Bytes of the state of one row after `context` tokens."""
        return sum(layer.state_bytes[context] for layer in self.layers) + self.counter_bytes

    def kinds(self) -> dict[str, list[int]]:
        """Indices of the layers by how the pattern writes them, in order of appearance."""
        found: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            found.setdefault(layer.text, []).append(index)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the keys of FLOPs and bytes are numbers of tokens."""
        return {
            "pattern": self.pattern,
            "dtype": self.dtype,
            "params": {**self.params, "total": self.total_params},
            "flops_per_token": {
                "prefill": {str(context): round(self.prefill_flops(context)) for context in self.contexts},
                "decode": {str(context): self.decode_flops(context) for context in self.contexts},
            },
            "state_bytes": {str(context): self.state_bytes(context) for context in self.contexts},
            "layers": [_layer_dict(index, layer) for index, layer in enumerate(self.layers)],
        }


def plan_model(
    config: ModelConfig,
    contexts: Sequence[int] = CONTEXTS,
    dtype: torch.dtype = torch.bfloat16,
    path: str = "mixers",
) -> Plan:
    """Costs of the model of a configuration, without building its decoder.

    Args:
        config: the model.
        contexts: numbers of tokens, at least 1; the plan has them in order.
        dtype: of the model.
        path: where `config.mixers` stands in the user's file, for messages.

    Raises:
        ConfigError: a mistake in the pattern, its options, or how they fit the model's width.
    """
    for context in contexts:
        if context < 1:
            raise ConfigError(f"context: {context}; expected at least 1 token")
    contexts = tuple(sorted(set(contexts)))
    pattern = parse_pattern(config.pattern, config.mixers)
    mlp_params = _meta_params(SwiGLU, config.width, config.mlp_width) if config.mlp_width else 0
    mixers = pattern.configs(config.mixers, path)
    sections_by_dim(mixers, config)  # refuses head sizes that a built model would refuse
    made: dict[str, LayerCost] = {}
    for spec, mixer in zip(pattern.specs, mixers, strict=True):
        if spec.text not in made:
            made[spec.text] = _layer_cost(spec, mixer, config, mlp_params, contexts, dtype)
    layers = tuple(made[text] for text in pattern.layers)
    embeddings = config.vocab_size * config.width
    return Plan(
        pattern=str(pattern),
        dtype=str(dtype).removeprefix("torch."),
        contexts=contexts,
        layers=layers,
        params={
            "vision": _meta_params(VisionTower, config.vision, config.width) if config.vision else 0,
            "embeddings": embeddings,
            "head": 0 if config.tie_embeddings else embeddings,
            "mixers": sum(layer.mixer_params for layer in layers),
            "mlps": sum(layer.mlp_params for layer in layers),
            "norms": sum(layer.norm_params for layer in layers) + config.width,
        },
        head_flops=2 * embeddings,
        counter_bytes=_counter_bytes(),
    )


def _layer_cost(
    spec: LayerSpec,
    mixer: MixerConfig,
    config: ModelConfig,
    mlp_params: int,
    contexts: tuple[int, ...],
    dtype: torch.dtype,
) -> LayerCost:
    width = config.width
    branches = mixer.branches if isinstance(mixer, ParallelConfig) else (mixer,)
    mlp_flops = 2 * mlp_params  # a SwiGLU without biases: every weight is one multiply-add per token
    return LayerCost(
        text=spec.text,
        mixers=tuple((str(part), branch.name) for part, branch in zip(spec.mixers, branches, strict=True)),
        mixer_params=mixer.num_params(width),
        mlp_params=mlp_params,
        norm_params=2 * width if config.mlp_width else width,
        prefill_flops={context: mixer.flops(width, context) / context + mlp_flops for context in contexts},
        decode_flops={context: mixer.flops(width, 1, context) + mlp_flops for context in contexts},
        state_bytes={context: mixer.state_bytes(context, dtype, width) for context in contexts},
    )


@lru_cache(maxsize=256)
def _meta_params(build: type[nn.Module], *arguments: object) -> int:
    """Parameters of a module, built without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(*arguments).parameters())


def _counter_bytes() -> int:
    counter = torch.zeros(1, dtype=torch.int64)
    return ModelState([], counter, counter).nbytes


def _layer_dict(index: int, layer: LayerCost) -> dict[str, Any]:
    return {
        "layer": index,
        "mixer": layer.text,
        "kinds": list(layer.kinds),
        "params": {
            "mixer": layer.mixer_params,
            "mlp": layer.mlp_params,
            "norms": layer.norm_params,
            "total": layer.params,
        },
        "flops_per_token": {
            "prefill": {str(context): round(flops) for context, flops in layer.prefill_flops.items()},
            "decode": {str(context): flops for context, flops in layer.decode_flops.items()},
        },
        "state_bytes": {str(context): size for context, size in layer.state_bytes.items()},
    }
