"""A stand-in for CUDA graphs where there is no GPU: steps traced by make_fx, which fixes every Python number as a graph
does, and works on tensors where they lie; and tokens that go through recorded steps and through steps by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from model_cases import relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hybridvl.inference.graphs import Bound, CudaRecorder, Inputs, Replay, Step, StepGraphs
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import StepRunner
from hybridvl.models.vlm import VisionLanguageModel

READERS = ("hybridvl.layers.cache", "hybridvl.layers.ops.ring_attention")


class TraceRecorder(CudaRecorder):
    """Records steps as graphs of PyTorch's operators.

    Args:
        reads: whether a step may read numbers on the host while it is traced: on a GPU it does not.

    Attributes:
        made: how many steps were recorded. replayed: how often one of them was replayed.
    """

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads, self.made, self.replayed = reads, 0, 0

    def unusable(self, model: VisionLanguageModel) -> str | None:
        return None

    def record(self, step: Step, inputs: Inputs, bound: Bound) -> Replay:
        self.made += 1
        own = [None if x is None else x.clone() for x in inputs]
        held = list(bound.tensors().values()) if isinstance(bound, ModelState) else []

        def traced(given: list[Tensor | None], tensors: list[Tensor]) -> Tensor:
            return step(*given, with_tensors(bound, tensors) if isinstance(bound, ModelState) else bound)

        with reads_on_the_host(self.reads):
            # Tracing computes: on copies, for recording changes no state.
            graph = make_fx(traced)(own, [tensor.clone() for tensor in held])

        def replay(inputs: Inputs) -> Tensor:
            self.replayed += 1
            return graph([None if x is None else x.clone() for x in inputs], held)

        return replay


class Pair:
    """The same tokens through recorded steps and through steps by themselves, each with a state of its own."""

    def __init__(self, model: VisionLanguageModel, runner: StepGraphs, rows: int = 1) -> None:
        self.runner, self.plain = runner, StepRunner(model)
        self.state, self.right = model.init_state(rows), model.init_state(rows)
        self.generator = torch.Generator().manual_seed(0)

    def frame(self, tokens: int, mask: Tensor | None = None) -> float:
        """The largest error of hidden states and states after a frame."""
        rows = len(self.state.length)
        embeds = torch.randn(rows, tokens, 32, generator=self.generator)
        places = (self.right.next_position[None, :, None] + torch.arange(tokens)).expand(3, -1, -1)
        found = self.runner.run(embeds, places, mask, self.state)
        return self._error(found, self.plain.run(embeds, places, mask, self.right))

    def token(self) -> float:
        """The same after a decoded token, of the logits."""
        tokens = torch.randint(0, 80, self.state.length.shape, generator=self.generator)
        found = self.runner.decode(tokens, self.state)
        return self._error(found, self.plain.decode(tokens, self.right))

    def _error(self, found: Tensor, right: Tensor) -> float:
        pairs = zip(self.state.tensors().values(), self.right.tensors().values(), strict=True)
        return max(relative_error(found, right), *(relative_error(own, other) for own, other in pairs))


def with_tensors(state: ModelState, tensors: list[Tensor]) -> ModelState:
    """The state with other tensors in the places of its own."""
    own = [tensor.data_ptr() for tensor in state.tensors().values()]
    return state._mapped(lambda tensor: tensors[own.index(tensor.data_ptr())])


@contextmanager
def reads_on_the_host(allowed: bool) -> Iterator[None]:
    """Whether layers may look at the numbers of a tensor, which on a GPU they never do."""
    with ExitStack() as stack:
        for module in () if allowed else READERS:
            stack.enter_context(mock.patch(f"{module}.readable_on_host", return_value=False))
        yield
