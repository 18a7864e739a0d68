"""Supervised tuning: cross-entropy on answer tokens, teacher-forced validation, scored generation as the test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridvl.checkpoints import load_weights
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.answers import answers_right
from hybridvl.training.base import Batch, TrainingModule, causal_inputs, check_positive
from hybridvl.training.freezing import choose_trained
from hybridvl.training.lora import Adapters, LoraSettings, refuse_adapters
from hybridvl.training.losses.cross_entropy import TokenLoss, label_positions, linear_cross_entropy
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.processes.sums import Means, processes, summed, summed_counts


class SupervisedTuning(TrainingModule):
    """Trains a vision-language model on conversations.

    Logs train/loss, train/token_accuracy, train/lr, train/gradient_norm; val/loss, val/token_accuracy, val/exact (whole
    answers, teacher-forced), val/<kind>_exact; test/exact, test/digit_accuracy, test/<kind>_exact and
    test/<kind>_digit_accuracy from greedily generated replies.

    Args:
        net: the model: pattern, mixers, sizes, vision tower. A recipe with `source` may leave it out.
        optimizer: AdamW and its schedule.
        freeze: what is not trained: parts such as vision, head, mixers:full or layers:0-3, or beginnings of names of
            parameters; see `hybridvl.training.freezing`.
        loss_chunk: tokens whose logits exist at a time.
        reply_tokens: longest reply that the test and predictions write.
        source: folder of a model of the same layers and sizes whose weights training starts from; null: fresh ones.
        train_only: what is trained, in the same words as `freeze`; null trains everything that is not frozen, or with
            `lora` nothing but the adapters.
        lora: adapters that are trained instead of the weights of `source`; null: none.
    """

    def __init__(
        self,
        net: ModelConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen, so sharing it is safe
        freeze: Sequence[str] = (),
        loss_chunk: int = 1024,
        reply_tokens: int = 64,
        source: str | None = None,
        train_only: Sequence[str] | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        check_positive("loss_chunk", loss_chunk)
        if lora is not None and source is None:
            raise ConfigError("model.source: null; model.lora needs a folder with the weights that it adapts")
        model = VisionLanguageModel(net)
        if source is not None:
            with within("model.source"):
                load_weights(model, source)
        choose_trained(model, train_only if lora is None else train_only or (), freeze)
        self.adapters = None if lora is None or source is None else Adapters(model, lora, source)
        super().__init__(model, optimizer, reply_tokens)
        if self.adapters is not None:
            self.adapters.leave_out_frozen(self)
        self.loss_chunk = loss_chunk
        self._means = Means(("val/loss", "val/token_accuracy", "val/exact"))
        self._kind_right: Counter[str] = Counter()
        self._kind_total: Counter[str] = Counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy over the label tokens of all processes' batches."""
        loss, hits = self.token_loss(batch)
        tokens = hits.numel()
        sums = summed(torch.stack((loss.detach() * tokens, hits.sum().to(loss), loss.new_tensor(tokens))))
        total = sums[2].clamp_min(1)
        self.log("train/loss", sums[0] / total, prog_bar=True, batch_size=1)
        self.log("train/token_accuracy", sums[1] / total, batch_size=1)
        self.log_lr()
        # Processes average their gradients; weighted like this, that is the gradient of the mean over all tokens.
        return loss * (tokens * processes() / total)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Teacher-forced accuracy of tokens and of whole answers."""
        loss, hits = self.token_loss(batch)
        if not hits.numel():
            return
        right = answers_right(batch["labels"], hits)
        tokens, answers = hits.numel(), right.numel()
        rates = (loss, hits.to(loss).mean(), right.to(loss).mean())
        self._means.add(torch.stack(rates), (tokens, tokens, answers))
        for kind, good in zip(batch.get("answer_kinds") or (), right.tolist(), strict=False):
            self._kind_right[kind] += int(good)
            self._kind_total[kind] += 1

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the previous pass."""
        self._means.clear()
        self._kind_right.clear()
        self._kind_total.clear()

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens and answers, and exact matches by kind of question."""
        for name, mean in self._means.over_all_processes(self.device).items():
            self.log(name, mean, prog_bar=name != "val/token_accuracy", sync_dist=True)
        right, total = summed_counts(self._kind_right), summed_counts(self._kind_total)
        for kind, answers in sorted(total.items()):
            if kind:  # questions without one are in val/exact alone
                self.log(f"val/{kind}_exact", right[kind] / answers, batch_size=answers, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which adapters it holds, too."""
        super().on_save_checkpoint(checkpoint)
        if self.adapters is not None:
            self.adapters.record(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other adapters, too."""
        super().on_load_checkpoint(checkpoint)
        if self.adapters is not None:
            self.adapters.check(checkpoint)
        else:
            refuse_adapters(checkpoint)

    def compared_settings(self) -> dict[str, Any]:
        """See `TrainingModule.compared_settings`."""
        return {"stage": "supervised"}

    def token_loss(self, batch: Batch) -> TokenLoss:
        """Loss and hits over the label tokens of a batch; no other token reaches the output head."""
        hidden = self.net.hidden(**causal_inputs(batch))  # (B, T, D)
        labels: Tensor = batch["labels"]
        predicts = label_positions(labels)
        targets = labels[:, 1:][predicts[:, :-1]]  # (N,)
        return linear_cross_entropy(hidden[predicts], self.net.lm_head_weight, targets, self.loss_chunk)
