"""The configuration of a hybridvl model as transformers wants it: the keys of our config.json as attributes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from hybridvl.checkpoints.formats.native import FORMAT_VERSION
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern


class HybridVLConfig(PreTrainedConfig):
    """Takes the fields of `ModelConfig` as keywords, `vision` as a dict; those left out have `ModelConfig`'s defaults.

    They are checked when the model is built (`model_config`): a mistake is a ConfigError that names the field.
    """

    model_type = "hybridvl"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "intermediate_size": "mlp_width",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    use_cache: ClassVar[bool] = True  # asked for, and set, by scripts that tune models; `generate` keeps a state anyway
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> HybridVLConfig:
        """The same configuration for transformers."""
        return cls(**config.to_dict())

    def model_config(self) -> ModelConfig:
        """The configuration of the model; ConfigError for values that it does not accept."""
        given = {name: vars(self)[name] for name in _defaults() if name in vars(self)}
        return ModelConfig.from_dict(given, "config")

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the pattern."""
        return len(parse_pattern(self.pattern, self.mixers))

    def __getattr__(self, name: str) -> Any:
        # Reached for what was not given: transformers' base class keeps only the keywords that it got.
        defaults = _defaults()
        if name not in defaults:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return defaults[name]


def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(ModelConfig)
    }
