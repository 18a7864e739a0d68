"""A stand-in for CUDA graphs where there is no GPU: steps traced by make_fx, which fixes every Python number as a graph
does, and works on tensors where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hybridvl.inference.graphs import Bound, CudaRecorder, Inputs, Replay, Step
from hybridvl.models.decoder import ModelState
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
