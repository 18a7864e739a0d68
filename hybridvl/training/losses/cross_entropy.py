"""Cross-entropy straight from hidden states: the head's logits exist one chunk of tokens at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.data.chat import IGNORED


class TokenLoss(NamedTuple):
    """What `linear_cross_entropy` measures over the N label tokens.

    loss: () mean negative log likelihood in nats, float32 (float64 for float64 input); 0 when there are no tokens.
    hits: (N,) bool, True where the most likely token is the label.
    """

    loss: Tensor
    hits: Tensor


def label_positions(labels: Tensor) -> Tensor:
    """(B, T) bool: where the *next* token is a label, that is, the hidden states that predict one.

    labels (B, T) int64 hold at t the target for position t itself; -100 is ignored, and so is position 0, which
    nothing predicts.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return predicts


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> TokenLoss:
    """Mean cross-entropy of softmax(hidden @ weight.T) against labels, without ever holding all logits.

    hidden (N, D), weight (V, D) of any float dtype, labels (N,) int64 in [0, V); `chunk` tokens at a time have their
    (chunk, V) logits in float32 (float64 for float64 input). Gradients of hidden and weight are computed in the same
    sweep, so the logits are formed once; they are exact, not approximations. Not twice differentiable.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected a positive number of tokens")
    loss, hits = _LinearCrossEntropy.apply(hidden, weight, labels, chunk, torch.is_grad_enabled())
    return TokenLoss(loss, hits)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, differentiate: bool
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        tokens = labels.numel()
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        hits = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        want_hidden, want_weight = (differentiate and ctx.needs_input_grad[i] for i in (0, 1))
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if want_weight else None
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            target = labels[rows, None]  # (C, 1)
            logits = (hidden[rows] @ weight.T).to(precise)  # (C, V)
            hits[rows] = logits.argmax(-1, keepdim=True).eq(target).squeeze(-1)
            picked = logits.gather(-1, target)
            norm = logits.logsumexp(-1, keepdim=True)
            loss += (norm - picked).sum()
            if not (want_hidden or want_weight):
                continue
            residual = logits.sub_(norm).exp_()  # softmax, in the logits' memory
            residual.scatter_add_(-1, target, torch.full_like(picked, -1.0))
            residual.div_(tokens)
            if grad_hidden is not None:
                grad_hidden[rows] = residual.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += residual.to(hidden.dtype).T @ hidden[rows]
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(hits)
        return loss / max(tokens, 1), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        to_hidden = None if grad_hidden is None else (grad_hidden * grad_loss).to(ctx.hidden_dtype)
        to_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype)
        return to_hidden, to_weight, None, None, None
