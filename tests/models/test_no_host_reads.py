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

from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel

MIXERS = {
    "swa": {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 64},
    "gdn": {"heads": 2, "head_dim": 16},
    "mamba2": {"head_dim": 16, "state_dim": 16},
}


class OnTheDeviceAlone(TorchDispatchMode):
    """Refuses operations on tensors of the host, but for numbers that PyTorch keeps there as constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim():
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


def test_the_check_sees_reads_and_copies() -> None:
    with torch.device("meta"), OnTheDeviceAlone():
        x = torch.empty(3)
        with pytest.raises(RuntimeError, match="meta"):
            x.tolist()
        with pytest.raises(AssertionError, match="on the host"):
            x + torch.tensor([1.0, 2.0, 3.0], device="cpu").to("meta")
