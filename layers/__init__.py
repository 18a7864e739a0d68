"""Token mixers that can be composed by a layer pattern: one mixer per file, operators in `ops`."""

if __name__ != "hybridvl.layers":
    raise ImportError(
        f"import this package as 'hybridvl.layers', not as {__name__!r}: "
        "the top-level folder is only where its files live"
    )

from hybridvl.layers.base import Mixer, MixerConfig, Sequence, State
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.registry import MIXERS, mixer_class, register

__all__ = ["MIXERS", "ConfigError", "Mixer", "MixerConfig", "Sequence", "State", "mixer_class", "register"]
