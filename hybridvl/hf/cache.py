"""A model's state as a transformers cache, so that `generate` hands it from step to step."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hybridvl.layers import ConfigError
from hybridvl.models.decoder import ModelState


class HybridVLCache(Cache):
    """Holds a `ModelState`; transformers' own cache layers are not used, for the mixers keep their states themselves.

    state: one row per row of the batch, updated in place by the model. seen: columns of input fed so far, padding
    included, which is what transformers calls the sequence length.
    """

    def __init__(self, state: ModelState) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen = 0

    def __len__(self) -> int:
        return len(self.state.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input fed so far; the same for every layer."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows of the state."""
        return len(self.state.length)

    @property
    def is_initialized(self) -> bool:
        """Always: the state is allocated on construction."""
        return True

    @property
    def is_croppable(self) -> bool:
        """Never: a recurrent state cannot forget its last tokens."""
        return False

    def reset(self) -> None:
        """Back to the empty state, in place."""
        self.state.reset()
        self.seen = 0

    @torch.no_grad()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row go on from row beam_idx (B,) of the state, in place; for beam search."""
        for tensor in self.state.tensors().values():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless there is nothing to remove."""
        if tokens_to_remove:
            raise ConfigError("cache.crop: a recurrent state cannot forget tokens; clone cache.state beforehand")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the rows of a state are fixed."""
        raise ConfigError("cache.batch_repeat_interleave: a state keeps its number of rows; repeat the inputs instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: the rows of a state are fixed."""
        raise ConfigError("cache.batch_select_indices: a state keeps its number of rows; use cache.reorder_cache")
