"""Our own folders: config.json holds ModelConfig's fields, the tensors have our names."""

from __future__ import annotations

from typing import Any

from hybridvl.checkpoints.formats.base import Format, Names
from hybridvl.checkpoints.formats.values import Values, flag
from hybridvl.layers import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern

FORMAT_VERSION = 1
# What transformers keeps in config.json about loading and running a model of ours (see hybridvl.hf), not about what it
# is.
_TRANSFORMERS_KEYS = {
    *("architectures", "model_type", "dtype", "transformers_version", "use_cache", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def _read_config(values: Values, tied: bool) -> ModelConfig:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"format_version {version!r}; expected {FORMAT_VERSION}")
    own = {key: value for key, value in values.items() if key not in {"format_version", *_TRANSFORMERS_KEYS}}
    return ModelConfig.from_dict(own)


def _write_config(config: ModelConfig) -> dict[str, Any]:
    pattern = str(parse_pattern(config.pattern, config.mixers))
    loaded_by = {"model_type": "hybridvl", "architectures": ["HybridVLForConditionalGeneration"]}
    return {"format_version": FORMAT_VERSION, **loaded_by, **config.to_dict(), "pattern": pattern}


HYBRIDVL = Format(
    name="hybridvl",
    model_types=("hybridvl",),
    spellings=(Names(("visual.", "visual."), ("decoder.", "decoder."), ("lm_head.", "lm_head.")),),
    read_config=_read_config,
    write_config=_write_config,
    read_tied=lambda values: flag(values, "tie_embeddings", True),
    dtype_key="dtype",
)
