"""Mamba2: a state-space layer with one scalar decay per head and token (arXiv 2405.21060)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvl.layers.base import MixerConfig, Sequence, State
from hybridvl.layers.decay import Float32Parameters, init_decay
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.norms import GatedRMSNorm, at_least_float32
from hybridvl.layers.ops import ssd
from hybridvl.layers.ops.backend import backend_names, backend_or_auto
from hybridvl.layers.ops.mamba2_step import mamba2_step
from hybridvl.layers.ops.ssd import ssd_flops
from hybridvl.layers.pieces import Piece, head_piece, key_value_heads, qkvo_rule, source_heads
from hybridvl.layers.registry import register
from hybridvl.layers.rows import RowMixer, is_step, readable, zero_padding
from hybridvl.layers.short_conv import ShortConv
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.layers.validate import check_types, check_width, expect, expect_at_least, expect_positive


@register("mamba2")
@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Options of Mamba2; the defaults are the paper's.

    Attributes:
        expand: inner width over model width.
        head_dim: dim per head P; the number of heads is inner width / P.
        state_dim: state dim N.
        groups: groups G of heads that share B and C, and of the output norm; a divisor of the number of heads.
        conv_width: tokens W that the short convolution sees.
        conv_bias: bias of the convolution.
        proj_bias: biases of the input and output projections.
        norm_eps: epsilon of the output norm.
        dt_min, dt_max: range of the initial step sizes; dt_floor: their least value.
        A_min, A_max: range of the initial decay rates.
        backend: implementation of the recurrence, of the decode step and of the convolution where they have it.
    """

    weightless = MixerConfig.weightless | {"dt_min", "dt_max", "dt_floor", "A_min", "A_max"}

    expand: int = 2
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    A_min: float = 1.0
    A_max: float = 16.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        expect_at_least(self, 1, "expand", "head_dim", "state_dim", "groups", "conv_width")
        expect_positive(self, "norm_eps", "dt_min", "dt_max", "dt_floor", "A_min", "A_max")
        expect(self, "dt_max", self.dt_max >= self.dt_min, f"at least dt_min = {self.dt_min}")
        expect(self, "A_max", self.A_max >= self.A_min, f"at least A_min = {self.A_min}")
        names = backend_names("ssd", "mamba2_step")
        expect(self, "backend", self.backend in names, f"one of {', '.join(names)}")

    def heads(self, width: int) -> int:
        """Number of heads H at model width D; ConfigError when inner width, heads and groups do not divide."""
        check_width(self, width)
        inner = self.expand * width
        if inner % self.head_dim:
            raise ConfigError(
                f"mamba2.head_dim = {self.head_dim}: expected a divisor of expand * width = {self.expand} * {width}"
            )
        heads = inner // self.head_dim
        expect(self, "groups", heads % self.groups == 0, f"a divisor of the {heads} heads (expand * width / head_dim)")
        return heads

    def conv_channels(self, width: int) -> int:
        """Channels of the convolution: x, B and C."""
        return self.expand * width + 2 * self.groups * self.state_dim

    def build(self, width: int) -> Mamba2:
        """The module for model width D; raises ConfigError when the heads do not divide."""
        return Mamba2(self, width)

    def num_params(self, width: int) -> int:
        """Exact number of parameters."""
        heads, inner = self.heads(width), self.expand * width
        biases = self.proj_bias * (self._projected(width) + width)
        conv = self.conv_channels(width) * (self.conv_width + self.conv_bias)
        return width * (self._projected(width) + inner) + biases + conv + 3 * heads + inner

    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """See `MixerConfig.flops`; the same for every context."""
        projections = 2 * tokens * width * (self._projected(width) + self.expand * width)
        return projections + ssd_flops(1, tokens, self.heads(width), self.head_dim, self.state_dim)

    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """See `MixerConfig.state_bytes`; the same for every context, and needs the width."""
        if width is None:
            raise ConfigError("mamba2: the bytes of its state depend on the width, which was not given")
        recurrent = self.heads(width) * self.head_dim * self.state_dim * at_least_float32(dtype).itemsize
        return recurrent + self.conv_channels(width) * self.conv_width * dtype.itemsize

    def _projected(self, width: int) -> int:
        """Rows of in_proj: z, x, B, C and dt."""
        return self.expand * width + self.conv_channels(width) + self.heads(width)


@dataclass
class Mamba2State(State):
    """recurrent (B, H, P, N) in float32 or wider; conv (B, channels, W), the last W inputs of the convolution."""

    recurrent: Tensor
    conv: Tensor


class Mamba2(Float32Parameters, RowMixer):
    """Mamba2 with groups, D skip and gated norm.

    z, xBC, dt = in_proj x; x, B, C = silu(conv(xBC)); S = e^(dt A) S + dt x B^T with dt = softplus(dt + dt_bias) and
    A = -exp(A_log); y = out_proj(groupnorm((S C + D x) * silu(z)) * norm.weight).
    """

    def __init__(self, config: Mamba2Config, width: int) -> None:
        super().__init__()
        self.config = config
        heads, inner, channels = config.heads(width), config.expand * width, config.conv_channels(width)
        self.sizes = (inner, channels, heads)
        self.in_proj = nn.Linear(width, inner + channels + heads, bias=config.proj_bias)
        self.conv1d = ShortConv(channels, config.conv_width, bias=config.conv_bias, backend=config.backend)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, config.norm_eps, config.groups, gate_first=True)
        self.out_proj = nn.Linear(inner, width, bias=config.proj_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of A_log, dt_bias and D."""
        config = self.config
        init_decay(
            self.A_log, self.dt_bias, (config.A_min, config.A_max), (config.dt_min, config.dt_max), config.dt_floor
        )
        nn.init.ones_(self.D)

    def mix(self, x: Tensor, sequence: Sequence, state: State | None) -> Tensor:
        """See `RowMixer.mix`."""
        assert state is None or isinstance(state, Mamba2State)
        config, inner = self.config, self.sizes[0]
        z, channels, dt = self.in_proj(x).split(self.sizes, dim=-1)
        if state is not None and is_step(x, sequence):
            return self.out_proj(self._step(z.squeeze(1), channels.squeeze(1), dt.squeeze(1), state).unsqueeze(1))
        channels = self.conv1d(channels, sequence, state and state.conv)
        values, b, c = channels.split((inner, *(2 * [config.groups * config.state_dim])), dim=-1)
        wide = at_least_float32(x.dtype)
        step = F.softplus(dt.to(wide) + self.dt_bias.to(wide))  # (B, T, H)
        y, final = ssd(
            values.unflatten(-1, (-1, config.head_dim)),
            zero_padding(step, sequence),  # a step of 0 leaves the state as it is: so does padding
            -self.A_log.to(wide).exp(),
            b.unflatten(-1, (config.groups, -1)),
            c.unflatten(-1, (config.groups, -1)),
            D=self.D.to(wide),
            initial_state=None if state is None else readable(state.recurrent),
            cu_seqlens=sequence.cu_seqlens,
            backend=backend_or_auto("ssd", config.backend),
        )
        if state is not None:
            state.recurrent.copy_(final)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _step(self, z: Tensor, channels: Tensor, dt: Tensor, state: Mamba2State) -> Tensor:
        """One token of every row, from its projections (B, ...) to the input of out_proj."""
        return mamba2_step(
            z,
            channels,
            dt,
            state.recurrent,
            state.conv,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.A_log,
            self.dt_bias,
            self.D,
            self.norm.weight,
            self.config.norm_eps,
            self.config.groups,
            backend_or_auto("mamba2_step", self.config.backend),
        )

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """See `Mixer.init_state`."""
        conv = self.conv1d.empty_state(batch, device, dtype)
        shape = (batch, self.sizes[2], self.config.head_dim, self.config.state_dim)
        return Mamba2State(torch.zeros(shape, device=conv.device, dtype=at_least_float32(conv.dtype)), conv)


@qkvo_rule(Mamba2Config)
def _mamba2(config: Mamba2Config, source: AttentionConfig, width: int) -> list[Piece]:
    """C <- q, B <- k, x <- v, out_proj <- o (arXiv 2408.15237); a group takes what the first of its heads would."""
    count, inner = config.heads(width), config.expand * width
    values = source_heads(config, "head_dim", count, source)
    grouped = values[:: count // config.groups]
    value_dims, state_dims = (config.head_dim, source.head_dim), (config.state_dim, source.head_dim)
    after_x = 2 * inner  # rows of in_proj: z, x, B, C, dt
    parts = (
        ("v_proj", key_value_heads(values, source), value_dims, inner),
        ("k_proj", key_value_heads(grouped, source), state_dims, after_x),
        ("q_proj", grouped, state_dims, after_x + config.groups * config.state_dim),
    )
    pieces = [head_piece("out_proj.weight", "o_proj.weight", values, value_dims, axis=1)]
    for kind in ("weight", *(["bias"] if config.proj_bias and source.qkv_bias else [])):
        for name, heads, dims, start in parts:
            pieces.append(head_piece(f"in_proj.{kind}", f"{name}.{kind}", heads, dims, start=start))
    if config.proj_bias and source.out_bias:
        pieces.append(Piece("out_proj.bias", "o_proj.bias", range(width), range(width)))
    return pieces
