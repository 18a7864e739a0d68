"""The public conformance suite of token mixers, in the spirit of `torch.autograd.gradcheck`."""

from hybridvl.testing.check import PROPERTIES, MixerCheckError, check_mixer

__all__ = ["PROPERTIES", "MixerCheckError", "check_mixer"]
