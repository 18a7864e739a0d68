"""Model folders: our own and other projects' checkpoints opened, loaded and saved."""

from hybridvl.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_config
from hybridvl.checkpoints.comparison import check_same_model
from hybridvl.checkpoints.loading import load, load_weights
from hybridvl.checkpoints.saving import save

__all__ = ["Checkpoint", "check_same_model", "load", "load_weights", "open_checkpoint", "read_config", "save"]
