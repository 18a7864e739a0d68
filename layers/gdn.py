"""Gated DeltaNet: a matrix state per head that decays and is corrected along each key (arXiv 2412.06464)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvl.layers.base import MixerConfig, Sequence, State
from hybridvl.layers.decay import Float32Parameters, init_decay
from hybridvl.layers.norms import GatedRMSNorm, at_least_float32
from hybridvl.layers.ops import gated_delta_rule
from hybridvl.layers.ops.backend import backend_names, backend_or_auto
from hybridvl.layers.ops.gated_delta_rule import gated_delta_rule_flops
from hybridvl.layers.ops.gdn_step import gated_delta_net_step
from hybridvl.layers.pieces import Piece, head_piece, key_value_heads, qkvo_rule, source_heads
from hybridvl.layers.registry import register
from hybridvl.layers.rows import RowMixer, is_step, readable, zero_padding
from hybridvl.layers.short_conv import ShortConv
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.layers.validate import check_types, check_width, expect, expect_at_least, expect_positive


@register("gdn")
@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(MixerConfig):
    """Options of Gated DeltaNet; the defaults are InfiniteVL-4B's.

    Attributes:
        heads: query and key heads.
        value_heads: value heads H, a multiple of heads: H / heads consecutive ones share a query and key; None = heads.
        head_dim: key dim per head K.
        expand_v: value dim per head V over K.
        conv_width: tokens W that the short convolutions see.
        gate: gate the normed output by silu of a projection of the input.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that the state can swing (arXiv 2411.12537).
        norm_eps: epsilon of the output norm.
        dt_min, dt_max: range of the initial step sizes: at first the state forgets exp(-dt) to exp(-16 dt) a token, and
            training is slow to unlearn that. dt_floor: their least value.
        backend: implementation of the gated delta rule, of the decode step and of the convolutions where they have it.
    """

    weightless = MixerConfig.weightless | {"negative_eigenvalues", "dt_min", "dt_max", "dt_floor"}

    heads: int = 16
    value_heads: int | None = None
    head_dim: int = 128
    expand_v: float = 2.0
    conv_width: int = 4
    gate: bool = True
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-5
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        expect_at_least(self, 1, "heads", "head_dim", "conv_width")
        expect_positive(self, "norm_eps", "expand_v", "dt_min", "dt_max", "dt_floor")
        expect(self, "dt_max", self.dt_max >= self.dt_min, f"at least dt_min = {self.dt_min}")
        shared = self.value_heads is None or (self.value_heads > 0 and self.value_heads % self.heads == 0)
        expect(self, "value_heads", shared, f"a multiple of heads = {self.heads}, or null")
        # 15 / 11 * 11 is not 15 when the quotient has been rounded.
        whole = self.value_dim >= 1 and math.isclose(self.head_dim * self.expand_v, self.value_dim, rel_tol=1e-12)
        expect(self, "expand_v", whole, f"a number that gives whole value dims with head_dim = {self.head_dim}")
        names = backend_names("gated_delta_rule", "gated_delta_net_step")
        expect(self, "backend", self.backend in names, f"one of {', '.join(names)}")

    def weight_options(self) -> dict[str, object]:
        """See `MixerConfig.weight_options`; null value_heads stand for heads."""
        return {**super().weight_options(), "value_heads": self.value_head_count}

    @property
    def value_head_count(self) -> int:
        """H."""
        return self.value_heads or self.heads

    @property
    def value_dim(self) -> int:
        """V, per head."""
        return round(self.head_dim * self.expand_v)

    @property
    def key_width(self) -> int:
        """Width of all queries, and of all keys."""
        return self.heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Width of all values."""
        return self.value_head_count * self.value_dim

    def build(self, width: int) -> GatedDeltaNet:
        """The module for model width D."""
        return GatedDeltaNet(self, width)

    def num_params(self, width: int) -> int:
        """Exact number of parameters."""
        heads = self.value_head_count
        convs = (2 * self.key_width + self.value_width) * self.conv_width
        return width * self._projected() + convs + 2 * heads + self.value_dim

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """See `MixerConfig.flops`; the same for every context."""
        rule = gated_delta_rule_flops(1, tokens, self.value_head_count, self.head_dim, self.value_dim)
        return 2 * tokens * width * self._projected() + rule

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """See `MixerConfig.state_bytes`; the same for every context."""
        recurrent = self.value_head_count * self.head_dim * self.value_dim * at_least_float32(dtype).itemsize
        return recurrent + (2 * self.key_width + self.value_width) * self.conv_width * dtype.itemsize

    def _projected(self) -> int:
        """Columns of all projections: q, k, v, output and gate, a and b."""
        return 2 * self.key_width + (2 + self.gate) * self.value_width + 2 * self.value_head_count


@dataclass
class GatedDeltaNetState(State):
    """recurrent (B, H, K, V) in float32 or wider; the last W inputs of each convolution (B, channels, W)."""

    recurrent: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor


class GatedDeltaNet(Float32Parameters, RowMixer):
    """Gated DeltaNet as InfiniteVL uses it, optionally with grouped value heads and negative eigenvalues.

    q, k, v = silu(conv(proj x)); q, k of unit length per head; g = -exp(A_log) softplus(a_proj x + dt_bias);
    beta = sigmoid(b_proj x); y = o_proj(rmsnorm(rule(q, k, v, g, beta)) * o_norm.weight * silu(g_proj x)).
    """

    def __init__(self, config: GatedDeltaNetConfig, width: int) -> None:
        super().__init__()
        check_width(config, width)
        self.config = config
        heads, keys, values = config.value_head_count, config.key_width, config.value_width
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.g_proj = nn.Linear(width, values, bias=False) if config.gate else None
        self.a_proj = nn.Linear(width, heads, bias=False)
        self.b_proj = nn.Linear(width, heads, bias=False)
        self.q_conv1d = ShortConv(keys, config.conv_width, backend=config.backend)
        self.k_conv1d = ShortConv(keys, config.conv_width, backend=config.backend)
        self.v_conv1d = ShortConv(values, config.conv_width, backend=config.backend)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.o_norm = GatedRMSNorm(config.value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of A_log and dt_bias."""
        config = self.config
        init_decay(self.A_log, self.dt_bias, dt_range=(config.dt_min, config.dt_max), dt_floor=config.dt_floor)

    def mix(self, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
        """See `RowMixer.mix`."""
        assert state is None or isinstance(state, GatedDeltaNetState)
        if state is not None and is_step(x, sequence):
            return self._step(x, state)
        k_heads, v_heads = (-1, self.config.head_dim), (-1, self.config.value_dim)
        q = self.q_conv1d(self.q_proj(x), sequence, state and state.conv_q).unflatten(-1, k_heads)  # (B, T, H, K)
        k = self.k_conv1d(self.k_proj(x), sequence, state and state.conv_k).unflatten(-1, k_heads)
        v = self.v_conv1d(self.v_proj(x), sequence, state and state.conv_v).unflatten(-1, v_heads)  # (B, T, H, V)
        g, beta = self._decay_and_rate(x)
        # A token with g = 0 and beta = 0 leaves the state as it is: so does padding.
        o, final = gated_delta_rule(
            q,
            k,
            v,
            zero_padding(g, sequence),
            zero_padding(beta, sequence),
            initial_state=None if state is None else readable(state.recurrent),
            qk_l2norm=True,
            cu_seqlens=sequence.cu_seqlens,
            backend=backend_or_auto("gated_delta_rule", self.config.backend),
        )
        if state is not None:
            state.recurrent.copy_(final)
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, v_heads)
        return self.o_proj(self.o_norm(o, gate).flatten(2))

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedDeltaNetState:
        """See `Mixer.init_state`."""
        conv_q, conv_k, conv_v = (
            conv.empty_state(batch, device, dtype) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        )
        shape = (batch, self.config.value_head_count, self.config.head_dim, self.config.value_dim)
        recurrent = torch.zeros(shape, device=conv_q.device, dtype=at_least_float32(conv_q.dtype))
        return GatedDeltaNetState(recurrent, conv_q, conv_k, conv_v)

    def _step(self, x: Tensor, state: GatedDeltaNetState) -> Tensor:
        """One token of every row, (B, 1, D)."""
        x = x.squeeze(1)
        y = gated_delta_net_step(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            None if self.g_proj is None else self.g_proj(x),
            self.a_proj(x),
            self.b_proj(x),
            state.recurrent,
            state.conv_q,
            state.conv_k,
            state.conv_v,
            self.q_conv1d.weight.squeeze(1),
            self.k_conv1d.weight.squeeze(1),
            self.v_conv1d.weight.squeeze(1),
            self.A_log,
            self.dt_bias,
            self.o_norm.weight,
            self.config.norm_eps,
            self.config.negative_eigenvalues,
            backend_or_auto("gated_delta_net_step", self.config.backend),
        )
        return self.o_proj(y).unsqueeze(1)

    def _decay_and_rate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g and beta, (B, T, H) each, in float32 or wider."""
        wide = at_least_float32(x.dtype)
        g = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        beta = self.b_proj(x).to(wide).sigmoid()
        return g, 2 * beta if self.config.negative_eigenvalues else beta


@qkvo_rule(GatedDeltaNetConfig)
def _gated_delta_net(config: GatedDeltaNetConfig, source: AttentionConfig, width: int) -> list[Piece]:
    """q <- q, k <- k, v <- v, o <- o; it has no biases. Its gate, decay, rate, convolutions and norm are new."""
    keys = source_heads(config, "heads", config.heads, source)
    values = source_heads(config, "value_heads", config.value_head_count, source)
    key_dims, value_dims = (config.head_dim, source.head_dim), (config.value_dim, source.head_dim)
    return [
        head_piece("q_proj.weight", "q_proj.weight", keys, key_dims),
        head_piece("k_proj.weight", "k_proj.weight", key_value_heads(keys, source), key_dims),
        head_piece("v_proj.weight", "v_proj.weight", key_value_heads(values, source), value_dims),
        head_piece("o_proj.weight", "o_proj.weight", values, value_dims, axis=1),
    ]
