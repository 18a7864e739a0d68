"""Models in folders: what other parts of the package load, save and compare."""

from hybridvl.checkpoints.checkpoint import read_config
from hybridvl.checkpoints.comparison import check_same_model
from hybridvl.checkpoints.loading import load, load_weights
from hybridvl.checkpoints.saving import save

__all__ = ["check_same_model", "load", "load_weights", "read_config", "save"]
