"""One token of the gated delta rule against a matrix state that is updated in place."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FORGETS_ALL = -40.0  # a log decay below counts as -inf: the denormal floats that it would soon lead to are slow
_PART = 16  # rows summed one after the other
_ROW_SUMS_FROM = 1 << 18  # elements of a state from which weighted sums of rows beat products with two rows


def delta_rule_step(pair: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """S = e^g S; S = S + k (beta (v - k^T S))^T; o = S^T q, for each head: o (B, H, V).

    pair: (B, Hk, 2, K), the key k and the scaled query q; head h uses pair h // (H / Hk). v: (B, H, V). g, beta:
    (B, H). state: (B, H, K, V), contiguous, updated in place. All in one dtype, float32 or float64; no autograd.
    """
    rows, heads, key_dim, value_dim = state.shape
    if pair.shape[1] != heads:
        pair = pair.repeat_interleave(heads // pair.shape[1], dim=1)
    pair = pair.reshape(-1, 2, key_dim)  # (B * H, 2, K)
    key, query = pair.unbind(1)
    v, rate, matrices = v.reshape(-1, value_dim), beta.reshape(-1, 1), state.view(-1, key_dim, value_dim)
    read_rows = _reads_rows(state)
    # The first pass streams the state from memory, and the later ones find it in a cache: so the decay comes first.
    matrices.mul_(torch.threshold(g, FORGETS_ALL, -torch.inf).exp_().view(-1, 1, 1))
    before = _weighted_rows(pair, matrices) if read_rows else torch.bmm(pair, matrices)  # (B * H, 2, V)
    change = torch.addcmul(v * rate, before[:, 0], rate, value=-1)
    if read_rows:
        matrices.addcmul_(key.unsqueeze(2), change.unsqueeze(1))
    else:
        torch.baddbmm(matrices, key.unsqueeze(2), change.unsqueeze(1), out=matrices)
    # S^T q of the new S, without another look at it.
    return torch.addcmul(before[:, 1], (key * query).sum(1, keepdim=True), change).view(rows, heads, value_dim)


def delta_rule_step_reference(pair: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """The definition; arguments and result of `delta_rule_step`."""
    pair = pair.repeat_interleave(state.shape[1] // pair.shape[1], dim=1)
    key, query = pair[:, :, :1], pair[:, :, 1:]  # (B, H, 1, K)
    decayed = state * g.exp()[..., None, None]
    change = beta[..., None, None] * (v.unsqueeze(2) - key @ decayed)  # (B, H, 1, V)
    state.copy_(decayed + key.mT @ change)
    return (query @ state).squeeze(2)


def _reads_rows(state: Tensor) -> bool:
    """Whether the products with this state are sums of its rows: a product of a large matrix with two rows copies the
    matrix first. (FlopCounterMode counts products only.)"""
    plain = type(state) is Tensor and not torch.compiler.is_compiling()
    return plain and state.device.type == "cpu" and state.dtype == torch.float32 and state.numel() >= _ROW_SUMS_FROM


def _weighted_rows(pair: Tensor, matrices: Tensor) -> Tensor:
    """pair (n, 2, K) times matrices (n, K, V): (n, 2, V), summed in parts, which is the more exact order."""
    count, key_dim, value_dim = matrices.shape
    part = _PART if key_dim % _PART == 0 else key_dim
    index, offsets = _every_row_twice(count * key_dim // part, part)
    weights = pair.view(count, 2, -1, part).transpose(1, 2).reshape(-1)
    sums = torch.embedding_bag(matrices.view(-1, value_dim), index, offsets, mode=0, per_sample_weights=weights)[0]
    return sums.view(count, -1, 2, value_dim).sum(1)


@lru_cache(maxsize=8)
def _every_row_twice(parts: int, rows: int) -> tuple[Tensor, Tensor]:
    """The rows of each part in a stack of them, twice: int32 (parts * 2 * rows,), and where each list begins."""
    index = torch.arange(parts * rows, dtype=torch.int32).view(parts, 1, rows).expand(-1, 2, -1)
    return index.reshape(-1), torch.arange(0, 2 * parts * rows, rows, dtype=torch.int32)
