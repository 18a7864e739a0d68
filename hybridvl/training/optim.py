"""AdamW with sensible parameter groups, and a cosine schedule with warm-up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hybridvl.layers.errors import ConfigError
from hybridvl.training.processes.sharding import whole

_NEVER_DECAYED = ("A_log", "dt_bias", "D")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; norms, biases, A_log, dt_bias and D are never decayed.
        decay_embeddings: whether the token embeddings are decayed too.
        warmup_steps: optimizer steps of linear warm-up, the first of them at lr / warmup_steps.
        final_lr: what the cosine ends at, as a share of the peak.
        total_steps: optimizer steps of the whole schedule; null takes them from the trainer (max_steps or max_epochs).
        fused: one fused kernel for the update; null uses it where torch has one for the device.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    warmup_steps: int = 100
    final_lr: float = 0.0
    total_steps: int | None = None
    fused: bool | None = None

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr > 0, "a positive number"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            "eps": (self.eps > 0, "a positive number"),
            "weight_decay": (self.weight_decay >= 0, "a number >= 0"),
            "warmup_steps": (self.warmup_steps >= 0, "an integer >= 0"),
            "final_lr": (0 <= self.final_lr <= 1, "a share in [0, 1]"),
            "total_steps": (self.total_steps is None or self.total_steps > 0, "a positive integer or null"),
        }
        for name, (good, accepted) in checks.items():
            if not good:
                raise ConfigError(f"model.optimizer.{name}: {getattr(self, name)!r} is not {accepted}")


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, decayed and not, each with its `names` for inspection.

    A parameter shared by several modules is listed once and is not decayed when any of its owners must not be.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    kept = {p for owner in module.modules() for p in _undecayed(owner, config.decay_embeddings)}
    groups: list[dict[str, Any]] = []
    for weight_decay, names in (
        (config.weight_decay, [name for name, p in trainable.items() if p not in kept]),
        (0.0, [name for name, p in trainable.items() if p in kept]),
    ):
        if names:
            params = [trainable[name] for name in names]
            groups.append({"params": params, "names": names, "weight_decay": weight_decay})
    return groups


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over `parameter_groups`; raises ConfigError when nothing is trainable."""
    groups = parameter_groups(module, config)
    if not groups:
        raise ConfigError("model.train_only, model.freeze: every parameter is frozen, there is nothing to train")
    fused = config.fused
    if fused is None:
        parameters = [p for group in groups for p in group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    for group in groups:
        del group["names"]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `final_lr` of the peak at `total_steps`; to be stepped once a step."""
    share = partial(lr_share, warmup_steps=config.warmup_steps, total_steps=total_steps, final=config.final_lr)
    return LambdaLR(optimizer, share)


def lr_share(step: int, *, warmup_steps: int, total_steps: int, final: float) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of the peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """() norm of all gradients of all processes, where weights are sharded; 0 without any."""
    return whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _undecayed(owner: nn.Module, decay_embeddings: bool) -> list[nn.Parameter]:
    """Own parameters of a module that take no weight decay: vectors and scalars (norms, biases), and known names."""
    embedding = isinstance(owner, nn.Embedding) and not decay_embeddings
    return [
        parameter
        for name, parameter in owner.named_parameters(recurse=False)
        if embedding or parameter.ndim < 2 or name in _NEVER_DECAYED
    ]
