"""Vision-language models: a decoder built from a layer pattern, and the Qwen2.5-VL vision tower."""

from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.sampling import Sampling
from hybridvl.models.vlm import ModelOutput, VisionLanguageModel

__all__ = [
    "ModelConfig",
    "ModelOutput",
    "ModelState",
    "Sampling",
    "VisionConfig",
    "VisionLanguageModel",
]
