"""Weights in shards (FSDP2): each process keeps a part of every weight and gathers a layer when it computes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hybridvl.models.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Attributes:
        mesh: one dimension, the processes that share the data.
        compute: dtype in which the weights of linear layers are gathered; None: their own. What is trained, its
            gradients and all other weights (norms, convolutions, A_log, dt_bias, D, embeddings, head) keep their dtype.
    """

    mesh: DeviceMesh
    compute: torch.dtype | None = None

    def shard_layers(self, net: VisionLanguageModel) -> None:
        """Shard the layers of the decoder and of the vision tower, each a unit of its own; the rest stays whole."""
        layers: list[nn.Module] = [] if net.visual is None else list(net.visual.blocks)
        for layer in (*layers, *net.decoder.layers):
            if self.compute is None:
                self._shard(layer)
            else:
                self._shard_in_two(layer)

    def shard_rest(self, module: nn.Module, methods: Iterable[str] = ()) -> None:
        """Shard what `shard_layers` has left whole, as one unit; it is gathered while one of these methods runs.

        None of them may call another of them.
        """
        self._shard(module)
        for method in methods:
            register_fsdp_forward_method(module, method)

    def _shard_in_two(self, layer: nn.Module) -> None:
        """Units of a layer: its mixer's linear weights, its MLP's, and everything else, which is small.

        A unit has one dtype. Inputs are left to autocast, which leaves alone what must stay precise.
        """
        owners = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        linear = {parameter for owner in owners for parameter in owner.parameters(recurse=False)}
        self._shard(layer, ignored=linear)
        for child in layer.children():
            own = set(child.parameters())
            if own & linear:
                self._shard(child, self.compute, ignored=own - linear)

    def _shard(
        self, module: nn.Module, dtype: torch.dtype | None = None, ignored: set[nn.Parameter] | None = None
    ) -> None:
        reduced = None if dtype is None else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        fully_shard(module, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)


def is_sharded(net: nn.Module) -> bool:
    """Whether some of the modules of a model are sharded, gathered at the moment or not."""
    return any(isinstance(module, FSDPModule) for module in net.modules())


def share_shards(net: nn.Module, teacher: nn.Module, names: Iterable[str]) -> None:
    """Put the shards of some of a model's parameters in the place of its teacher's: they are in memory once."""
    own = dict(net.named_parameters())
    for name in names:
        _set_parameter(teacher, name, own[name])


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Have the weights of one unit whole within the block; nothing happens where they are whole already."""
    if not isinstance(module, FSDPModule) or not any(isinstance(p, DTensor) for p in module.parameters()):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gather_all(modules: Iterable[nn.Module]) -> None:
    """Have all weights whole until `scatter_all`: then processes may run the model as often as each of them likes."""
    # Not as tensors of inference mode, which a later training step could not use.
    with torch.inference_mode(False), torch.no_grad():
        for unit in _units(modules):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()


def scatter_all(modules: Iterable[nn.Module]) -> None:
    """Undo `gather_all`: layers are scattered as soon as they have run, what belongs to no layer after the step."""
    modules = list(modules)
    for unit in _units(modules):
        unit.set_reshard_after_forward(all(unit is not module for module in modules), recurse=False)
        unit.reshard()


@contextmanager
def put_together(net: nn.Module, keep: bool) -> Iterator[None]:
    """Have a model's own weights whole on the CPU within the block, for who saves it; all processes must call this.

    keep: whether this process has them then; others only take part. Nothing happens to a model that is not sharded.
    """
    sharded = {name: p for name, p in net.named_parameters() if isinstance(p, DTensor)}
    try:
        for name, parameter in sharded.items():
            value = whole(parameter.detach())
            value = value.cpu() if keep else value.new_empty(0)
            _set_parameter(net, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for name, parameter in sharded.items():
            _set_parameter(net, name, parameter)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in shards as a plain one, on every process; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _set_parameter(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner), leaf, parameter)


def _units(modules: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    for top in modules:
        for module in top.modules():
            if isinstance(module, FSDPModule):
                yield module
