"""The mixer under check, the ways to run it, and how two runs are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from hybridvl.layers.base import Mixer, MixerConfig, Sequence, State
from hybridvl.layers.ops.rotary import rotary_table

Comparison = tuple[str, Tensor, Tensor]
"""What is compared, the value found, the value expected."""

Property = Callable[["Subject"], Iterator[Comparison]]


class Subject:
    """A mixer with perturbed weights and the inputs on which its properties are checked."""

    def __init__(self, config: MixerConfig, width: int, batch: int, tokens: int, seed: int, dtype: torch.dtype) -> None:
        self.config, self.width, self.batch, self.tokens, self.dtype = config, width, batch, tokens, dtype
        self.random = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mixer: Mixer = config.build(width).to(dtype)
        with torch.no_grad():
            for parameter in self.mixer.parameters():  # zeros and ones would hide faults
                parameter.add_(0.1 * self.noise(*parameter.shape).to(parameter.dtype))
        self.x = self.noise(batch, tokens, width)
        half = tokens // 2
        self.sizes = [half, 1, 3, tokens - half - 4]  # uneven: long, single, short
        self.even_sizes = [min(6, tokens - start) for start in range(0, tokens, 6)]

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """Rows (B, T, D) with padding on one side or scattered, and their mask (B, T); every row has another length.

        The padding holds large numbers, which show wherever they are used.
        """
        lengths = [self.tokens - 2 - 5 * row % (self.tokens - 4) for row in range(self.batch)]
        place = torch.arange(self.tokens)
        if side == "left":
            mask = torch.stack([place >= self.tokens - length for length in lengths])
        elif side == "right":
            mask = torch.stack([place < length for length in lengths])
        else:
            order = [torch.randperm(self.tokens, generator=self.random) for _ in lengths]
            mask = torch.stack([rank < length for rank, length in zip(order, lengths, strict=True)])
        return torch.where(mask[..., None], self.x, 100 * self.noise(*self.x.shape)), mask

    def state_bytes(self, context: int, dtype: torch.dtype | None = None) -> int:
        """What the configuration declares for one row."""
        return self.config.state_bytes(context, dtype or self.dtype, self.width)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def run(self, x: Tensor, state: State | None = None, start: int = 0) -> Tensor:
        """Unpadded x (B, T, D) whose first token stands at position `start`."""
        positions = torch.arange(start, start + x.shape[1]).expand(x.shape[0], -1)
        return self.mixer(x, Sequence(self.rotary(positions, x.dtype)), state)

    def run_chunks(self, x: Tensor, sizes: Collection[int], state: State) -> Tensor:
        """x in successive calls of the given sizes."""
        outputs, start = [], 0
        for size in sizes:
            outputs.append(self.run(x[:, start : start + size], state, start))
            start += size
        return torch.cat(outputs, dim=1)

    def run_padded(self, x: Tensor, mask: Tensor, state: State | None = None, past: Tensor | None = None) -> Tensor:
        """x (B, T, D) where mask (B, T) is True at real tokens; past (B,) tokens came before."""
        rank = mask.long().cumsum(1) - 1 + (0 if past is None else past[:, None])
        return self.mixer(x, Sequence(self.rotary(rank.clamp(min=0), x.dtype), mask), state)

    def run_packed(
        self, x: Tensor, lengths: list[int], state: State | None = None, past: list[int] | None = None
    ) -> Tensor:
        """x (1, T, D) of segments of the given lengths."""
        starts = past or [0] * len(lengths)
        pairs = zip(starts, lengths, strict=True)
        positions = torch.cat([torch.arange(start, start + length) for start, length in pairs])
        boundaries = torch.tensor([0, *lengths]).cumsum(0)
        return self.mixer(x, Sequence(self.rotary(positions[None], x.dtype), cu_seqlens=boundaries), state)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """The tables that the mixer asks for."""
        return {dim: rotary_table(positions, dim, dtype=dtype) for dim in self.config.rotary_dims}

    def gradients(self, forward: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Gradients of sum(forward(x) * weight) by parameter, and for x."""
        x = x.detach().clone().requires_grad_()
        named = {"x": x, **dict(self.mixer.named_parameters())}
        loss = (forward(x) * weight).sum()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(named.items(), found, strict=True)
        }

    def compare_gradients(
        self, what: str, found: dict[str, Tensor], expected: dict[str, Tensor]
    ) -> Iterator[Comparison]:
        """Gradients scaled to their own maximum, or to the largest of all where theirs is rounding noise beside it."""
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        floor = largest * (1e-4 if self.dtype == torch.float64 else 1.0)
        for name, gradient in expected.items():
            scale = max(gradient.abs().max().item(), floor) or 1.0
            yield f"gradient of {name}, {what}", _beside_one(found[name] / scale), _beside_one(gradient / scale)


def _beside_one(x: Tensor) -> Tensor:
    """x with a 1 beside it, so that errors count relative to 1."""
    return torch.cat((x.flatten(), x.new_ones(1)))


def compare_states(
    what: str, found: State, expected: State, rows: tuple[int, int] | None = None
) -> Iterator[Comparison]:
    """All tensors of two states, or of row `rows[0]` of one and `rows[1]` of the other; free slots hold zeros."""
    others = expected.tensors()
    for name, own in found.tensors().items():
        other = others[name]
        if rows is not None:
            own, other = own[rows[0]], other[rows[1]]
        sizes = [max(sizes) for sizes in zip(own.shape, other.shape, strict=True)]
        yield f"state tensor {name}, {what}", _grown(own, sizes), _grown(other, sizes)


def _grown(x: Tensor, sizes: list[int]) -> Tensor:
    grown = x.new_zeros(sizes)
    grown[tuple(slice(size) for size in x.shape)] = x
    return grown.detach().double()
