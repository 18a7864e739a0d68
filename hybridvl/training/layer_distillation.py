"""Distillation layer by layer: each replaced layer learns to do to the teacher's own input what the teacher's does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.norms import at_least_float32
from hybridvl.models.block import Block
from hybridvl.training.base import Batch, TrainingModule, causal_inputs, embedded, real_positions
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.processes.sharding import Sharding, unsharded
from hybridvl.training.processes.sums import Means, processes, summed
from hybridvl.training.student import StudentConfig, build_pair

LAYER_LOSSES = ("mse", "relative_mse", "cosine")
MATCHES = ("layer", "mixer")


class LayerLoss(NamedTuple):
    """How far one layer is from the teacher's.

    layer: its number.
    loss: (), mean over the real tokens of this process's batch, float32 (float64 for float64 models).
    gradients: of the layer's share of the mean loss, times the loss factor and the batch's weight, one for each of its
        trained parameters; in shards, and the mean over the processes, where those are sharded. None of them where they
        were not asked for.
    """

    layer: int
    loss: Tensor
    gradients: tuple[Tensor, ...]


class LayerDistillation(TrainingModule):
    """Trains the mixers of the layers that differ from the teacher's.

    Every one is fed the teacher's own input to that layer, so that no layer learns to mend what another did; the loss
    is the mean over these layers of their distance from the teacher's layer, over real tokens. The teacher runs once,
    layer by layer beside the student, up to the last replaced layer and without its head. A layer is differentiated as
    soon as it has run: the graph of one layer is alive at a time, whatever the depth.

    Logs train/loss, train/layer_<i>, train/lr, train/gradient_norm; val/loss, val/layer_<i>; and with a test the scores
    of the student's replies.

    Args:
        student: teacher and student.
        loss: "mse" (mean over the width of squared differences), "relative_mse" (a token's squared distance over the
            squared length of the teacher's vector) or "cosine" (one minus the cosine between the two).
        match: "layer" compares outputs of whole layers, "mixer" those of the mixers before they are added to the
            residual stream.
        optimizer: AdamW and its schedule.
        freeze: what of the replaced mixers is not trained; see `hybridvl.training.freezing`. Layers of which nothing is
            trained are left out.
        loss_factor: gradients are of the loss times this; the paper takes 1000. AdamW does not see it but for its eps,
            clipping does, and float16 needs it. What is logged is without it.
        reply_tokens: longest reply that the test and predictions write.
    """

    def __init__(
        self,
        student: StudentConfig,
        loss: Literal["mse", "relative_mse", "cosine"] = "mse",
        match: Literal["layer", "mixer"] = "layer",
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen, so sharing it is safe
        freeze: Sequence[str] = (),
        loss_factor: float = 1.0,
        reply_tokens: int = 64,
    ) -> None:
        for name, value, accepted in (("loss", loss, LAYER_LOSSES), ("match", match, MATCHES)):
            if value not in accepted:
                raise ConfigError(f"model.{name}: {value!r}; expected one of {', '.join(accepted)}")
        if not 0 < loss_factor < float("inf"):
            raise ConfigError(f"model.loss_factor: {loss_factor!r}; expected a finite number above 0")
        # The seed of the run, whatever has been drawn before; processes with several get the first one's weights.
        pair = build_pair(student, torch.initial_seed() % 2**63, freeze=freeze)
        super().__init__(pair.student, optimizer, reply_tokens, pair.teacher)
        self.inherit = student.inherit
        self.loss = loss
        self.match = match
        self.loss_factor = loss_factor
        self.replaced = tuple(layer for layer in pair.replaced if _trained(self._blocks(layer)[0]))
        if not self.replaced:
            raise ConfigError("model.freeze: every parameter is frozen, there is nothing to train")
        self._means = Means([self._tag("val", layer) for layer in self.replaced])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean over replaced layers and over the real tokens of all processes' batches."""
        tokens = real_positions(batch).sum()
        total = summed(tokens).clamp_min(1)
        # Processes average their gradients; weighted like this, that is the gradient of the mean over all tokens.
        weight = tokens * processes() / total
        parts = list(self.layer_losses(batch, weight))
        losses = torch.stack([part.loss for part in parts])
        means = summed(losses * tokens) / total
        self.log("train/loss", means.mean(), prog_bar=True, batch_size=1)
        for part, mean in zip(parts, means, strict=True):
            self.log(self._tag("train", part.layer), mean, batch_size=1)
        self.log_lr()
        gradients = [gradient for part in parts for gradient in part.gradients]
        parameters = [p for part in parts for p in _trained(self._blocks(part.layer)[0])]
        carried: Tensor = _Carried.apply(losses.mean() * weight * self.loss_factor, gradients, *parameters)
        return carried

    def on_validation_epoch_start(self) -> None:
        """Forget the losses of the previous pass."""
        self._means.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same losses on other data."""
        losses = torch.stack([part.loss for part in self.layer_losses(batch)])
        self._means.add(losses, [int(real_positions(batch).sum())] * len(losses))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens."""
        means = self._means.over_all_processes(self.device)
        if means:
            self.log("val/loss", torch.stack(list(means.values())).mean(), prog_bar=True, sync_dist=True)
        for name, mean in means.items():
            self.log(name, mean, sync_dist=True)

    def compared_settings(self) -> dict[str, Any]:
        """See `TrainingModule.compared_settings`."""
        return {"stage": "layers", "inherit": self.inherit, "loss": self.loss, "match": self.match}

    def layer_losses(self, batch: Batch, weight: Tensor | float = 1.0) -> Iterator[LayerLoss]:
        """The losses of the replaced layers in order, with gradients of `weight` times their mean if autograd records.

        Nothing is computed of a layer before the loss of the one before it has been taken.
        """
        differentiate = torch.is_grad_enabled()
        inputs, real = causal_inputs(batch), real_positions(batch)
        with torch.no_grad(), unsharded(self.teacher):
            x, positions = embedded(self.teacher, inputs)
        packed = inputs.get("cu_seqlens")
        sequence, own_sequence = (
            net.layer_sequence(x, positions, cu_seqlens=packed) for net in (self.teacher, self.net)
        )
        for layer in range(self.replaced[-1] + 1):
            own, theirs = self._blocks(layer)
            with torch.no_grad(), unsharded(theirs):
                mixed = theirs.mix(x, sequence)
                following = theirs.finish(x, mixed)
            if layer in self.replaced:
                target = following if self.match == "layer" else mixed
                trained = _trained(own)
                with torch.set_grad_enabled(differentiate):
                    output = own(x, own_sequence) if self.match == "layer" else own.mix_alone(x, own_sequence)
                    loss = _masked_mean(token_distances(output, target, self.loss), real)
                    share = loss * weight * (self.loss_factor / len(self.replaced))
                    gradients = _gradients(share, trained) if differentiate else ()
                del output, target, share
                torch.clear_autocast_cache()  # which keeps this layer's weights in half precision
                yield LayerLoss(layer, loss.detach(), gradients)
            del mixed
            x = following

    def shard(self, sharding: Sharding) -> None:
        """Shard all weights. Every layer runs, and is differentiated, on its own: no step gathers anything else."""
        for net in (self.net, self.teacher):
            sharding.shard_layers(net)
            sharding.shard_rest(net)
        if self.match == "mixer":
            for layer in self.replaced:
                register_fsdp_forward_method(self._blocks(layer)[0], "mix_alone")

    def _blocks(self, layer: int) -> tuple[Block, Block]:
        """The student's layer and the teacher's."""
        own, theirs = (net.decoder.layers[layer] for net in (self.net, self.teacher))
        assert isinstance(own, Block)
        assert isinstance(theirs, Block)
        return own, theirs

    def _tag(self, split: str, layer: int) -> str:
        return f"{split}/layer_{layer:0{len(str(len(self.net.mixer_configs) - 1))}d}"


def token_distances(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """(B, T) distances of a layer's output (B, T, D) from the teacher's, in float32 (float64 for float64).

    kind: "mse", "relative_mse" or "cosine", see `LayerDistillation`.
    """
    precise = at_least_float32(output.dtype)
    output, target = output.to(precise), target.to(precise)
    if kind == "cosine":
        return 1 - F.cosine_similarity(output, target, dim=-1)
    squares = (output - target).square()
    if kind == "mse":
        return squares.mean(-1)
    return squares.sum(-1) / target.square().sum(-1).clamp_min(torch.finfo(precise).tiny)


class _Carried(torch.autograd.Function):
    """A loss whose gradients are known already: backward hands them to the parameters, times the loss's own gradient.

    So they go the way of every other gradient: accumulation, the hooks of the distributed wrapper, clipping.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they are nobody else's, and torch refuses a second backward through what has changed.
        return None, None, *(gradient.mul_(grad_loss) for gradient in ctx.saved_tensors)


def _trained(block: Block) -> list[Tensor]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a layer's parameters, as they were before it ran."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return torch.autograd.grad(loss, parameters, materialize_grads=True)
    # Only a backward pass of its own reduces gradients to shards. What steps have accumulated so far stays aside.
    accumulated = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    found = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    for parameter, gradient in zip(parameters, accumulated, strict=True):
        parameter.grad = gradient
    return found


def _masked_mean(values: Tensor, real: Tensor) -> Tensor:
    """() mean of values (B, T) where `real`; 0 where nothing is."""
    return torch.where(real, values, 0).sum() / real.sum().clamp_min(1)
