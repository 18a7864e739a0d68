"""`trainer.strategy: fsdp2`: Lightning's ModelParallelStrategy with all processes sharing the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from hybridvl.layers.errors import ConfigError
from hybridvl.training.checkpoints.files import read_checkpoint
from hybridvl.training.checkpoints.shards import OPTIMIZER, read_into, read_meta, write_sharded
from hybridvl.training.processes.sharding import Sharding

FSDP2 = "fsdp2"
"""The name by which `trainer.strategy` asks for it."""

# Precisions, and the dtype in which linear maps are gathered where that is not their own.
_COMPUTE = {"64-true": None, "32-true": None, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Shards:
    """What stands for weights and optimizer states in a checkpoint whose shards have not been read yet."""

    path: Path


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: weights, gradients and the optimizer's state lie in shards on all processes, which share the data.

    Checkpoints are folders in shards, as `ModelParallelStrategy` has them, whole or not there. A checkpoint that was
    written as one file is gone on with too.
    """

    check_weights: Callable[[Mapping[str, Tensor]], None] = staticmethod(lambda weights: None)
    """Raises an error for weights that are not to be taken; set by who knows."""

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for it after the checkpoint has been found to fit."""
        return True

    def setup_environment(self) -> None:
        """Meet the other processes; all of them are in one mesh."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder in shards, whole or not at all; ConfigError where it cannot be written."""
        path = Path(self.broadcast(str(filepath)))
        write_sharded(checkpoint, path, self.is_global_zero, self.broadcast)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What is in no shards; those are read when it is clear that the checkpoint fits."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if not path.is_dir():
            return read_checkpoint(path)
        return {**read_meta(path), "state_dict": Shards(path), "optimizer_states": Shards(path)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the weights of a checkpoint."""
        assert self.model is not None
        weights = checkpoint["state_dict"]
        in_shards = isinstance(weights, Shards)
        if isinstance(weights, Shards):
            own: dict[str, Any] = get_model_state_dict(self.model)
            found = {name: torch.empty_like(tensor) for name, tensor in own.items()}
            read_into({"state_dict": found}, weights.path)
            weights = found
            self.check_weights(weights)
        options = StateDictOptions(full_state_dict=not in_shards, strict=strict)
        set_model_state_dict(self.model, weights, options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the states of the optimizers of a checkpoint."""
        assert self.model is not None
        found = checkpoint["optimizer_states"]
        for number, optimizer in enumerate(self.optimizers):
            if isinstance(found, Shards):
                state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)
                read_into({f"{OPTIMIZER}{number}": state}, found.path)
            else:
                state = _named(found[number], optimizer, self.model)
            options = StateDictOptions(full_state_dict=not isinstance(found, Shards))
            set_optimizer_state_dict(self.model, optimizer, state, options=options)


def sharding_of(trainer: Trainer) -> Sharding | None:
    """How the trainer's strategy shards; None for a strategy that does not.

    ConfigError for a precision that goes with no shards, and for strategies whose wrapper the stages would go past.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy):
        if trainer.precision not in _COMPUTE:
            known = ", ".join(_COMPUTE)
            raise ConfigError(f"trainer.precision: {trainer.precision!r}; {FSDP2} takes one of {known}")
        return Sharding(strategy.device_mesh["data_parallel"], _COMPUTE[trainer.precision])
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(f"trainer.strategy: {type(strategy).__name__}; expected auto, ddp or {FSDP2}")
    return None


def _named(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer by names of parameters, from one by their numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_number = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [by_number[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {by_number[number]: entry for number, entry in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register(FSDP2, ShardedStrategy, description="weights in shards on all processes (FSDP2)")
