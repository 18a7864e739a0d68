"""What every figure of a bench includes and leaves out, by the direction of the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_OPERATOR = "on tensors that are there already; without making them"
_DRAWN = "states are full of noise instead of what was read"

INCLUDED = {
    "forward": f"forward: a call {_OPERATOR}",
    "forward + backward": f"forward + backward: a call and the gradients of all its inputs, {_OPERATOR}",
    "training step": "a step: forward, loss, backward, AdamW, on token ids that are there already; without data, "
    "logging and checkpoints",
    "prefill": "a prompt: token ids -> embeddings -> layers -> state, in chunks from an empty state, and the logits "
    "after its last token; without the tokenizer, pictures and sampling",
    "decode": "a token: embedding -> layers -> state, and its logits; without sampling, the tokenizer, and the growth "
    "of our full attention's cache, a copy every 64 tokens (transformers copies its own at every token: included); "
    f"{_DRAWN}",
    "stream": "a frame: patches -> vision tower -> layers -> state, with its positions and the growth of caches; "
    f"without decoding the video, resizing, cutting into patches, and replies; {_DRAWN}; on a GPU, models without full "
    "attention replay CUDA graphs, whose own memory is not in the peak, and the others start every kernel anew",
}
MEMORY = (
    "memory: peak is what one more run adds at most; state, where there is one, is what the layers keep at that "
    "context (of a prompt: after it); weights are counted apart, and pictures show the sum of both"
)


def included(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Of records of measurements: a line of text for every direction among them, and one for memory."""
    return {record["direction"]: INCLUDED[record["direction"]] for record in records} | {"memory": MEMORY}
