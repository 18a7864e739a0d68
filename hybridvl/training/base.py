"""What the training of every stage has in common: optimizer, clipping, checkpoints, replies of the trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from hybridvl.checkpoints import check_same_model
from hybridvl.data.module import ChatDataModule
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.positions import VisualGrids
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.agreement import check_agreement
from hybridvl.training.answers import Question, model_inputs, split_questions
from hybridvl.training.optim import OptimizerConfig, build_optimizer, build_schedule, gradient_norm
from hybridvl.training.processes.sharding import Sharding, gather_all, is_sharded, scatter_all, share_shards
from hybridvl.training.processes.strategy import ShardedStrategy, sharding_of
from hybridvl.training.processes.sums import summed
from hybridvl.training.replies import reply
from hybridvl.training.scores import ReplyScores
from hybridvl.training.trainer import logs_next

Batch = Mapping[str, Any]

MODEL_KEY = "hybridvl_model"
"""Where a checkpoint keeps `ModelConfig.to_dict()`."""

_LISTED = 3  # tensors that an error message names

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_TEACHING = ("embed", "run_decoder")


class TrainingModule(LightningModule):
    """A model in training; a stage adds its loss and what it logs.

    Logs train/gradient_norm, before clipping; test/exact, test/digit_accuracy, test/<kind>_exact and
    test/<kind>_digit_accuracy from greedily generated replies.

    A teacher goes where the module goes (device, dtype), but is no part of it: it has no gradients, stays in eval mode,
    is in no checkpoint and is counted nowhere. Parameters that it shares with the model are moved once.

    Args:
        net: the model that is trained; what is frozen has requires_grad False already.
        optimizer: AdamW and its schedule.
        reply_tokens: longest reply that the test and predictions write.
        teacher: the model that it learns from, if any.
    """

    def __init__(
        self,
        net: VisionLanguageModel,
        optimizer: OptimizerConfig,
        reply_tokens: int,
        teacher: VisionLanguageModel | None = None,
    ) -> None:
        super().__init__()
        check_positive("reply_tokens", reply_tokens)
        self.config = net.config
        self.optimizer_config = optimizer
        self.reply_tokens = reply_tokens
        self.net = net
        # In a list, where torch does not look for submodules.
        self._teachers = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self._scores = ReplyScores()

    @property
    def teacher(self) -> VisionLanguageModel:
        """The model that this one learns from; stages without one have no teacher to ask for."""
        return self._teachers[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingModule:
        super()._apply(fn, recurse)
        for teacher in getattr(self, "_teachers", ()):
            teacher._apply(fn, recurse)
        return self

    def setup(self, stage: str) -> None:
        """Check that the data module makes what the model takes."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ChatDataModule):
            check_agreement(self.config, datamodule)
        self._walk_in_step(self.trainer.world_size > 1)
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after it has loaded a checkpoint, whose weights it would round

    def configure_model(self) -> None:
        """Shard the model and its teacher, once, where the trainer's strategy is one that shards."""
        sharding = sharding_of(self.trainer)
        if sharding is None or is_sharded(self.net):
            return
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.check_weights = self.check_weights
        self.to_shards(sharding)

    def to_shards(self, sharding: Sharding) -> None:
        """Shard the model and its teacher; what they share is still in memory once."""
        shared = [_shared_parameters(self.net, teacher) for teacher in self._teachers]
        self.shard(sharding)
        for teacher, names in zip(self._teachers, shared, strict=True):
            share_shards(self.net, teacher, names)
        scatter_all((self, *self._teachers))

    def shard(self, sharding: Sharding) -> None:
        """Shard all weights: those of a layer are gathered while it runs, all others while a step runs."""
        sharding.shard_layers(self.net)
        sharding.shard_rest(self, _STEPS)
        for teacher in self._teachers:
            sharding.shard_layers(teacher)
            sharding.shard_rest(teacher, _TEACHING)

    def on_validation_start(self) -> None:
        """Gather sharded weights: from here on processes need not do the same things at the same time."""
        self._gather()

    def on_validation_end(self) -> None:
        """Go back to shards."""
        self._scatter()

    def on_test_start(self) -> None:
        """Gather sharded weights."""
        self._gather()

    def on_test_end(self) -> None:
        """Go back to shards."""
        self._scatter()

    def on_predict_start(self) -> None:
        """Gather sharded weights."""
        self._gather()

    def on_predict_end(self) -> None:
        """Go back to shards."""
        self._scatter()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of all gradients, before they are clipped."""
        if logs_next(self.trainer):
            self.log("train/gradient_norm", gradient_norm(self.net.parameters()), batch_size=1)

    def on_test_epoch_start(self) -> None:
        """Forget the scores of the previous pass."""
        self._scores = ReplyScores()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Generate a reply to every question of the batch and score its text."""
        questions = self.questions(batch)
        for question, text in zip(questions, self.replies(questions), strict=True):
            self._scores.add(question.kind, text, self.text(question.answer))

    def on_test_epoch_end(self) -> None:
        """Log the rates over all replies."""
        metrics = self._scores.over_all_processes().metrics()
        if not metrics:
            raise ConfigError("data: the test split holds no answers to score")
        self.log_dict({f"test/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """The reply to every question: {"kind", "question", "answer" (the target, if any), "reply"}."""
        questions = self.questions(batch)
        return [
            {
                "kind": question.kind,
                "question": self.last_turn(question),
                "answer": self.text(question.answer),
                "reply": text,
            }
            for question, text in zip(questions, self.replies(questions), strict=True)
        ]

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule, stepped once an optimizer step."""
        config = self.optimizer_config
        if config.fused is None and self.trainer.precision == "16-mixed":
            config = dataclasses.replace(config, fused=False)  # a fused step unscales too late for clipping
        optimizer = build_optimizer(self.net, config)
        schedule = build_schedule(optimizer, config, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's flags say, also beside a fused optimizer in bfloat16, where Lightning would refuse."""
        if self.trainer.precision == "16-mixed":
            # Gradients are scaled here; Lightning knows when they can be clipped.
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None and gradient_clip_algorithm == "value":
            clip_grad_value_(self.net.parameters(), gradient_clip_val)
        elif gradient_clip_val is not None:
            clip_grad_norm_(self.net.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which model it is of."""
        checkpoint[MODEL_KEY] = self.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming the layers that differ, or of another teacher's student."""
        if MODEL_KEY not in checkpoint:
            raise ConfigError(f"the checkpoint does not say which model it is of (no {MODEL_KEY!r} in it)")
        check_same_model(ModelConfig.from_dict(checkpoint[MODEL_KEY]), self.config, "ckpt_path")
        if isinstance(checkpoint["state_dict"], Mapping):  # else it has not been read yet
            self.check_weights(checkpoint["state_dict"])

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights of another teacher's student."""
        for teacher in self._teachers:
            _check_shared(weights, self.net, teacher)

    def compared_settings(self) -> dict[str, Any]:
        """What people tell runs apart by, besides the model and the optimizer: the stage, and its own settings."""
        return {}

    def log_lr(self) -> None:
        """Log train/lr, the learning rate of the step that is being taken."""
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)

    def questions(self, batch: Batch) -> list[Question]:
        """The batch as single questions."""
        return split_questions(batch, *visual_tokens(self.config))

    def replies(self, questions: Sequence[Question]) -> list[str]:
        """Greedy replies as text."""
        if not questions:
            return []
        stop = self._tokenizer().convert_tokens_to_ids("<|im_end|>")
        was_training = self.net.training
        self.net.eval()
        with self.trainer.precision_plugin.forward_context():  # for who asks between two steps
            written = reply(self.net, questions, (stop,), self.reply_tokens)
        self.net.train(was_training)
        return [self.text(tokens) for tokens in written]

    def text(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self._tokenizer().decode(tokens, skip_special_tokens=True))

    def last_turn(self, question: Question) -> str:
        """The text that asks the question: the last user turn of the prompt."""
        tokenizer = self._tokenizer()
        start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        turns = (question.prompt == start).nonzero().flatten().tolist()
        begin = turns[-2] if len(turns) > 1 else 0
        end = turns[-1] if len(turns) > 1 else question.prompt.numel()
        return self.text(question.prompt[begin:end]).removeprefix("user\n").strip()

    def _gather(self) -> None:
        self._walk_in_step(False)
        if is_sharded(self.net):
            gather_all((self, *self._teachers))

    def _scatter(self) -> None:
        self._walk_in_step(self.trainer.world_size > 1)
        if is_sharded(self.net):
            scatter_all((self, *self._teachers))

    def _walk_in_step(self, in_step: bool) -> None:
        for net in (self.net, *self._teachers):
            net.in_step = in_step

    def _tokenizer(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, ChatDataModule):
            raise ConfigError("replies need the tokenizer of a ChatDataModule: pass datamodule= to the trainer")
        return datamodule.chat.tokenizer

    def _total_steps(self) -> int:
        if self.optimizer_config.total_steps is not None:
            return self.optimizer_config.total_steps
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError(
                "model.optimizer.total_steps: null, and the trainer has no end to take it from; "
                "set trainer.max_steps or trainer.max_epochs"
            )
        return int(steps)


def check_positive(name: str, value: int) -> None:
    """Raise ConfigError unless model.NAME is a positive number of tokens."""
    if value < 1:
        raise ConfigError(f"model.{name}: {value!r} is not a positive number of tokens")


def visual_tokens(net: ModelConfig) -> tuple[int | None, int, int | None]:
    """What tells which tokens of a batch show images and videos: see `split_questions`."""
    if net.vision is None:
        return None, 1, None
    return net.image_token_id, net.vision.spatial_merge_size**2, net.video_token_id


def causal_inputs(batch: Batch) -> dict[str, Any]:
    """What a model takes of a batch in training: no mask, which causal mixers do not need.

    Batches are padded on the right, where no real token looks.
    """
    inputs = model_inputs(batch)
    inputs.pop("attention_mask", None)
    return inputs


def real_positions(batch: Batch) -> Tensor:
    """(B, T) bool: tokens that are not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0


def embedded(net: VisionLanguageModel, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, D) and positions (3, B, T) of what `causal_inputs` gives, for `run_decoder`."""
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    tokens: Tensor = inputs["input_ids"]
    embeds = net.embed(tokens, *(inputs.get(name) for name in names))
    positions = inputs.get("position_ids")
    if positions is None:
        visuals = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = VisualGrids(*(inputs.get(name) for name in visuals))
        positions = net.next_positions(tokens, grids, cu_seqlens=inputs.get("cu_seqlens"))
    return embeds, positions


def _shared_parameters(net: VisionLanguageModel, teacher: VisionLanguageModel) -> list[str]:
    """Names of the model's parameters that are its teacher's own."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    return [name for name, parameter in net.named_parameters() if id(parameter) in theirs]


def _check_shared(saved: Mapping[str, Tensor], net: VisionLanguageModel, teacher: VisionLanguageModel) -> None:
    """Raise ConfigError if a checkpoint would change what the model shares with its teacher."""
    own = dict(net.named_parameters())
    names = [name for name in _shared_parameters(net, teacher) if f"net.{name}" in saved]
    pairs = ((_local(saved[f"net.{name}"]), _local(own[name])) for name in names)
    differ = [float(not torch.equal(theirs.to(mine), mine)) for theirs, mine in pairs]
    counts = summed(torch.tensor(differ, dtype=torch.float64, device=net.lm_head_weight.device))  # over all shards
    changed = [name for name, count in zip(names, counts.tolist(), strict=True) if count]
    if changed:
        more = f" and {len(changed) - _LISTED} more" if len(changed) > _LISTED else ""
        raise ConfigError(
            f"ckpt_path: a checkpoint of another teacher's student: {', '.join(changed[:_LISTED])}{more} are not "
            "the teacher's; expected the teacher of the checkpoint"
        )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
