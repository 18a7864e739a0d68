"""The contract of a token mixer: its configuration, its module, its state, and what the layers of a model share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

RotaryTable = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sequence:
    """What all layers of a forward pass share about the tokens of x (B, T, D).

    rotary: head dim K -> (cos, sin), each (B, T, K), frequencies doubled for rotate-half; one entry per head dim
        that some mixer of the model asks for through `MixerConfig.rotary_dim`.
    mask: (B, T) bool, True at real tokens; None when every token is real. Padding may stand left, right or between.
    cu_seqlens: (N + 1,) int64, boundaries of the N segments packed into the one row (B must be 1): 0, ..., T.
    """

    rotary: RotaryTable = field(default_factory=dict)
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.cu_seqlens is not None:
            raise ValueError("a sequence is either padded (mask) or packed (cu_seqlens), not both")


class State:
    """What a mixer remembers between calls: tensors at fixed addresses, updated in place, owned by the caller.

    Subclasses are dataclasses whose fields are tensors or further states. Every tensor has the batch (or, for packed
    input, the number of segments N) as its first axis.
    """

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name."""
        found: dict[str, Tensor] = {}
        for name, value in self._children():
            if isinstance(value, State):
                found |= {f"{name}.{inner}": tensor for inner, tensor in value.tensors().items()}
            else:
                found[name] = value
        return found

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def clone(self) -> Self:
        """An independent copy: going on from it leaves this state untouched."""
        return self._mapped(torch.clone)

    def take_rows(self, index: Tensor) -> Self:
        """An independent copy of the rows index (n,) int64, all different, laid out in memory as these are."""
        return self._mapped(lambda tensor: torch.empty_like(tensor[: len(index)]).copy_(tensor[index]))

    @torch.no_grad()
    def put_rows(self, index: Tensor, rows: Self) -> None:
        """Overwrite the rows index (n,) int64, all different, with the n rows of another state, in place."""
        for (_, own), (_, other) in zip(self._children(), rows._children(), strict=True):
            if isinstance(own, State) and isinstance(other, State):
                own.put_rows(index, other)
            elif isinstance(own, Tensor) and isinstance(other, Tensor):
                own.detach_()[index] = other

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the empty state, in place."""
        for _, value in self._children():
            if isinstance(value, State):
                value.reset()
            else:
                value.detach_().zero_()

    def detach_(self) -> None:
        """Cut the autograd history in place: gradients of later tokens stop here (truncated backpropagation)."""
        for tensor in self.tensors().values():
            tensor.detach_()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by dotted name, detached; `load_state_dict` takes it back."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into this state in place; names, shapes and dtypes must agree.

        A part that grows takes any length. Raises ValueError before anything is copied.
        """
        own = self.tensors()
        if own.keys() != saved.keys():
            raise ValueError(f"state holds {sorted(own)}, saved state holds {sorted(saved)}")
        self._require_fitting(saved)
        self._take(saved)

    def _require_fitting(self, saved: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless `_take` can take these tensors, whose names agree."""
        for name, value in self._children():
            if isinstance(value, State):
                value._require_fitting(_below(name, saved))
            elif value.shape != saved[name].shape or value.dtype != saved[name].dtype:
                raise ValueError(
                    f"state tensor {name}: saved {tuple(saved[name].shape)} {saved[name].dtype}, "
                    f"expected {tuple(value.shape)} {value.dtype}"
                )

    def _take(self, saved: Mapping[str, Tensor]) -> None:
        for name, value in self._children():
            if isinstance(value, State):
                value._take(_below(name, saved))
            else:
                value.detach_().copy_(saved[name])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same kind of state, of what becomes of the tensors."""
        values = {
            name: value._mapped(change) if isinstance(value, State) else change(value)
            for name, value in self._children()
        }
        return dataclasses.replace(self, **values)  # type: ignore[type-var]

    def _children(self) -> list[tuple[str, Tensor | State]]:
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]  # type: ignore[arg-type]


def _below(name: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, without its name."""
    start = f"{name}."
    return {key[len(start) :]: saved[key] for key in saved if key.startswith(start)}


class Mixer(nn.Module, ABC):
    """A module that mixes information across tokens."""

    @abstractmethod
    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """Mix x (B, T, D) along T into y (B, T, D), causally.

        With a state, x continues what the state has seen and the state is updated in place; when autograd records, the
        state carries gradients on into later calls (run inference under torch.no_grad()). Outputs at padding are
        zero-effect filler: finite, and never read by real tokens. With `sequence.cu_seqlens` the state has one row
        per segment.
        """

    @abstractmethod
    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty state for `batch` rows; device and dtype default to the parameters'. Recurrent parts are float32
        (float64 for a float64 dtype) whatever the dtype."""


@dataclass(frozen=True, kw_only=True)
class MixerConfig(ABC):
    """Options of a mixer and what they cost. Frozen; values are checked on construction (`__post_init__`)."""

    name: ClassVar[str] = ""  # the registered name, set by `register`
    # Options that leave the weights what they are: they change what is computed with them, or how they were drawn.
    weightless: ClassVar[frozenset[str]] = frozenset({"backend", "norm_eps"})

    @abstractmethod
    def build(self, width: int) -> Mixer:
        """The module for model width D; raises ConfigError when the width does not fit the options."""

    @abstractmethod
    def num_params(self, width: int) -> int:
        """Exact number of parameters."""

    @abstractmethod
    def flops(self, width: int, tokens: int, context: int = 0) -> int:
        """Matrix-product FLOPs (2 per multiply-add) of one forward pass over `tokens` new tokens of one row that
        follow `context` earlier ones, as torch's FlopCounterMode counts the PyTorch path."""

    @abstractmethod
    def state_bytes(self, context: int, dtype: torch.dtype, width: int | None = None) -> int:
        """Exact bytes of the state of one row after `context` tokens, for a model in `dtype`.

        width: model width D, read by the mixers whose state depends on it (Mamba2); they raise ConfigError without it.
        """

    def weight_options(self) -> dict[str, object]:
        """The options that say what the weights are: a layer can go on with another's weights if theirs are equal."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in self.weightless}

    @property
    def rotary_dim(self) -> int:
        """Head dim for which the mixer reads `Sequence.rotary`; 0 when it needs no positions."""
        return 0

    @property
    def rotary_dims(self) -> frozenset[int]:
        """All head dims for which the layer reads `Sequence.rotary`; several only where mixers stand in parallel."""
        return frozenset({self.rotary_dim} - {0})
