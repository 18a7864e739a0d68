"""Vision-language models: a decoder built from a layer pattern, the Qwen2.5-VL vision tower, checkpoints."""

from hybridvl.models.config import ModelConfig, VisionConfig

__all__ = ["ModelConfig", "VisionConfig"]
