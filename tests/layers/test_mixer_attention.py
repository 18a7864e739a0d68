"""Full and sliding-window attention against transformers, published arrays and a dense float64 softmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from hybridvl.layers import Sequence
from hybridvl.layers.cache import KeyValueState
from hybridvl.layers.full import FullAttentionConfig, FullAttentionState
from hybridvl.layers.norms import RMSNorm
from hybridvl.layers.ops.rotary import apply_rotary, rotary_table
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.layers.swa import SlidingWindowConfig

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 8}
TINY = Path(__file__).parents[1] / "data" / "infinitevl_tiny_standard"


def tables(batch: int, tokens: int, dim: int, dtype: torch.dtype = torch.float64) -> dict[int, tuple[Tensor, Tensor]]:
    """Rotary tables of text at positions 0, 1, ..."""
    return {dim: rotary_table(torch.arange(tokens).expand(batch, -1), dim, dtype=dtype)}


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_equals_transformers_with_its_weights(window: int | None) -> None:
    torch.manual_seed(0)
    sliding = "full_attention" if window is None else "sliding_attention"
    peer_config = Qwen2_5_VLTextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        use_sliding_window=window is not None,
        sliding_window=window or 1,
        max_window_layers=0,
        layer_types=[sliding],
        attn_implementation="eager",
    )
    peer = Qwen2_5_VLAttention(peer_config, layer_idx=0).double()
    config: AttentionConfig = (
        FullAttentionConfig(**SIZES) if window is None else SlidingWindowConfig(**SIZES, window=window)
    )
    mixer = config.build(32).double()
    mixer.load_state_dict(peer.state_dict())
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    rotary = tables(2, 23, 8)
    distance = torch.arange(23)[:, None] - torch.arange(23)
    hidden = (distance < 0) | (distance >= (window or 23))
    mask = torch.zeros(1, 1, 23, 23, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    expected, _ = peer(x, attention_mask=mask, position_embeddings=rotary[8])
    # The peer's softmax is in float32 whatever the dtype.
    torch.testing.assert_close(mixer(x, Sequence(rotary)), expected, rtol=0, atol=2e-7)


def dense(mixer: nn.Module, config: AttentionConfig, x: Tensor, window: int) -> Tensor:
    """Head by head, query by query."""
    q, k, v = (p(x).unflatten(-1, (-1, config.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = (y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() for y in (q, k))
    q, k = q * mixer.q_norm.weight, k * mixer.k_norm.weight
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(config.heads):
            shared = h // (config.heads // config.kv_heads)
            for t in range(x.shape[1]):
                seen = slice(max(0, t - window + 1), t + 1)
                weights = (k[b, seen, shared] @ q[b, t, h] / config.head_dim**0.5).softmax(0)
                out[b, t, h] = weights @ v[b, seen, shared]
    return mixer.o_proj(out.flatten(2))


def test_norms_biases_and_window_equal_the_definition() -> None:
    torch.manual_seed(1)
    config = SlidingWindowConfig(
        heads=6,
        kv_heads=2,
        head_dim=5,
        window=4,
        qk_norm=True,
        rope=False,
        out_bias=True,
        qkv_bias=False,
        norm_eps=1e-3,
    )
    mixer = config.build(7).double()
    nn.init.normal_(mixer.q_norm.weight)
    nn.init.normal_(mixer.k_norm.weight)
    x = torch.randn(2, 11, 7, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, Sequence()), dense(mixer, config, x, 4), rtol=0, atol=1e-13)


def test_window_counts_the_token_itself() -> None:
    """With a window of 1 the output is the token's own value."""
    mixer = SlidingWindowConfig(heads=2, kv_heads=2, head_dim=4, window=1, rope=False).build(8).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, Sequence()), mixer.o_proj(mixer.v_proj(x)))


@pytest.mark.parametrize("layer", [0, 4])
def test_cache_equals_the_published_model(layer: int) -> None:
    """InfiniteVL keeps W - 1 rotated keys; the ring holds the same and the current one."""
    weights, expected = load_file(TINY / "model.safetensors"), load_file(TINY / "expected.safetensors")
    prefix = f"model.layers.{layer}."
    config = SlidingWindowConfig(heads=4, kv_heads=2, head_dim=16, window=16)
    mixer = config.build(64)
    own = f"{prefix}self_attn."
    mixer.load_state_dict({name.removeprefix(own): x for name, x in weights.items() if name.startswith(own)})
    norm = RMSNorm(64, 1e-6)
    norm.load_state_dict({"weight": weights[f"{prefix}input_layernorm.weight"]})
    state = mixer.init_state(1)
    rotary = {16: rotary_table(torch.arange(80)[None], 16, theta=1e6)}
    with torch.no_grad():
        mixer(norm(expected["long.hidden_states"][layer]), Sequence(rotary), state)
    order = state.positions()[0].argsort()
    for tensor, name in ((state.k, "keys"), (state.v, "values")):
        found = tensor[:, order[1:]].transpose(1, 2)
        published = expected[f"long.layer{layer}.{name}"]
        assert (found - published).abs().max() <= 1e-4 * published.abs().max()


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(-1, -1, 9, -1, -1)
    cos, sin = rotary_table(torch.arange(9)[None], 16, theta=100.0, dtype=torch.float64)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    scores = torch.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0])[0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    torch.testing.assert_close(q.norm(dim=-1), q[:, :1].norm(dim=-1).expand(-1, 9, -1))
    angle = torch.tensor(3 * 100.0 ** (-2 / 16), dtype=torch.float64)
    torch.testing.assert_close(cos[0, 3, [1, 9]], angle.cos().expand(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotation_and_its_gradient_equal_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, upstream = torch.randn(2, 2, 7, 3, 16).to(dtype)
    cos, sin = rotary_table(torch.randint(0, 1000, (2, 7)), 16, dtype=torch.float64)
    angle = torch.complex(cos[..., :8], sin[..., :8]).unsqueeze(2)

    def turned(y: Tensor, by: Tensor) -> Tensor:
        z = torch.complex(*y.double().chunk(2, dim=-1)) * by
        return torch.cat((z.real, z.imag), dim=-1)

    x.requires_grad_()
    table = torch.promote_types(dtype, torch.float32)
    found = apply_rotary(x, cos.to(table), sin.to(table))
    (gradient,) = torch.autograd.grad(found, x, upstream)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == gradient.dtype == dtype
    torch.testing.assert_close(found.double(), turned(x.detach(), angle), rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient.double(), turned(upstream, angle.conj()), rtol=0, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(apply_rotary(x, cos.to(table), sin.to(table)), found, rtol=0, atol=0)


def test_rotary_tables_are_asked_for_by_head_dim() -> None:
    mixer = FullAttentionConfig(**SIZES).build(16)
    with pytest.raises(ValueError, match=r"tables for head dims \[16\], attention needs 8"):
        mixer(torch.randn(1, 4, 16), Sequence(tables(1, 4, 16, torch.float32)))


def cache(slots: int, kind: type[KeyValueState] = KeyValueState, rows: int = 2) -> KeyValueState:
    zeros = torch.zeros(rows, slots, 1, 1)
    return kind(zeros, zeros.clone(), torch.zeros(rows, dtype=torch.int64))


def test_ring_keeps_the_last_tokens_of_ragged_chunks() -> None:
    """Against a plain list for each row; the keys are the tokens' numbers."""
    torch.manual_seed(3)
    state, rows = cache(5), [[], []]
    for tokens in (1, 3, 12, 4, 5, 1, 1, 7):
        new = torch.randn(2, tokens, 1, 1)
        counts = torch.randint(0, tokens + 1, (2,))
        state.append(new, -new, counts)
        for row, seen in enumerate(rows):
            seen.extend(new[row, : counts[row], 0, 0].tolist())
            held = {
                p: x
                for p, x in zip(state.positions()[row].tolist(), state.k[row, :, 0, 0].tolist(), strict=True)
                if p >= 0
            }
            assert held == dict(list(enumerate(seen))[-5:])
            assert state.length[row] == len(seen)
    torch.testing.assert_close(state.v, -state.k)


def test_full_cache_grows_by_blocks_and_shrinks_on_reset() -> None:
    state = cache(64, FullAttentionState)
    used = [state.append(torch.ones(2, n, 1, 1), torch.ones(2, n, 1, 1), torch.tensor([n, 1])) for n in (64, 1, 130)]
    assert used == [64, 65, 195]
    assert state.k.shape[1] == 256
    assert state.k.sum(dim=(1, 2, 3)).tolist() == [195, 3]
    fresh = cache(64, FullAttentionState)
    fresh.load_state_dict(state.state_dict())
    assert fresh.k.data_ptr() != state.k.data_ptr()
    torch.testing.assert_close(fresh.k, state.k)
    state.reset()
    assert state.k.shape[1] == 64
    assert not state.k.any()
    assert not state.length.any()
    assert fresh.length.tolist() == [195, 3]
