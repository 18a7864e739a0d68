"""Teachers in folders, their students, and the slow way to distil them, shared by the tests of distillation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hybridvl
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.layer_distillation import LayerDistillation


def text_net(pattern: str) -> ModelConfig:
    return dataclasses.replace(tiny.net(pattern), vision=None)


def folder(path: Path, net: ModelConfig, seed: int = 0) -> str:
    """A model of large random weights, so that its layers differ from the identity, saved."""
    torch.manual_seed(seed)
    hybridvl.save(VisionLanguageModel(dataclasses.replace(net, init_std=0.2)), path)
    return str(path)


def batch64(**options: Any) -> dict[str, Any]:
    """A batch of digits whose images are float64."""
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in tiny.batch(**options).items()
    }


def text_batch(lengths: list[int], seed: int = 0, padded_to: int | None = None) -> dict[str, Any]:
    """Rows of random tokens, padded on the right; the first tokens do not depend on what follows."""
    most = max(lengths) if padded_to is None else padded_to
    tokens = torch.stack(
        [
            torch.randint(10, 1000, (4096,), generator=torch.Generator().manual_seed(seed + row))
            for row in range(len(lengths))
        ]
    )[:, :most]
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": tokens,
        "labels": torch.where(mask, tokens, -100),
        "position_ids": torch.arange(most).expand(3, len(lengths), most),
        "attention_mask": mask,
    }


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows of a padded text batch end to end in one."""
    mask = batch["attention_mask"]
    lengths = mask.sum(1)
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    return {
        "input_ids": batch["input_ids"][mask][None],
        "labels": labels[mask][None],
        "position_ids": batch["position_ids"][:, mask][:, None],
        "cu_seqlens": torch.cat((lengths.new_zeros(1), lengths.cumsum(0))),
    }


def silence(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module take steps without a trainer."""
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_lr", lambda: None)


def gradients(module: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step."""
    silence(module, monkeypatch)
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.net.named_parameters() if p.grad is not None}


def naive_layer_loss(module: LayerDistillation, batch: dict[str, Any], kind: str, match: str) -> Tensor:
    """All layers at once: the teacher's hidden states first, then every replaced layer, token by token and with the
    graph of all of them."""
    names = ("input_ids", "position_ids", "pixel_values", "image_grid_thw", "cu_seqlens")
    inputs = {name: batch[name] for name in names if name in batch}
    embeds = module.teacher.embed(*(inputs.get(name) for name in ("input_ids", "pixel_values", "image_grid_thw")))
    embeds = embeds.detach()
    shared = [
        n.layer_sequence(embeds, inputs["position_ids"], None, inputs.get("cu_seqlens"))
        for n in (module.teacher, module.net)
    ]
    hidden = module.teacher(**inputs, output_hidden_states=True).hidden_states[:-1]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    losses = []
    for layer in module.replaced:
        x = hidden[layer].detach()
        pair = module.teacher.decoder.layers[layer], module.net.decoder.layers[layer]
        if match == "layer":
            target, output = (block(x, own) for block, own in zip(pair, shared, strict=True))
        else:
            target, output = (block.mixer(block.mixer_norm(x), own) for block, own in zip(pair, shared, strict=True))
        if kind == "rms":  # in one step, for who is not after the numbers
            losses.append((output - target.detach())[mask].square().mean().sqrt())
            continue
        per_token = []
        for s, t in zip(output[mask], target.detach()[mask], strict=True):
            if kind == "mse":
                per_token.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
            elif kind == "relative_mse":
                per_token.append(((s - t) @ (s - t)) / (t @ t))
            else:
                per_token.append(1 - (s @ t) / (s.norm() * t.norm()))
        losses.append(sum(per_token) / len(per_token))
    return sum(losses) / len(losses)


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages made by operators have had together while they were alive."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._most += storage.nbytes()
        if self._most > self.peak:  # unless some of it is gone
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._most = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._most)
        return out
