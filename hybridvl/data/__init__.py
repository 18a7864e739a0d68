"""Data: tasks, the chat format, images as patches, and the data module that batches them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridvl.data.digits import DigitPages as DigitPages
    from hybridvl.data.easy_vqa import EasyVQA as EasyVQA
    from hybridvl.data.images import ImageConfig as ImageConfig
    from hybridvl.data.messages import MessageData as MessageData
    from hybridvl.data.module import ChatDataModule as ChatDataModule
    from hybridvl.data.task import Task as Task
    from hybridvl.data.tokens import load_tokenizer as load_tokenizer
    from hybridvl.data.video import VideoConfig as VideoConfig

_HOMES = {
    "ChatDataModule": "module",
    "DigitPages": "digits",
    "EasyVQA": "easy_vqa",
    "ImageConfig": "images",
    "MessageData": "messages",
    "Task": "task",
    "VideoConfig": "video",
    "load_tokenizer": "tokens",
}

__all__ = [
    "ChatDataModule",
    "DigitPages",
    "EasyVQA",
    "ImageConfig",
    "MessageData",
    "Task",
    "VideoConfig",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    # Lightning and transformers take seconds to import, so each name is imported when it is first used.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
