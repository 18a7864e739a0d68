"""Supervised tuning: cross-entropy on answer tokens, teacher-forced validation, scored generation as the test."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import Optimizer

from hybridvl.checkpoints import check_same_model
from hybridvl.data.module import ChatDataModule
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.agreement import check_agreement
from hybridvl.training.answers import Question, answers_right, model_inputs, split_questions
from hybridvl.training.distributed import processes, summed, summed_counts
from hybridvl.training.losses import TokenLoss, label_positions, linear_cross_entropy
from hybridvl.training.optim import OptimizerConfig, build_optimizer, build_schedule
from hybridvl.training.replies import reply
from hybridvl.training.scores import ReplyScores
from hybridvl.training.trainer import logs_next

Batch = Mapping[str, Any]

MODEL_KEY = "hybridvl_model"
"""Where a checkpoint keeps `ModelConfig.to_dict()`."""


class SupervisedTuning(LightningModule):
    """Trains a vision-language model on conversations.

    Logs train/loss, train/token_accuracy, train/lr, train/gradient_norm; val/loss, val/token_accuracy, val/exact (whole
    answers, teacher-forced), val/<kind>_exact; test/exact, test/digit_accuracy, test/<kind>_exact and
    test/<kind>_digit_accuracy from greedily generated replies.

    Args:
        net: the model: pattern, mixers, sizes, vision tower.
        optimizer: AdamW and its schedule.
        freeze: parameters that are not trained: names or beginnings of names, for example [visual].
        loss_chunk: tokens whose logits exist at a time.
        reply_tokens: longest reply that the test and predictions write.
    """

    def __init__(
        self,
        net: ModelConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen, so sharing it is safe
        freeze: Sequence[str] = (),
        loss_chunk: int = 1024,
        reply_tokens: int = 64,
    ) -> None:
        super().__init__()
        for name, value in (("loss_chunk", loss_chunk), ("reply_tokens", reply_tokens)):
            if value < 1:
                raise ConfigError(f"model.{name}: {value!r} is not a positive number of tokens")
        self.config = net
        self.optimizer_config = optimizer
        self.loss_chunk = loss_chunk
        self.reply_tokens = reply_tokens
        self.net = VisionLanguageModel(net)
        self._freeze(freeze)
        self._scores = ReplyScores()
        self._kind_right: Counter[str] = Counter()
        self._kind_total: Counter[str] = Counter()

    def setup(self, stage: str) -> None:
        """Check that the data module makes what the model takes."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ChatDataModule):
            check_agreement(self.config, datamodule)
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after it has loaded a checkpoint, whose weights it would round

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy over the label tokens of all processes' batches."""
        loss, hits = self.token_loss(batch)
        tokens = hits.numel()
        sums = summed(torch.stack((loss.detach() * tokens, hits.sum().to(loss), loss.new_tensor(tokens))))
        total = sums[2].clamp_min(1)
        self.log("train/loss", sums[0] / total, prog_bar=True, batch_size=1)
        self.log("train/token_accuracy", sums[1] / total, batch_size=1)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        # Processes average their gradients; weighted like this, that is the gradient of the mean over all tokens.
        return loss * (tokens * processes() / total)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of all gradients, before they are clipped."""
        if logs_next(self.trainer):
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            self.log("train/gradient_norm", get_total_norm(gradients), batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Teacher-forced accuracy of tokens and of whole answers."""
        loss, hits = self.token_loss(batch)
        if not hits.numel():
            return
        right = answers_right(batch["labels"], hits)
        tokens, answers = hits.numel(), right.numel()
        self.log("val/loss", loss, prog_bar=True, batch_size=tokens, sync_dist=True)
        self.log("val/token_accuracy", _rate(hits), batch_size=tokens, sync_dist=True)
        self.log("val/exact", _rate(right), prog_bar=True, batch_size=answers, sync_dist=True)
        for kind, good in zip(batch.get("answer_kinds") or (), right.tolist(), strict=False):
            self._kind_right[kind] += int(good)
            self._kind_total[kind] += 1

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the previous pass."""
        self._kind_right.clear()
        self._kind_total.clear()

    def on_validation_epoch_end(self) -> None:
        """Log exact matches by kind of question."""
        right, total = summed_counts(self._kind_right), summed_counts(self._kind_total)
        for kind, answers in sorted(total.items()):
            if kind:  # questions without one are in val/exact alone
                self.log(f"val/{kind}_exact", right[kind] / answers, batch_size=answers, sync_dist=True)

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
        """Refuse a checkpoint of another model, naming the layers that differ."""
        if MODEL_KEY not in checkpoint:
            raise ConfigError(f"the checkpoint does not say which model it is of (no {MODEL_KEY!r} in it)")
        check_same_model(ModelConfig.from_dict(checkpoint[MODEL_KEY]), self.config, "ckpt_path")

    def token_loss(self, batch: Batch) -> TokenLoss:
        """Loss and hits over the label tokens of a batch; no other token reaches the output head."""
        inputs = model_inputs(batch)
        # Batches are padded on the right, where causal mixers never look from a real token: no mask is needed.
        inputs.pop("attention_mask", None)
        hidden = self.net.hidden(**inputs)  # (B, T, D)
        labels: Tensor = batch["labels"]
        predicts = label_positions(labels)
        targets = labels[:, 1:][predicts[:, :-1]]  # (N,)
        return linear_cross_entropy(hidden[predicts], self.net.lm_head_weight, targets, self.loss_chunk)

    def questions(self, batch: Batch) -> list[Question]:
        """The batch as single questions."""
        vision = self.config.vision
        if vision is None:
            return split_questions(batch, None)
        merge = vision.spatial_merge_size**2
        return split_questions(batch, self.config.image_token_id, merge, self.config.video_token_id)

    def replies(self, questions: Sequence[Question]) -> list[str]:
        """Greedy replies as text."""
        if not questions:
            return []
        stop = self._tokenizer().convert_tokens_to_ids("<|im_end|>")
        was_training = self.net.training
        self.net.eval()
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

    def _tokenizer(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, ChatDataModule):
            raise ConfigError("replies need the tokenizer of a ChatDataModule: pass datamodule= to the trainer")
        return datamodule.chat.tokenizer

    def _freeze(self, names: Sequence[str]) -> None:
        for name in names:
            chosen = [p for full, p in self.net.named_parameters() if full == name or full.startswith(f"{name}.")]
            if not chosen:
                roots = ", ".join(child for child, _ in self.net.named_children())
                raise ConfigError(
                    f"model.freeze: no parameter is called {name!r} or lies below it (top level: {roots})"
                )
            for parameter in chosen:
                parameter.requires_grad_(False)

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


def _rate(hits: Tensor) -> Tensor:
    return hits.float().mean() if hits.numel() else torch.zeros((), device=hits.device)
