"""Distillation of next tokens: the student learns to give the distributions that the teacher gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.answers import answers_right
from hybridvl.training.base import (
    Batch,
    TrainingModule,
    causal_inputs,
    check_positive,
    embedded,
    real_positions,
)
from hybridvl.training.losses.cross_entropy import TokenLoss, label_positions, linear_cross_entropy
from hybridvl.training.losses.divergences import DIVERGENCES, linear_divergence
from hybridvl.training.losses.top_divergence import TopTokens, top_divergence, top_tokens
from hybridvl.training.optim import OptimizerConfig
from hybridvl.training.processes.sharding import is_sharded, unsharded
from hybridvl.training.processes.sums import processes, summed
from hybridvl.training.student import StudentConfig, build_pair, build_student, load_teacher
from hybridvl.training.teacher_logits import TeacherLogitsConfig, open_teacher_logits, sample_keys

TOKENS = ("all", "answers")

_LABEL_CHUNK = 512


class LogitLoss(NamedTuple):
    """What a batch gives on this process.

    divergence: () mean over its tokens, times the squared temperature, in nats.
    tokens: how many those are.
    labels: cross-entropy and hits over the label tokens; None where it was not asked for.
    """

    divergence: Tensor
    tokens: int
    labels: TokenLoss | None


class LogitDistillation(TrainingModule):
    """Trains a student to predict what its teacher predicts, on the same tokens.

    The loss is (1 - w) * divergence + w * cross-entropy, each the mean over its tokens, whatever their number, padding
    left out; no logits of more than a chunk of tokens exist (`hybridvl.training.losses.divergences`). Embeddings and
    visual features that both models share are computed once.

    Logs train/loss, train/divergence, train/lr, train/gradient_norm and, where w is not 0, train/cross_entropy;
    val/loss, val/divergence, val/cross_entropy, val/token_accuracy, val/exact (whole answers, teacher-forced); and with
    a test the scores of the student's replies.

    Args:
        student: teacher and student.
        divergence: "forward" (KL of the student from the teacher), "reverse" (of the teacher from the student) or
            "jensen_shannon".
        temperature: what the logits of both are divided by; the divergence is multiplied by its square.
        cross_entropy: w, the share of the cross-entropy on label tokens.
        tokens: where the distributions are compared: at "all" tokens that are not padding, or at those that predict
            "answers".
        optimizer: AdamW and its schedule.
        train_only: what is trained, see `hybridvl.training.freezing`: the mixers that differ from the teacher's unless
            said otherwise; null trains everything that is not frozen.
        freeze: what is not trained of that.
        token_chunk: tokens whose logits exist at a time, the teacher's and the student's; null: as suits the device.
        vocab_chunk: columns of the logits that are worked on at a time; null: as suits the device.
        reply_tokens: longest reply that the test and predictions write.
        teacher_logits: where the teacher's most likely tokens are kept, and how many of them. The divergence is then
            over these and all others as one, see `hybridvl.training.losses.top_divergence`. Samples that were seen
            before, by any run that shares the folder, need no teacher, and it is not loaded before a sample needs it
            (but in the first run of all). Logs train/cached, the share of samples that were found. null: nothing is
            kept.
    """

    def __init__(
        self,
        student: StudentConfig,
        divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward",
        temperature: float = 2.0,
        cross_entropy: float = 0.0,
        tokens: Literal["all", "answers"] = "all",
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen, so sharing it is safe
        train_only: Sequence[str] | None = ("mixers:new",),
        freeze: Sequence[str] = (),
        token_chunk: int | None = None,
        vocab_chunk: int | None = None,
        reply_tokens: int = 64,
        teacher_logits: TeacherLogitsConfig | None = None,
    ) -> None:
        for name, value, accepted in (("divergence", divergence, DIVERGENCES), ("tokens", tokens, TOKENS)):
            if value not in accepted:
                raise ConfigError(f"model.{name}: {value!r}; expected one of {', '.join(accepted)}")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"model.temperature: {temperature!r}; expected a finite number above 0")
        if not 0 <= cross_entropy <= 1:
            raise ConfigError(f"model.cross_entropy: {cross_entropy!r}; expected a share from 0 to 1")
        for name, chunk in (("token_chunk", token_chunk), ("vocab_chunk", vocab_chunk)):
            if chunk is not None:
                check_positive(name, chunk)
        kept = None
        if teacher_logits is not None:
            kept = open_teacher_logits(teacher_logits, student.teacher, temperature, tokens)
        # The seed of the run, whatever has been drawn before; processes with several get the first one's weights.
        seed = torch.initial_seed() % 2**63
        if kept is not None and len(kept):
            net, _ = build_student(student, seed, train_only, freeze)
            super().__init__(net.float(), optimizer, reply_tokens)
        else:
            pair = build_pair(student, seed, train_only, freeze)
            super().__init__(pair.student, optimizer, reply_tokens, pair.teacher)
        self.student = student
        self.kept = kept
        self.inherit = student.inherit
        self.divergence = divergence
        self.temperature = temperature
        self.cross_entropy = cross_entropy
        self.tokens = tokens
        self._same_embeddings = bool(self._teachers) and _same_embeddings(self.net, self.teacher)
        self.token_chunk = token_chunk
        self.vocab_chunk = vocab_chunk
        self._sums: list[Tensor] = []  # of each batch of a validation pass: sums and counts (2, 4)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mixture of both means over the tokens of all processes' batches."""
        divergence, tokens, labels = self.logit_loss(batch, labels=self.cross_entropy > 0)
        entropy, targets = (torch.zeros_like(divergence), 0) if labels is None else (labels.loss, labels.hits.numel())
        counts = divergence.new_tensor((tokens, targets))
        sums = summed(torch.cat((counts, torch.stack((divergence, entropy)).detach() * counts)))
        totals = sums[:2].clamp_min(1)
        means = sums[2:] / totals
        self.log("train/loss", self._mixture(means[0], means[1]), prog_bar=True, batch_size=1)
        self.log("train/divergence", means[0], batch_size=1)
        if labels is not None:
            self.log("train/cross_entropy", means[1], batch_size=1)
        self.log_lr()
        # Processes average their gradients; weighted like this, those are of the means over all tokens.
        weights = counts * processes() / totals
        return self._mixture(divergence * weights[0], entropy * weights[1])

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the previous pass."""
        self._sums.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up both parts of the loss, and what is right of the answers, teacher-forced."""
        divergence, tokens, labels = self.logit_loss(batch, labels=True)
        assert labels is not None
        hits, right = labels.hits, answers_right(batch["labels"], labels.hits)
        counts = divergence.new_tensor((tokens, hits.numel(), hits.numel(), right.numel()))
        means = torch.stack((divergence, labels.loss.to(divergence)))
        sums = torch.cat((means * counts[:2], torch.stack((hits.sum(), right.sum())).to(means)))
        self._sums.append(torch.stack((sums, counts)).double())

    def on_validation_epoch_end(self) -> None:
        """Log the means over everything that was validated."""
        none = torch.zeros(2, 4, dtype=torch.float64, device=self.device)
        sums, counts = summed(torch.stack([none, *self._sums]).sum(0))
        divergence, entropy, accuracy, exact = sums / counts.clamp_min(1)
        self.log("val/loss", self._mixture(divergence, entropy), prog_bar=True, sync_dist=True)
        self.log("val/divergence", divergence, sync_dist=True)
        if counts[1]:  # there were answers
            self.log("val/cross_entropy", entropy, sync_dist=True)
            self.log("val/token_accuracy", accuracy, sync_dist=True)
            self.log("val/exact", exact, prog_bar=True, sync_dist=True)

    def compared_settings(self) -> dict[str, Any]:
        """See `TrainingModule.compared_settings`."""
        names = ("inherit", "divergence", "temperature", "cross_entropy")
        return {"stage": "logits", **{name: getattr(self, name) for name in names}}

    def logit_loss(self, batch: Batch, labels: bool) -> LogitLoss:
        """The divergence over a batch's tokens and, if asked for, the cross-entropy over its labels."""
        predicts = label_positions(batch["labels"])
        chosen = predicts if self.tokens == "answers" else real_positions(batch)
        how = self.divergence, self.temperature, self.token_chunk, self.vocab_chunk
        if self.kept is not None:
            hidden, known = self._known(batch, chosen)
            divergence = top_divergence(hidden[chosen], self.net.lm_head_weight, known, *how)
        else:
            with unsharded(self.teacher):
                hidden, taught = self.hidden_states(batch)
                heads = self.net.lm_head_weight, self.teacher.lm_head_weight
                divergence = linear_divergence(hidden[chosen], heads[0], taught[chosen], heads[1], *how)
        found = None
        if labels:
            targets = batch["labels"][:, 1:][predicts[:, :-1]]
            chunk = self.token_chunk or _LABEL_CHUNK
            found = linear_cross_entropy(hidden[predicts], self.net.lm_head_weight, targets, chunk)
        return LogitLoss(divergence, int(chosen.sum()), found)

    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T, D) of the student and, without a graph, of the teacher."""
        inputs = causal_inputs(batch)
        if not self._same_embeddings:
            with torch.no_grad():
                taught = self.teacher.hidden(**inputs)
            return self.net.hidden(**inputs), taught
        embeds, positions = embedded(self.net, inputs)
        packed = inputs.get("cu_seqlens")
        with torch.no_grad():
            taught = self.teacher.run_decoder(embeds, positions, cu_seqlens=packed)
        return self.net.run_decoder(embeds, positions, cu_seqlens=packed), taught

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what has been kept of the teacher too."""
        super().on_save_checkpoint(checkpoint)
        self._flush()

    def teardown(self, stage: str) -> None:
        """Write what has been kept of the teacher."""
        self._flush()

    def _flush(self) -> None:
        if self.kept is not None:
            self.kept.flush()

    def _known(self, batch: Batch, chosen: Tensor) -> tuple[Tensor, TopTokens]:
        """(B, T, D) of the student, and what is known of the teacher at the chosen tokens.

        The teacher runs if a sample is new, with shards if one is on any process.
        """
        assert self.kept is not None
        keys = sample_keys(batch, self.config, self.tokens)
        known = [self.kept.find(key, tokens) for key, tokens in keys]
        new = sum(entry is None for entry in known)
        if self.training:
            self.log("train/cached", 1 - new / len(known), batch_size=1)
        if self.training and is_sharded(self.net):
            new = int(summed(torch.tensor(new, device=chosen.device)))
        if new:
            self._load_teacher()
            with unsharded(self.teacher):
                hidden, taught = self.hidden_states(batch)
                how = self.kept.top_k, self.temperature, self.token_chunk, self.vocab_chunk
                made = top_tokens(taught[chosen], self.teacher.lm_head_weight, *how)
            parts = made.split([tokens for _, tokens in keys])
            for (key, _), part in zip(keys, parts, strict=True):
                self.kept.add(key, part)
        else:
            hidden, parts = self.net.hidden(**causal_inputs(batch)), [entry for entry in known if entry is not None]
        return hidden, TopTokens.joined(parts, chosen.device)

    def _load_teacher(self) -> None:
        """Have a teacher from here on."""
        if self._teachers:
            return
        if is_sharded(self.net):
            raise ConfigError(
                "model.teacher_logits.folder: holds only some of the samples, and no teacher can be loaded later where "
                "weights are sharded; expected all of them, or an empty folder"
            )
        self._teachers.append(load_teacher(self.student, self.net))
        self._same_embeddings = _same_embeddings(self.net, self.teacher)

    def _mixture(self, divergence: Tensor, entropy: Tensor) -> Tensor:
        return (1 - self.cross_entropy) * divergence + self.cross_entropy * entropy


def _same_embeddings(net: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    """Whether both models make the same embeddings, of the same frozen parameters, of tokens and images."""
    roots = ("visual.", "decoder.embed_tokens.")
    own, theirs = ([p for name, p in model.named_parameters() if name.startswith(roots)] for model in (net, teacher))
    return len(own) == len(theirs) and all(p is q and not p.requires_grad for p, q in zip(own, theirs, strict=True))
