"""Running out of memory: how it shows, and which settings of a recipe help."""

from __future__ import annotations

import errno
import re
from typing import Any

import torch

_SIGNS = (
    "can't allocate memory",  # torch's allocator on a CPU
    "out of memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# All that oneDNN says when it gets no memory for an operator's code; "primitive descriptor" is another error.
_NO_CODE = re.compile(r"could not create a primitive(?! descriptor)")
# torch's words on a data worker that has gone; which signal ended it, if any, is known in most cases.
_GONE, _SIGNAL, _KILLED = "exited unexpectedly", "killed by signal", "killed by signal: Killed"
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the computer or of a GPU, was refused."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(sign in str(error) for sign in _SIGNS) or _no_code(error) or _worker_killed(error)


def memory_message(error: BaseException, stage: str, settings: Any) -> str:
    """What was asked for, and the settings of this recipe that decide how much it takes, with their values.

    stage: the name of `run.stage`; settings: the recipe, sections and values as attributes.
    """
    asked = _ASKED.search(str(error))
    size = f" ({_readable(float(asked[1]), asked[2])} more were asked for)" if asked else ""
    where = "GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) else "computer"
    if _no_code(error):
        size = " (oneDNN could not make the code of an operator, as happens when memory runs out)"
    helping = _helping(stage, settings)
    what = f"out of memory of the {where}{size}"
    if _worker_killed(error):
        what = "a data worker has gone without a word, as when the system kills it because memory runs out"
        helping.insert(0, f"fewer data.workers (now {settings.data.workers})")
    return f"{what}; checkpoints are as they were; what helps: {', '.join(helping)}"


def _no_code(error: BaseException) -> bool:
    return _NO_CODE.search(str(error)) is not None


def _worker_killed(error: BaseException) -> bool:
    texts = (str(error), str(error.__cause__))
    if any(_SIGNAL in text for text in texts):
        return any(_KILLED in text for text in texts)
    return _GONE in texts[0]


def _helping(stage: str, settings: Any) -> list[str]:
    data, model, trainer = settings.data, settings.model, settings.trainer
    helping = []
    if data.tokens_per_batch is not None:
        helping.append(f"a smaller data.tokens_per_batch (now {data.tokens_per_batch})")
    elif not data.packing:
        helping.append(
            f"a smaller data.batch_size (now {data.batch_size}; a larger trainer.accumulate_grad_batches, now "
            f"{trainer.accumulate_grad_batches}, keeps the samples of a step)"
        )
    helping.append(f"a smaller data.max_tokens (now {data.max_tokens})")
    place, net = ("net", model.net) if stage == "supervised" else ("student", model.student)
    if not net.activation_checkpointing:
        helping.append(f"model.{place}.activation_checkpointing: true")
    chunk = {"supervised": "loss_chunk", "logits": "token_chunk"}.get(stage)
    if chunk is not None:
        value = getattr(model, chunk)
        helping.append(f"a smaller model.{chunk} (now {'null' if value is None else value})")
    size = data.batch_size if data.eval_batch_size is None else data.eval_batch_size
    return [*helping, f"in validation and test a smaller data.eval_batch_size (now {size})"]


def _readable(amount: float, unit: str) -> str:
    if unit != "bytes":
        return f"{amount:g} {unit}"
    return f"{amount / 2**20:,.0f} MiB" if amount >= 2**20 else f"{amount / 2**10:,.1f} KiB"
