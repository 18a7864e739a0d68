"""Divergences between two models' next tokens straight from hidden states: few tokens have logits at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridvl.layers.errors import ConfigError

DIVERGENCES = ("forward", "reverse", "jensen_shannon")
"""What `linear_divergence` can measure."""

_ON_CPU, _ELSEWHERE = (128, 2048), (512, 32768)  # tokens and columns; a GPU wants few and large operations


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: str = "forward",
    temperature: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> Tensor:
    """How far a student's next-token distributions are from a teacher's, without ever holding the logits of all tokens.

    With p = softmax(teacher_hidden @ teacher_weight.T / temperature) and q the same of the student, in nats:
    "forward" is KL(p || q), "reverse" is KL(q || p), "jensen_shannon" is (KL(p || m) + KL(q || m)) / 2 with
    m = (p + q) / 2. The mean over the tokens, whatever their number, is multiplied by temperature ** 2, so that the
    size of the gradients does not fall with the temperature (Hinton et al., 2015).

    Logits are computed once, `token_chunk` tokens at a time, and the gradients in the same sweep: both models' logits
    of one such chunk, 2 * token_chunk * V numbers, are the memory it takes beside the gradients themselves. What is
    done with the logits is done in tiles of `vocab_chunk` columns. Products are in the inputs' dtype (autocast's where
    it is on), all else in float32 (float64 for float64 input). The result does not depend on the chunks but for
    rounding. The teacher gets no gradient. Not twice differentiable.

    Args:
        student_hidden: (N, D) hidden states after the final norm.
        student_weight: (V, D) output head.
        teacher_hidden: (N, E) of the same tokens.
        teacher_weight: (V, E); E may differ from D.
        kind: one of `DIVERGENCES`.
        temperature: what the logits of both are divided by.
        token_chunk: tokens that have logits at a time; None: 128 on a CPU, 512 elsewhere.
        vocab_chunk: columns of a tile; None: 2048 on a CPU, where a tile fits in the cache, 32768 elsewhere.

    Returns:
        () float32 (float64 for float64 input); 0, with zero gradients, when there are no tokens.

    Raises:
        ConfigError: another kind, a temperature or chunk that is not positive, sizes that do not fit together.
    """
    check_kind(kind, temperature)
    _check_sizes(student_hidden, student_weight, teacher_hidden, teacher_weight)
    chunks = chunk_sizes(student_hidden.device, token_chunk, vocab_chunk)
    precise = precise_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    tiles = slices(student_weight.shape[0], chunks[1])
    shape = min(chunks[0], student_hidden.shape[0]), student_weight.shape[0]
    memory = teacher_hidden.new_empty(shape, dtype=precise)

    def measured(rows: slice, log_q: Tensor) -> Tensor:
        log_p = memory[: rows.stop - rows.start]  # (C, V)
        log_probabilities(teacher_hidden[rows], teacher_weight, temperature, tiles, log_p)
        value, centre = _measured(MEASURES[kind], log_q, log_p, tiles)
        if centre is not None:
            for tile in tiles:
                log_q[:, tile].addcmul_(log_p[:, tile], centre, value=-1)
        return value

    return swept(student_hidden, student_weight, measured, temperature, chunks, precise)


def check_kind(kind: str, temperature: float) -> None:
    """Raise ConfigError unless both are possible."""
    if kind not in DIVERGENCES:
        raise ConfigError(f"divergence: {kind!r}; expected one of {', '.join(DIVERGENCES)}")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature: {temperature!r}; expected a finite number above 0")


def chunk_sizes(device: torch.device, tokens: int | None, vocabulary: int | None) -> tuple[int, int]:
    """How many tokens have logits at a time and how many columns a tile has: as given, or as suits the device."""
    given = {"token_chunk": tokens, "vocab_chunk": vocabulary}
    for name, chunk in given.items():
        if chunk is not None and chunk < 1:
            raise ConfigError(f"{name}: {chunk!r}; expected a whole number of at least 1")
    usual = _ON_CPU if device.type == "cpu" else _ELSEWHERE
    return usual[0] if tokens is None else tokens, usual[1] if vocabulary is None else vocabulary


def _check_sizes(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ConfigError(
            f"the student's vocabulary has {student_weight.shape[0]} tokens and the teacher's "
            f"{teacher_weight.shape[0]}; expected the same vocabulary"
        )
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ConfigError(
            f"the student has hidden states of {student_hidden.shape[0]} tokens and the teacher of "
            f"{teacher_hidden.shape[0]}; expected the same tokens"
        )
    pairs = ("student", student_hidden, student_weight), ("teacher", teacher_hidden, teacher_weight)
    for owner, hidden, weight in pairs:
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ConfigError(
                f"the {owner}'s hidden states have the shape {tuple(hidden.shape)} and its head {tuple(weight.shape)}; "
                "expected (N, D) and (V, D)"
            )


_Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""From a tile's log q and log p, both (C, columns) and overwritten, to its part of the divergence (C,), and of what
`_LinearDivergence` must centre the gradient by (C,), None where it is centred already.

Left in log q's memory is r and, where it must be centred, q in log p's: the gradient with respect to the student's
logits is r - q * sum(r), the sum over all columns."""


def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor | None]:
    gap = log_p - log_q
    p = log_p.exp_()
    log_q.exp_().sub_(p)
    return gap.mul_(p).sum(-1), None


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor | None]:
    gap = log_q - log_p
    q = torch.exp(log_q, out=log_p)
    part = torch.mul(gap, q, out=log_q).sum(-1)
    return part, part


def _jensen_shannon(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor | None]:
    gap = log_p - log_q
    # log(p / m) = log(2) - log(1 + exp(-gap)), and log(q / m) the same of gap: nothing overflows, p and q may be 0.
    least = gap.abs().neg_().exp_().log1p_().neg_().add_(math.log(2))
    from_teacher = gap.clamp(max=0).add_(least).mul_(log_p.exp_()).sum(-1)
    q = torch.exp(log_q, out=log_p)
    from_student = torch.mul(least.sub_(gap.clamp_(min=0)), q, out=log_q).mul_(0.5).sum(-1)
    return from_teacher * 0.5 + from_student, from_student


MEASURES: dict[str, _Measure] = dict(zip(DIVERGENCES, (_forward_kl, _reverse_kl, _jensen_shannon), strict=True))
"""How `_Measure` is done for each of `DIVERGENCES`."""


Measured = Callable[[slice, Tensor], Tensor]
"""From some of the tokens and the student's log probabilities at those, (C, V), to the sum of their divergences, ().

What is left in the memory of the log probabilities is its gradient with respect to the student's logits."""


def swept(
    hidden: Tensor, weight: Tensor, measured: Measured, temperature: float, chunks: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The mean over N tokens of a divergence of softmax(hidden @ weight.T / temperature), times temperature ** 2.

    hidden (N, D) and weight (V, D) get gradients, computed in the same sweep. `chunks` are tokens that have logits at a
    time and columns of a tile; what is not a product is in `dtype`.
    """
    return _Swept.apply(hidden, weight, _Settings(measured, temperature, *chunks, dtype, torch.is_grad_enabled()))


def precise_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True)
class _Settings:
    measured: Measured
    temperature: float
    token_chunk: int
    vocab_chunk: int
    dtype: torch.dtype
    differentiate: bool


class _Swept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, settings: _Settings) -> Tensor:
        tokens, tiles = hidden.shape[0], slices(weight.shape[0], settings.vocab_chunk)
        want_hidden, want_weight = (settings.differentiate and ctx.needs_input_grad[i] for i in (0, 1))
        grad_hidden = torch.zeros_like(hidden, dtype=settings.dtype) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=settings.dtype) if want_weight else None
        total = hidden.new_zeros((), dtype=settings.dtype)
        memory = hidden.new_empty((min(settings.token_chunk, tokens), weight.shape[0]), dtype=settings.dtype)
        for rows in slices(tokens, settings.token_chunk):
            residual = memory[: rows.stop - rows.start]  # (C, V): log probabilities, then the gradient
            log_probabilities(hidden[rows], weight, settings.temperature, tiles, residual)
            total += settings.measured(rows, residual)
            for tile in tiles if want_hidden or want_weight else ():
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], residual[:, tile].to(weight.dtype), weight[tile])
                if grad_weight is not None:
                    _add_product(grad_weight[tile], residual[:, tile].to(hidden.dtype).T, hidden[rows])
        ctx.scale = settings.temperature / max(tokens, 1)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total * (settings.temperature**2 / max(tokens, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # A second copy of the head's gradient can be more memory than all the logits that exist at a time.
        scaled = Tensor.mul if _graph_is_kept() else Tensor.mul_
        scale = grad * ctx.scale
        to_hidden = None if grad_hidden is None else scaled(grad_hidden, scale).to(ctx.hidden_dtype)
        to_weight = None if grad_weight is None else scaled(grad_weight, scale).to(ctx.weight_dtype)
        return to_hidden, to_weight, None


def slices(size: int, chunk: int) -> list[slice]:
    """0 .. size - 1 in pieces of a chunk, the last one perhaps smaller."""
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def _graph_is_kept() -> bool:
    """Whether, within a backward, there can be another one through the same graph; True where torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else bool(tell())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a product of its own where dtypes allow."""
    if left.dtype == right.dtype == total.dtype and not torch.is_autocast_enabled(total.device.type):
        total.addmm_(left, right)
    else:
        total += left @ right


def log_probabilities(hidden: Tensor, weight: Tensor, temperature: float, tiles: Sequence[slice], out: Tensor) -> None:
    """Write log_softmax(hidden (C, D) @ weight.T / temperature) to out (C, V), tile by tile."""
    largest = out.new_full((out.shape[0], 1), -math.inf)
    total = torch.zeros_like(largest)  # of exp(logit - largest)
    for tile in tiles:
        logits = out[:, tile].copy_(hidden @ weight[tile].T)
        if temperature != 1:
            logits.div_(temperature)
        before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
        total = total * (before - largest).exp_() + (logits - largest).exp_().sum(-1, keepdim=True)
    total.log_()
    for tile in tiles:
        # One after the other: their sum would round off what tells large logits apart.
        out[:, tile].sub_(largest).sub_(total)


def _measured(measure: _Measure, log_q: Tensor, log_p: Tensor, tiles: Sequence[slice]) -> tuple[Tensor, Tensor | None]:
    """The divergence summed over the tokens, and the (C, 1) sums to centre by; log_q and log_p (C, V) are overwritten
    as `_Measure` says."""
    values = log_q.new_zeros(log_q.shape[0])
    centre: Tensor | None = None
    for tile in tiles:
        value, part = measure(log_q[:, tile], log_p[:, tile])
        values += value
        if part is not None:
            centre = part if centre is None else centre + part
    return values.sum(), None if centre is None else centre.unsqueeze(1)
