"""The fingerprint of a model: equal for equal weights and configurations, wherever they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch

from hybridvl.models.vlm import VisionLanguageModel

# What changes neither the weights nor what is computed with them.
_FREE_FIELDS = ("init_std", "activation_checkpointing")
_BLOCK = 1 << 24  # elements that are brought to the host at a time


@torch.no_grad()
def fingerprint(model: VisionLanguageModel) -> str:
    """SHA-256, 64 digits, over the configuration, and the name, dtype, shape and bytes of every weight.

    Reads all weights: about a second for 1 GB.
    """
    config = dataclasses.asdict(model.config)
    made = hashlib.sha256()
    for name in _FREE_FIELDS:
        del config[name]
    made.update(json.dumps([model.pattern, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in tensor.detach().flatten().split(_BLOCK):
            made.update(block.contiguous().view(torch.uint8).cpu().numpy().data)
    return made.hexdigest()
