"""One token of a Gated DeltaNet layer between its projections, with states that are updated in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.ops.backend import resolve_backend
from hybridvl.layers.ops.checks import check_floating, check_shape, full_precision, internal_dtype
from hybridvl.layers.ops.conv_step import causal_conv_step, causal_conv_step_reference
from hybridvl.layers.ops.delta_step import delta_rule_step, delta_rule_step_reference
from hybridvl.layers.ops.gated_delta_rule import L2_EPS


@torch.no_grad()
def gated_delta_net_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    a: Tensor,
    b: Tensor,
    recurrent: Tensor,
    conv_q: Tensor,
    conv_k: Tensor,
    conv_v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float = 1e-5,
    negative_eigenvalues: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolutions and SiLU, unit q and k, decay and rate, delta rule, gated norm: y (B, H * V) of one token a row.

    q, k: (B, Hk * K), v: (B, H * V), gate: (B, H * V) or None, a, b: (B, H): projections of the token; head h uses
    query and key head h // (H / Hk). recurrent: (B, H, K, V) in float32 (float64 for float64); conv_q, conv_k, conv_v:
    (B, channels, W), the last W inputs, oldest first. All four states are updated IN PLACE, at their addresses.
    q_weight, k_weight, v_weight: (channels, W). A_log, dt_bias: (H,). norm_weight: (V,).
    S = e^g S; S = S + k (beta (v - k^T S))^T; o = K^-0.5 S^T q with g = -e^A_log softplus(a + dt_bias) and
    beta = sigmoid(b), twice that with negative_eigenvalues; y = rmsnorm(o) norm_weight silu(gate).
    No autograd. Computes in float32 (float64 for float64) and returns y in v's dtype. Nothing is read on the host, and
    nothing in the shapes depends on data. Backends: "reference", "torch", "triton" (CUDA).
    Raises ConfigError naming a misshapen argument.
    """
    _check(q, k, v, gate, a, b, recurrent, (conv_q, conv_k, conv_v), (q_weight, k_weight, v_weight))
    heads, key_dim, value_dim = recurrent.shape[1:]
    chosen = resolve_backend("gated_delta_net_step", backend, v.device, v.dtype, key_dim, value_dim, 1)
    if chosen == "triton":
        from hybridvl.layers.ops.kernels import triton_gdn_step

        return triton_gdn_step.gated_delta_net_step(
            q, k, v, gate, a, b, recurrent, (conv_q, conv_k, conv_v), (q_weight, k_weight, v_weight), A_log, dt_bias,
            norm_weight, norm_eps, negative_eigenvalues, L2_EPS
        )  # fmt: skip
    plain = chosen == "reference"
    convolve = causal_conv_step_reference if plain else causal_conv_step
    rule = delta_rule_step_reference if plain else delta_rule_step
    wide = internal_dtype(v, recurrent)
    key, query = convolve(k, conv_k, k_weight), convolve(q, conv_q, q_weight)
    pair = torch.stack((key.unflatten(-1, (-1, key_dim)), query.unflatten(-1, (-1, key_dim))), dim=2)  # (B, Hk, 2, K)
    pair = pair * (pair.square().sum(-1, keepdim=True) + L2_EPS).rsqrt_()
    g = F.softplus(a.to(wide) + dt_bias.to(wide)) * -A_log.to(wide).exp()  # (B, H)
    beta = b.to(wide).sigmoid()
    with full_precision(v.device):
        o = rule(
            pair,
            convolve(v, conv_v, v_weight).unflatten(-1, (heads, value_dim)),
            g,
            2 * beta if negative_eigenvalues else beta,
            recurrent,
        )
    # The norm divides the scale of q out again: o stays K^0.5 times too large, and so does the root of epsilon.
    o = F.rms_norm(o, (value_dim,), norm_weight.to(wide), norm_eps * key_dim)
    if gate is not None:
        o = o * F.silu(gate.to(wide)).view_as(o)
    return o.flatten(1).to(v.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    a: Tensor,
    b: Tensor,
    recurrent: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
) -> None:
    op = "gated_delta_net_step"
    check_floating(op, {"q": q, "k": k, "v": v, "gate": gate, "a": a, "b": b, "recurrent": recurrent})
    check_shape(op, "recurrent", recurrent, "(B, H, K, V)", (None, None, None, None))
    batch, heads, key_dim, value_dim = recurrent.shape
    check_shape(op, "v", v, "(B, H * V)", (batch, heads * value_dim))
    check_shape(op, "q", q, "(B, Hk * K)", (batch, None))
    check_shape(op, "k", k, "(B, Hk * K)", tuple(q.shape))
    key_heads = q.shape[1] // key_dim
    if key_heads == 0 or q.shape[1] % key_dim or heads % key_heads:
        raise ConfigError(
            f"{op}: q has {q.shape[1]} channels, expected K = {key_dim} times a divisor of the {heads} value heads"
        )
    if gate is not None:
        check_shape(op, "gate", gate, "(B, H * V)", tuple(v.shape))
    check_shape(op, "a", a, "(B, H)", (batch, heads))
    check_shape(op, "b", b, "(B, H)", (batch, heads))
    for name, x, state, weight in zip("qkv", (q, k, v), states, weights, strict=True):
        check_shape(op, f"{name}_weight", weight, "(channels, W)", (x.shape[1], None))
        check_shape(op, f"conv_{name}", state, "(B, channels, W)", (*x.shape, weight.shape[1]))
