"""Token mixers that can be composed by a layer pattern: one mixer per file, operators in `ops`."""

if __name__ != "hybridvl.layers":
    raise ImportError(
        f"import this package as 'hybridvl.layers', not as {__name__!r}: "
        "the top-level folder is only where its files live"
    )

import importlib
import pkgutil

from hybridvl.layers.base import Mixer, MixerConfig, Sequence, State
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.registry import MIXERS, mixer_class, register

# Every module of the folder is imported, so that a mixer registers by being there.
for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MIXERS", "ConfigError", "Mixer", "MixerConfig", "Sequence", "State", "mixer_class", "register"]
