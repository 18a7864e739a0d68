"""Model folders: our own saved and loaded, other projects' checkpoints opened and loaded."""

from hybridvl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hybridvl.checkpoints.folders import check_same_model, load, load_weights, read_config, save

__all__ = ["Checkpoint", "check_same_model", "load", "load_weights", "open_checkpoint", "read_config", "save"]
