"""Operators of the token mixers: pure functions of tensors, each with a reference and faster backends."""

from hybridvl.layers.ops.attention import attention
from hybridvl.layers.ops.causal_conv import causal_conv
from hybridvl.layers.ops.gated_delta_rule import gated_delta_rule
from hybridvl.layers.ops.ssd import ssd

__all__ = ["attention", "causal_conv", "gated_delta_rule", "ssd"]
