"""The short causal depthwise convolution in front of a recurrence, as a module with its carried inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvl.layers.base import Sequence
from hybridvl.layers.ops import causal_conv
from hybridvl.layers.ops.backend import usable_or_auto
from hybridvl.layers.rows import readable, token_counts


class ShortConv(nn.Module):
    """SiLU of a causal depthwise convolution over W tokens, with the parameters of an `nn.Conv1d`.

    weight: (D, 1, W). bias: (D,) or None. backend: of `causal_conv`; "auto" where that has none of this name, or one
    that cannot run there.
    """

    def __init__(self, channels: int, width: int, bias: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(W), the default of a depthwise `nn.Conv1d`."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def pass_through(self) -> None:
        """Weights that hand on the current token alone: y = silu(x)."""
        self.weight.zero_()
        self.weight[:, :, -1] = 1
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, sequence: Sequence, state: Tensor | None) -> Tensor:
        """Convolve aligned x (B, T, D), see `RowMixer`; state (B, D, W) holds the last W real inputs, oldest first."""
        initial = None if state is None else readable(state).to(x.dtype)
        y, final = causal_conv(
            x,
            self.weight.squeeze(1),
            self.bias,
            initial_state=initial,
            cu_seqlens=sequence.cu_seqlens,
            backend=usable_or_auto(
                "causal_conv", self.backend, x.device, x.dtype, torch.is_grad_enabled(), sequence.cu_seqlens is not None
            ),
        )
        if state is not None and initial is not None:
            if sequence.mask is not None:
                final = _last_real(torch.cat((initial.mT, x), dim=1), token_counts(x, sequence), state.shape[2])
            state.copy_(final)
        return y

    def empty_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        """Zeros (B, D, W); device and dtype default to the weight's."""
        device = self.weight.device if device is None else device
        return torch.zeros(
            batch, self.weight.shape[0], self.weight.shape[2], device=device, dtype=dtype or self.weight.dtype
        )

    def extra_repr(self) -> str:
        """The sizes, for print(module)."""
        return f"{self.weight.shape[0]}, width={self.weight.shape[2]}, bias={self.bias is not None}"


def _last_real(inputs: Tensor, counts: Tensor, width: int) -> Tensor:
    """The last W of the W + counts real inputs at the left of each row of (B, W + T, D), as (B, D, W)."""
    index = counts[:, None] + torch.arange(width, device=inputs.device)  # (B, W)
    return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[2])).mT
