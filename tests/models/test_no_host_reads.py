"""Decoding on a device waits for nothing: a CUDA graph can hold a step. Tensors of the meta device have no values, so
whatever reads one fails; a copy from the host shows as a tensor on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.vlm import VisionLanguageModel

MIXERS = {
    "swa": {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 64},
    "gdn": {"heads": 2, "head_dim": 16},
    "mamba2": {"head_dim": 16, "state_dim": 16},
}


class OnTheDeviceAlone(TorchDispatchMode):
    """Refuses operations on tensors of the host, but for numbers that PyTorch keeps there as constants, and for one."""

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self.known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim() and leaf is not self.known:
                raise AssertionError(f"{func} has a tensor on the host, {tuple(leaf.shape)}")
        return result


def decode(model: VisionLanguageModel, state: Any, token: Tensor, tokens: int) -> None:
    embeds = model.decoder.embed_tokens(token.expand(1, tokens))
    hidden = model.run_decoder(embeds, state.next_position.expand(3, 1, tokens), state=state)
    token.copy_(F.linear(hidden[:, -1:], model.lm_head_weight).argmax(-1))


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_nothing_is_read_while_decoding(tokens: int) -> None:
    config = ModelConfig(pattern="swa gdn mamba2", mixers=MIXERS, width=64, mlp_width=64, vocab_size=50)
    with torch.device("meta"), torch.no_grad():
        model = VisionLanguageModel(config).to(torch.bfloat16).eval()
        state, token = model.init_state(1), torch.empty(1, 1, dtype=torch.int64)
        with OnTheDeviceAlone():
            decode(model, state, token, tokens)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_read_while_frames_are_shown(masked: bool) -> None:
    """Of two streams with windows that may be full or not, their rows of one length or not."""
    vision = VisionConfig(depth=2, width=32, heads=2, mlp_width=64, full_attention_blocks=(1,))
    config = ModelConfig(pattern="swa gdn (swa+mamba2)", mixers=MIXERS, width=64, mlp_width=64, vision=vision)
    grids = torch.tensor([[1, 10, 12], [1, 4, 6]])  # windows of several sizes, some of them cut off
    with torch.device("meta"), torch.no_grad():
        model = VisionLanguageModel(config).to(torch.bfloat16).eval()
        state, positions = model.init_state(2), torch.empty(3, 2, 30, dtype=torch.int64)
        mask = torch.empty(2, 30, dtype=torch.bool) if masked else None
        pixels = torch.empty(144, vision.patch_dim)
        model.encode_images(pixels, grids)  # makes the plan of the patches, which is kept
        with OnTheDeviceAlone(grids):
            features = model.encode_images(pixels, grids)
            model.run_decoder(features[:30].expand(2, -1, -1), positions, mask, state=state)


def test_the_check_sees_reads_and_copies() -> None:
    with torch.device("meta"), OnTheDeviceAlone():
        x = torch.empty(3)
        with pytest.raises(RuntimeError, match="meta"):
            x.tolist()
        with pytest.raises(AssertionError, match="on the host"):
            x + torch.tensor([1.0, 2.0, 3.0], device="cpu").to("meta")
