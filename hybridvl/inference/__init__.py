"""Running trained models: prefill, decode, generation token by token."""

from hybridvl.models.generation import GenerationStep, Sampling, decode_step, generate, prefill

__all__ = ["GenerationStep", "Sampling", "decode_step", "generate", "prefill"]
