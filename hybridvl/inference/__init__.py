"""Running trained models: prompts, prefill, decode, generation token by token, replies as growing text."""

from hybridvl.inference.processor import Processor
from hybridvl.inference.replies import stream_replies
from hybridvl.models.generation import GenerationStep, decode_step, generate, prefill
from hybridvl.models.sampling import Sampling

__all__ = ["GenerationStep", "Processor", "Sampling", "decode_step", "generate", "prefill", "stream_replies"]
