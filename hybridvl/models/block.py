"""One layer of the decoder: norm, token mixer, norm, SwiGLU, each around a residual connection."""

from __future__ import annotations

from torch import Tensor, nn

from hybridvl.layers import MixerConfig, Sequence, State
from hybridvl.layers.norms import RMSNorm
from hybridvl.layers.ops.swiglu import swiglu


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), x (..., D). Source: arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm layer around whatever mixer the configuration builds; mlp_width 0 leaves the SwiGLU out."""

    def __init__(self, mixer: MixerConfig, width: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer.build(width)
        self.mlp_norm = RMSNorm(width, norm_eps) if mlp_width else None
        self.mlp = SwiGLU(width, mlp_width) if mlp_width else None

    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D); the state, if given, is updated in place."""
        return self.finish(x, self.mix(x, sequence, state))

    def mix(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """The mixer's output (B, T, D), before it is added to x (B, T, D)."""
        return self.mixer(self.mixer_norm(x), sequence, state)

    def mix_alone(self, x: Tensor, sequence: Sequence) -> Tensor:
        """`mix`, for who wants nothing else of the layer: `forward` does not come by, so that it may be wrapped too."""
        return self.mix(x, sequence)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the mixer: `mixed` (B, T, D) added to x, then the SwiGLU."""
        x = x + mixed
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x))
