"""The checkpoint formats: how configurations and tensor names are spelled in each, and which folder is of which."""

from hybridvl.checkpoints.formats.base import Format, Piece
from hybridvl.checkpoints.formats.infinitevl import INFINITEVL
from hybridvl.checkpoints.formats.mamba2 import MAMBA2
from hybridvl.checkpoints.formats.native import HYBRIDVL
from hybridvl.checkpoints.formats.olmo_hybrid import OLMO_HYBRID
from hybridvl.checkpoints.formats.qwen2_5_vl import QWEN2_5_VL
from hybridvl.checkpoints.formats.qwen3_next import QWEN3_NEXT
from hybridvl.checkpoints.formats.values import Values
from hybridvl.layers import ConfigError

__all__ = ["FORMATS", "Format", "Piece", "Values", "find_format"]

FORMATS = {entry.name: entry for entry in (HYBRIDVL, QWEN2_5_VL, INFINITEVL, MAMBA2, QWEN3_NEXT, OLMO_HYBRID)}


def find_format(values: Values, place: str) -> Format:
    """The format of a folder whose config.json holds `values`; ConfigError names the model types that are known."""
    if "pattern" in values:
        return HYBRIDVL
    known = {kind: entry for entry in FORMATS.values() for kind in entry.model_types}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{place}: model_type {kind!r}; expected one of {', '.join(known)}")
    if values.get("quantization_config"):
        raise ConfigError(f"{place}: quantization_config is given; expected a checkpoint with plain weights")
    return known[kind]
