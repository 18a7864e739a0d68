"""The Lightning data module: any task, tokenized and batched for the vision-language model."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from hybridvl.data.chat import DEFAULT_SYSTEM, ChatFormat
from hybridvl.data.digits import DigitPages
from hybridvl.data.encode import SampleEncoder
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.loader import BatchStream, EvalLoader, LoaderConfig, TrainLoader
from hybridvl.data.order import NumberOrder, make_order
from hybridvl.data.task import Sample, Source, Split, Task
from hybridvl.data.tokens import BUILTIN, load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.layers.errors import ConfigError

DEFAULT_IMAGES = ImageConfig()
DEFAULT_VIDEOS = VideoConfig()
TOO_LONG = ("error", "skip")
UNCOUNTED_BATCHES = 1_000
"""Batches in an epoch where one pass over the data cannot be counted beforehand."""


class ChatDataModule(LightningDataModule):
    """Batches of conversations with images and videos, with labels on the answers.

    Training batches are an endless stream; an epoch is a fixed number of them. Which samples a batch holds follows
    from the seed and the batch's number alone, not from the number of workers, and a checkpoint stores how far the
    stream was read, so that a resumed run goes on with the very next batch.

    Args:
        task: where samples come from; `class_path` and `init_args`. Default: pages of scanned digits.
        tokenizer: "builtin", a folder, or the id of a Hugging Face model.
        images: patch sizes (which must be the vision tower's), size limits and normalisation.
        videos: which frames of a video are shown and how large, and how they are placed (which must be the model's).
        batch_size: samples in a padded batch.
        eval_batch_size: the same for validation, test and prediction; None takes batch_size.
        max_tokens: context, the longest conversation.
        too_long: what to do with a sample whose answers do not fit max_tokens: "error", or "skip" it and count it.
        packing: pack training samples end to end into one row of tokens_per_batch instead of padding them.
        tokens_per_batch: tokens in a training batch at most, padding counted: as many whole samples as fit, one after
            the other, instead of batch_size. null: batch_size samples, with packing a row of max_tokens.
        workers: processes that make training batches, and as many for evaluation; 0 makes them in the main process.
        seed: seed of everything that is drawn or shuffled.
        system: the system turn added to conversations that have none; null adds no turn.
        epoch_batches: training batches in an epoch; null is one pass over the data, or 1,000 where that cannot be
            counted beforehand (packing, tokens_per_batch, skipped samples, streaming).
        train_samples: use only the first so many training samples, the same in every epoch; null uses all.
        shuffle_block: rows of a stream that are read and shuffled together; other data is shuffled whole.
    """

    def __init__(
        self,
        task: Task | None = None,
        tokenizer: str = BUILTIN,
        images: ImageConfig = DEFAULT_IMAGES,
        videos: VideoConfig = DEFAULT_VIDEOS,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_tokens: int = 2048,
        too_long: Literal["error", "skip"] = "error",
        packing: bool = False,
        tokens_per_batch: int | None = None,
        workers: int = 0,
        seed: int = 0,
        system: str | None = DEFAULT_SYSTEM,
        epoch_batches: int | None = None,
        train_samples: int | None = None,
        shuffle_block: int = 1_000,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "max_tokens": max_tokens, "shuffle_block": shuffle_block}
        optional = {
            "eval_batch_size": eval_batch_size,
            "epoch_batches": epoch_batches,
            "train_samples": train_samples,
            "tokens_per_batch": tokens_per_batch,
        }
        for name, value in {**sizes, **optional}.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: {value}; expected at least 1")
        if tokens_per_batch is not None and tokens_per_batch < max_tokens:
            raise ConfigError(
                f"data.tokens_per_batch: {tokens_per_batch}; expected at least data.max_tokens = {max_tokens}, so that "
                "every sample fits, or null"
            )
        if too_long not in TOO_LONG:
            raise ConfigError(f"data.too_long: {too_long!r}; expected one of {', '.join(TOO_LONG)}")
        if workers < 0:
            raise ConfigError(f"data.workers: {workers}; expected at least 0")
        self.task = DigitPages() if task is None else task
        self.seed = seed
        self.epoch_batches = epoch_batches
        self.train_samples = train_samples
        self.shuffle_block = shuffle_block
        self.chat = ChatFormat(load_tokenizer(tokenizer), system)
        self.images = ImageProcessor(images)
        self.videos = VideoProcessor(self.images, videos)
        self.max_tokens = max_tokens
        self.too_long = too_long
        size, tokens, skip = (
            None if tokens_per_batch else batch_size,
            tokens_per_batch or max_tokens,
            too_long == "skip",
        )
        self._train_config = LoaderConfig(size, tokens, packing, workers, skip)
        self._eval_config = LoaderConfig(eval_batch_size or batch_size, max_tokens, False, workers, skip)
        self._train_loader: TrainLoader | None = None
        self._loaders: list[TrainLoader | EvalLoader] = []
        self._by_split: dict[Split, TrainLoader | EvalLoader] = {}
        self._resume: dict[str, Any] | None = None

    def source(self, split: Split) -> Any:
        """The samples of a split before they are encoded."""
        source = self.task.source(split, self.seed)
        if split == "train" and self.train_samples is not None:
            if not isinstance(source, Source):
                raise ConfigError("data.train_samples: not available for a stream; expected null")
            return _First(source, min(self.train_samples, len(source)))
        return source

    def train_dataloader(self) -> TrainLoader:
        """The training batches, from where a loaded state says."""
        source = self.source("train")
        order = make_order(source, seed=self.seed, training=True, block=self.shuffle_block, **self._share())
        config = self._train_config
        batches = self.epoch_batches or UNCOUNTED_BATCHES
        if self.epoch_batches is None and isinstance(order, NumberOrder) and config.fixed_size is not None:
            batches = -(-order.share // config.fixed_size)
        stream = BatchStream(source, order, self._encoder(), config, "train")
        self._train_loader = TrainLoader(stream, batches)
        self._loaders.append(self._train_loader)
        self._by_split["train"] = self._train_loader
        if self._resume is not None:
            self._train_loader.load_state_dict(self._resume)
            self._resume = None
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        """The validation batches."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """The test batches."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """The test batches, for predicting; samples need no answers."""
        return self._eval_loader("test", require_answers=False)

    def state_dict(self) -> dict[str, Any]:
        """How far the training stream was read; part of every checkpoint."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the training loader go on from a checkpoint."""
        self._resume = state_dict.get("train")
        if self._train_loader is not None and self._resume is not None:
            self._train_loader.load_state_dict(self._resume)
            self._resume = None

    def skipped(self) -> dict[str, int]:
        """Samples that this process has skipped because they are too long, by split: of training so far, else in the
        latest pass; splits without any are left out."""
        return {split: loader.skipped for split, loader in self._by_split.items() if loader.skipped}

    def teardown(self, stage: str) -> None:
        """End the workers of all loaders."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    def _encoder(self, require_answers: bool = True) -> SampleEncoder:
        return SampleEncoder(
            self.chat, self.images, self.max_tokens, videos=self.videos, require_answers=require_answers
        )

    def _eval_loader(self, split: Split, require_answers: bool = True) -> EvalLoader:
        source = self.source(split)
        order = make_order(source, seed=self.seed, training=False, block=1, **self._share())
        loader = EvalLoader(BatchStream(source, order, self._encoder(require_answers), self._eval_config, split))
        self._loaders.append(loader)
        self._by_split[split] = loader
        return loader

    def _share(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world": 1}
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size}


class _First(Source):
    """The first samples of a source, the same in every epoch."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int, epoch: int) -> Sample:
        return self._source.sample(index, 0)

    def place(self, index: int) -> str:
        return self._source.place(index)
