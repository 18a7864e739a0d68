"""What two processes with shards do in the tests of sharding; each function runs in both and returns plain values."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import tiny
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from hybridvl.training.base import TrainingModule
from hybridvl.training.layer_distillation import LayerDistillation
from hybridvl.training.logit_distillation import LogitDistillation
from hybridvl.training.optim import OptimizerConfig, build_optimizer
from hybridvl.training.processes.sharding import Sharding, gather_all, put_together, scatter_all, whole
from hybridvl.training.student import StudentConfig

WORLD = 2


def run(rank: int, port: int, folder: str) -> None:
    """The whole of a process: every piece of work, whose results it saves."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {work.__name__: work(rank, folder) for work in WORK}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def mixed_batches(rank: int, folder: str) -> dict[str, Tensor]:
    """Gradients of a step in which only the first process has images."""
    module = _quiet(tiny.module().double())
    batches = [image_batch(), text_batch()]
    module.to_shards(Sharding(_mesh()))
    module.net.in_step = True
    module.training_step(batches[rank], 0).backward()
    return {name: whole(p.grad) for name, p in module.net.named_parameters() if p.grad is not None}


def dtypes(rank: int, folder: str) -> dict[str, Any]:
    """Dtypes under bf16-mixed: of what is kept, of what layers compute with, of gradients and moments."""
    module = _quiet(tiny.module("(swa gdn) mamba2"))
    module.to_shards(Sharding(_mesh(), torch.bfloat16))
    computed: dict[str, torch.dtype] = {}

    def record(owner: nn.Module, inputs: Any) -> None:
        computed.update({name: p.dtype for name, p in module.net.named_parameters() if not hasattr(p, "to_local")})

    for layer in module.net.decoder.layers:
        layer.mixer.register_forward_pre_hook(record)
        layer.mlp.register_forward_pre_hook(record)
    optimizer = build_optimizer(module.net, OptimizerConfig())
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(tiny.batch(), 0)
    loss.backward()
    kept = {name: (p.dtype, p.grad.dtype) for name, p in module.net.named_parameters()}
    optimizer.step()
    moments = {tensor.dtype for state in optimizer.state.values() for tensor in state.values()}
    return {"computed": computed, "kept": kept, "moments": moments, "loss": float(loss.detach())}


def distillation(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    """By stage: bytes of a teacher's and a student's weights in this process, before and after they are sharded, and of
    the student's where they are put together; how many layers of both are whole, at most, while one runs; and the
    largest difference that shards make to a gradient, of the largest gradient of its parameter."""
    student = StudentConfig(f"{folder}/teacher", "swa gdn mamba2")
    made: dict[str, TrainingModule] = {
        "layers": LayerDistillation(student),
        "logits": LogitDistillation(student),
        "decoder": LogitDistillation(student, train_only=None, freeze=("vision",), cross_entropy=0.5),
    }
    found = {}
    for name, module in made.items():
        wanted = _gradients(_quiet(module))
        module.zero_grad()
        before = _bytes(module.net, module.teacher)
        module.to_shards(Sharding(_mesh()))
        module.to("cpu")
        with torch.inference_mode():  # as Lightning validates on GPUs, before the first step
            gather_all((module, module.teacher))
            module.validation_step(tiny.batch(), 0)
            scatter_all((module, module.teacher))
        counts = _count_whole_layers(module)
        gradients = _gradients(module)
        assert gradients.keys() == wanted.keys()
        with put_together(module.net, keep=rank == 0):
            together = sum(p.numel() * p.itemsize for p in module.net.parameters())
        found[name] = {
            "whole": before,
            "sharded": _bytes(module.net, module.teacher),
            "together": together,
            "layers": max(counts),
            "error": max(float((gradients[key] - g).abs().max() / g.abs().max()) for key, g in wanted.items()),
        }
    return found


WORK: tuple[Callable[[int, str], Any], ...] = (mixed_batches, dtypes, distillation)


def image_batch() -> dict[str, Any]:
    """A batch with images, in float64."""
    return pairs.batch64()


def text_batch() -> dict[str, Any]:
    """A batch without."""
    return pairs.text_batch([9, 14])


def _mesh() -> Any:
    return init_device_mesh("cpu", (WORLD,))


def _quiet(module: Any) -> Any:
    module.log = lambda *_, **__: None
    module.log_lr = lambda: None
    return module


def _gradients(module: TrainingModule) -> dict[str, Tensor]:
    """Of a step with the same batch in every process."""
    module.training_step(tiny.batch(), 0).backward()
    return {name: whole(p.grad).clone() for name, p in module.net.named_parameters() if p.grad is not None}


def _count_whole_layers(module: TrainingModule) -> list[int]:
    """How many layers of both models are whole when one of them runs, filled as they do."""
    layers = [layer for net in (module.net, module.teacher) for layer in net.decoder.layers]
    counts: list[int] = []

    def count(owner: nn.Module, inputs: Any) -> None:
        counts.append(sum(not all(hasattr(p, "to_local") for p in layer.parameters()) for layer in layers))

    for layer in layers:
        layer.mixer.register_forward_pre_hook(count)
    return counts


def _bytes(*nets: nn.Module) -> int:
    """Of all storages, each counted once."""
    local = [p.to_local() if hasattr(p, "to_local") else p for net in nets for p in net.parameters()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())
