"""Running trained models: prefill, decode, generation token by token."""

from hybridvl.models.generation import GenerationStep, decode_step, generate, prefill
from hybridvl.models.sampling import Sampling

__all__ = ["GenerationStep", "Sampling", "decode_step", "generate", "prefill"]
