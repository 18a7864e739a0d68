"""Steps of fixed shapes recorded as CUDA graphs: a frame's patches, its tokens, a decoded token."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridvl.layers.base import State
from hybridvl.layers.full import FullAttention
from hybridvl.models.decoder import ModelState
from hybridvl.models.generation import StepRunner
from hybridvl.models.vision_plan import grid_tuples, vision_plan
from hybridvl.models.vlm import VisionLanguageModel

MOST_GRAPHS = 8
"""Recorded steps that are kept; a further one takes the place of one that has not been used for IDLE steps, if any."""

IDLE = 1000
"""Steps after which a recorded one that did not come may give way: recording takes longer than a few steps save."""

_MOST_KNOWN = 64  # steps that are remembered to have come

Inputs = Sequence[Tensor | None]
Bound = ModelState | Tensor
"""What a step works on beside its inputs and the weights: a state, in place, or the grids of its patches."""
Step = Callable[..., Tensor]
"""(runner, *inputs, bound) -> its output; the runner is one that runs each call by itself."""
Replay = Callable[[Inputs], Tensor]

_recording = threading.Lock()  # of all models and devices: a recording begins by waiting for the whole device


class CudaRecorder:
    """Records steps as CUDA graphs, which share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def unusable(self, model: VisionLanguageModel) -> str | None:
        """Why the steps of a model cannot be recorded; None when they can."""
        device = model.lm_head_weight.device
        return None if device.type == "cuda" else f"the model is on the device {str(device)!r}"

    def record(self, step: Step, inputs: Inputs, bound: Bound) -> Replay:
        """A step (*inputs, bound) as a function of inputs of the same shapes, which gives a copy of its output.

        Recording computes nothing and changes no state. Raises RuntimeError where the step cannot be recorded.
        """
        with torch.inference_mode(False):  # else nothing could be copied into them outside that mode
            own = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
        device = next(x.device for x in own if x is not None)
        graph, self._pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        with _recording, torch.cuda.device(device):
            before = torch.cuda.current_stream(device)
            # thread_local: a thread that reads frames may go on meanwhile.
            recording = torch.cuda.graph(graph, self._pool, torch.cuda.Stream(device), "thread_local")
            try:
                with recording:
                    output = step(*own, bound)
            finally:
                torch.cuda.set_stream(before)  # a recording that fails leaves its own in place

        def replay(inputs: Inputs) -> Tensor:
            with torch.cuda.device(device):
                for held, given in zip(own, inputs, strict=True):
                    if held is not None and given is not None:
                        held.copy_(given)
                graph.replay()
                return output.clone()  # the next replay of any of the graphs may write over it

        return replay


class StepGraphs(StepRunner):
    """Runs the steps of a model: on a GPU by replaying what was recorded of them, elsewhere each call by itself.

    A step that comes for the first time, in its shapes and with a state at its addresses, is run by itself, which
    makes ready what it needs. The second time it is recorded, without being computed, and then replayed: every step is
    done exactly once. Layers keep what they remember at fixed addresses and read none of it on the host, so that a
    recorded step goes on being right when a window is full and its ring begins anew.

    Args:
        model: in evaluation mode; its weights stay where they are, though what they hold may change.
        graphs: whether steps are recorded.
        compiled: whether `torch.compile` makes the steps of frames and of tokens faster first.
        recorder: records steps; None: `CudaRecorder`.

    Attributes:
        uncompiled: why steps are not compiled although it was asked for; None where they are.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        graphs: bool = True,
        compiled: bool = False,
        recorder: CudaRecorder | None = None,
    ) -> None:
        super().__init__(model)
        self._recorder = recorder or CudaRecorder()
        self._never = None if graphs else "switched off"
        if self._never is None and any(isinstance(module, FullAttention) for module in model.decoder.modules()):
            self._never = "the state of full attention grows, and so moves"
        self._compiled: dict[str, Step] = {}
        if compiled:
            steps = {"run": StepRunner.run, "decode": StepRunner.decode}
            self._compiled = {
                name: torch.compile(step, fullgraph=True, dynamic=False)  # type: ignore[call-overload]
                for name, step in steps.items()
            }
        self.uncompiled: str | None = None
        self._plain = StepRunner(model)
        self._came: OrderedDict[Hashable, int] = OrderedDict()  # how often a step has come
        self._recorded: OrderedDict[Hashable, Replay] = OrderedDict()  # that used last at the end
        self._used: dict[Hashable, int] = {}  # at which step each was used last
        self._steps = 0
        self._layouts: dict[int, tuple[weakref.ref[ModelState], Hashable]] = {}
        self._spare: ModelState | None = None
        self._lent: weakref.ref[ModelState] | None = None
        self._lock = threading.RLock()

    @property
    def reason(self) -> str | None:
        """Why no step is recorded; None where steps are."""
        return self._never or self._recorder.unusable(self.model)

    def encode(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """See `StepRunner.encode`."""
        return self._step("encode", (pixel_values,), grid_thw)

    def run(self, embeds: Tensor, position_ids: Tensor, attention_mask: Tensor | None, state: ModelState) -> Tensor:
        """See `StepRunner.run`."""
        return self._step("run", (embeds, position_ids, attention_mask), state)

    def decode(self, tokens: Tensor, state: ModelState) -> Tensor:
        """See `StepRunner.decode`."""
        return self._step("decode", (tokens,), state)

    def fork(self, state: ModelState) -> ModelState:
        """See `StepRunner.fork`; where steps are recorded, at the same addresses for one reply after another."""
        if self.reason is not None:
            return state.clone()
        with self._lock:
            if self._lent is not None and self._lent() is not None:
                return state.clone()  # a second reply at a time
            if self._spare is None or _layout(self._spare) != _layout(state):
                self._spare = state.clone()
            else:
                self._spare.load_state_dict(state.state_dict())
            lent = dataclasses.replace(self._spare)  # the same tensors, free again when nobody holds this object
            self._lent = weakref.ref(lent)
            return lent

    def _step(self, name: str, inputs: Inputs, bound: Bound) -> Tensor:
        step: Step = getattr(self._plain, name)
        if torch.is_grad_enabled() or not (self._compiled or self.reason is None):
            return step(*inputs, bound)
        with self._lock:
            key = (name, self._shapes(inputs), self._place(bound), self.model.lm_head_weight.data_ptr())
            self._steps += 1
            if key in self._recorded:
                self._recorded.move_to_end(key)
                self._used[key] = self._steps
                return self._recorded[key](inputs)
            times = self._came[key] = self._came.pop(key, 0) + 1
            if len(self._came) > _MOST_KNOWN:
                self._came.popitem(last=False)
            if times > 1 and name in self._compiled:
                step = partial(self._run_compiled, name)
                times -= 1  # compiling comes with a run that is not recorded
            if times == 1 or self.reason is not None or not self._make_room():
                return step(*inputs, bound)
            replay = self._record(step, inputs, bound)
            if replay is None:
                return step(*inputs, bound)
            self._recorded[key], self._used[key] = replay, self._steps
            return replay(inputs)

    def _make_room(self) -> bool:
        """Whether there is room for another recorded step, if need be in place of one that no longer comes."""
        if len(self._recorded) < MOST_GRAPHS:
            return True
        oldest = next(iter(self._recorded))
        if self._steps - self._used[oldest] < IDLE:
            return False
        del self._recorded[oldest], self._used[oldest]
        return True

    def _run_compiled(self, name: str, *arguments: Any) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

        if name in self._compiled:
            try:
                return self._compiled[name](self._plain, *arguments)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything of the step was done
                self._compiled, self.uncompiled = {}, _first_line(error)
        made: Tensor = getattr(self._plain, name)(*arguments)
        return made

    def _record(self, step: Step, inputs: Inputs, bound: Bound) -> Replay | None:
        """What replays a step; where it cannot be recorded None, and none is recorded from then on."""
        try:
            replay = self._recorder.record(step, inputs, bound)
        except RuntimeError as error:
            self._never = _first_line(error)
            self._recorded.clear()
            self._used.clear()
            return None
        if isinstance(bound, ModelState) or self.model.config.vision is None or inputs[0] is None:
            return replay
        # The plan of the patches lies where the graph reads it, as long as somebody holds it.
        plan = vision_plan(grid_tuples(bound), self.model.config.vision, inputs[0].device)
        return partial(_holding, plan, replay)

    def _shapes(self, inputs: Inputs) -> Hashable:
        return tuple(None if x is None else (x.shape, x.dtype) for x in inputs)

    def _place(self, bound: Bound) -> Hashable:
        """What tells apart what steps are bound to: grids by their numbers, states by where they lie."""
        if not isinstance(bound, ModelState):
            return grid_tuples(bound)
        number = id(bound)
        if number not in self._layouts:
            forget = weakref.ref(bound, lambda _: self._layouts.pop(number, None))
            addresses = tuple(tensor.data_ptr() for tensor in bound.tensors().values())
            self._layouts[number] = forget, (addresses, _layout(bound))
        return self._layouts[number][1]


def _layout(state: State) -> Hashable:
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in state.tensors().values())


def _holding(held: object, replay: Replay, inputs: Inputs) -> Tensor:
    return replay(inputs)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
