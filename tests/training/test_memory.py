"""Which errors are a lack of memory, and what the message makes of them."""

from __future__ import annotations

import errno
import os
import signal
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hybridvl.training.memory import is_out_of_memory, memory_message

NET = Namespace(activation_checkpointing=False)
TRAINER = Namespace(accumulate_grad_batches=4)


def _recipe(packing: bool = False, tokens_per_batch: int | None = None, **model: object) -> Namespace:
    data = {"batch_size": 8, "eval_batch_size": None, "max_tokens": 300, "workers": 3}
    data |= {"packing": packing, "tokens_per_batch": tokens_per_batch}
    return Namespace(data=Namespace(**data), model=Namespace(**model), trainer=TRAINER)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_a_lack_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_real_ones() -> None:
    for ask in (lambda: torch.empty(2**55), lambda: np.empty(2**55)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value)
        assert "computer (" in memory_message(caught.value, "supervised", _recipe(net=NET, loss_chunk=64))


def test_onednn_gives_no_size() -> None:
    error = RuntimeError("could not create a primitive")
    message = memory_message(error, "supervised", _recipe(net=NET, loss_chunk=64))
    assert message.startswith("out of memory of the computer (oneDNN could not make the code of an operator, as ")


class _Killed(Dataset[int]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_killed_worker_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        next(iter(DataLoader(_Killed(), num_workers=1)))
    assert is_out_of_memory(caught.value)
    message = memory_message(caught.value, "supervised", _recipe(net=NET, loss_chunk=64))
    assert message.startswith("a data worker has gone without a word, as when the system kills it because memory runs")
    assert "what helps: fewer data.workers (now 3), a smaller data.batch_size (now 8;" in message


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", True),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", False),
        ("", True),  # torch has seen that it is gone before it was told why
    ],
)
def test_which_lost_workers_are_a_lack_of_memory(cause: str, expected: bool) -> None:
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError(cause)
    assert is_out_of_memory(error) is expected


def test_the_message_has_the_settings_of_the_recipe() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    logits = memory_message(error, "logits", _recipe(student=NET, token_chunk=None))
    assert logits.startswith("out of memory of the GPU (2.5 GiB more were asked for); checkpoints are as they were; ")
    assert "a smaller data.batch_size (now 8; a larger trainer.accumulate_grad_batches, now 4, keeps" in logits
    assert "model.student.activation_checkpointing: true, a smaller model.token_chunk (now null)" in logits
    recomputing = Namespace(activation_checkpointing=True)
    layers = memory_message(error, "layers", _recipe(packing=True, student=recomputing))
    assert "a smaller data.max_tokens (now 300)" in layers
    for absent in ("batch_size (now 8; a", "activation_checkpointing", "chunk", "tokens_per_batch"):
        assert absent not in layers
    budget = memory_message(error, "layers", _recipe(tokens_per_batch=900, student=recomputing))
    assert "a smaller data.tokens_per_batch (now 900), a smaller data.max_tokens (now 300)" in budget
    assert "batch_size (now 8; a" not in budget
