"""Model folders: our own saved and loaded, other projects' checkpoints loaded."""

from hybridvl.checkpoints.folders import check_same_model, load, load_weights, read_config, save

__all__ = ["check_same_model", "load", "load_weights", "read_config", "save"]
